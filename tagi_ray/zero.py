"""Engines: what one optimiser step does with gradients, over all ranks.

`ZeroEngine` trains the parameters of a model with DeepSpeed's ZeRO; this is the only module that
imports DeepSpeed. Its state is portable: full fp32 values and moments by parameter name, the same
for every number of ranks and every stage. `FrozenModel` runs what other engines train tensors for.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tagi_ray.batches import Batch
from tagi_ray.errors import CheckpointError
from tagi_ray.objectives import LossParts, Objective, Totals
from tagi_ray.optim import build_optimizer, clip_gradients, rate_factor
from tagi_ray.sections import ResourceSettings, StageSettings

State = dict[str, Tensor]

LIVE_WEIGHTS = 50_000_000
"""Weights that stay gathered on a rank at stage 3, for their next use."""


class Engine(Protocol):
    """What the training loop asks of an engine, in this order in each optimiser step."""

    def forward(self, batch: Batch, totals: Totals, scope: ExitStack) -> LossParts:
        """Return the micro-batch's share of the step's loss; under no_grad, for validation."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of one micro-batch."""
        ...

    def step(self) -> dict[str, float]:
        """Update from the gradients of all ranks; return `grad_norm` and `learning_rate`."""
        ...

    def state(self) -> State:
        """Return what a checkpoint needs, on the CPU. All ranks must call it together."""
        ...

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what `state` returned on any number of ranks. All ranks call it."""
        ...

    def close(self) -> None:
        """Release what the engine holds besides the model."""
        ...


def sum_over_ranks(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return each tensor summed over all ranks, in one exchange; without other ranks, as it is."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return list(tensors)
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]


def deepspeed_config(
    settings: StageSettings, resources: ResourceSettings, world: int, dtype: torch.dtype
) -> dict[str, Any]:
    """Return DeepSpeed's configuration of a training stage on `world` ranks.

    dtype: that of the trained parameters. In bfloat16 DeepSpeed keeps fp32 master copies of them,
    which needs ZeRO, so that stage 0 becomes stage 2. A frozen backbone in bfloat16 below fp32
    parameters needs nothing.
    """
    bfloat16 = dtype == torch.bfloat16
    stage = 2 if bfloat16 and resources.zero_stage == 0 else resources.zero_stage
    zero: dict[str, Any] = {
        "stage": stage,
        # By default a thousand million weights stay gathered, and as long a buffer waits for
        # gradients: more than most backbones and all hypernetworks have.
        "stage3_max_live_parameters": LIVE_WEIGHTS,
        "stage3_max_reuse_distance": LIVE_WEIGHTS,
        "stage3_prefetch_bucket_size": LIVE_WEIGHTS // 2,
        "reduce_bucket_size": LIVE_WEIGHTS // 2,
    }
    if resources.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if resources.offload_parameters:
        zero["offload_param"] = {"device": "cpu"}
    return {
        "train_batch_size": settings.groups,
        "train_micro_batch_size_per_gpu": settings.micro_groups,
        "gradient_accumulation_steps": settings.groups // (settings.micro_groups * world),
        # At stage 0 the engine clips itself: DeepSpeed does not tell the norm there.
        "gradient_clipping": settings.optimizer.clip_norm if stage else 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # Its own optimiser for offloaded state has to be compiled; torch's runs on the CPU too.
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": bfloat16},
        "steps_per_print": 2**31,
    }


@contextmanager
def sharded_loading(
    settings: StageSettings, resources: ResourceSettings, dtype: torch.dtype, device: torch.device
) -> Iterator[None]:
    """At stage 3, shard pretrained weights over the ranks while they are read in the block.

    No rank ever holds them whole; without it each would, before the engine shards them. dtype:
    that of the weights.
    """
    if resources.zero_stage < 3:
        yield
        return
    deepspeed = _import_deepspeed(device)
    from transformers.integrations import HfDeepSpeedConfig

    join_process_group(device)
    deepspeed.init_distributed(dist_init_required=False)  # else it takes itself to be alone
    config = deepspeed_config(settings, resources, dist.get_world_size(), dtype)
    kept = HfDeepSpeedConfig(config)  # transformers asks for it while it lives
    try:
        yield
    finally:
        del kept


def join_process_group(device: torch.device) -> None:
    """Make a process group of this process alone, unless there is one already."""
    if not dist.is_initialized():
        os.environ.setdefault("LOCAL_RANK", "0")
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


class StageModule(nn.Module):
    """The root module of an engine: all parameters are reached through its forward."""

    def __init__(self, model: Any, objective: Objective) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self.anchor: nn.Parameter | None = None

    def forward(
        self, batch: Batch, totals: Totals, scope: ExitStack
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and its parts."""
        result = self.objective.loss(self.model, batch, totals, scope)
        if self.anchor is None:
            return result.loss, result.parts
        return result.loss + 0.0 * self.anchor.sum(), result.parts


class ZeroEngine:
    """Trains the parameters of a model, ZeRO stage 0 to 3."""

    def __init__(
        self,
        model: Any,
        objective: Objective,
        settings: StageSettings,
        resources: ResourceSettings,
        learning_rate: float,
        device: torch.device,
    ) -> None:
        """The process group of all ranks must exist; alone, the engine makes one."""
        deepspeed = _import_deepspeed(device)
        join_process_group(device)
        self.parameters: dict[str, nn.Parameter] = model.trainable()
        (dtype,) = {parameter.dtype for parameter in self.parameters.values()}
        world = dist.get_world_size()
        config = deepspeed_config(settings, resources, world, dtype)
        self.settings, self.learning_rate = settings, learning_rate
        self.steps = 0
        self._stage: int = config["zero_optimization"]["stage"]
        self._accumulation = config["gradient_accumulation_steps"]
        # DeepSpeed averages over ranks and micro-batches, while shares of a loss add up.
        self._scale = float(world * self._accumulation)
        self._pending = 0
        self._client = build_optimizer(
            self.parameters.values(), settings.optimizer, self.learning_rate
        )
        self._engine, *_ = deepspeed.initialize(
            model=StageModule(model, objective).to(device),
            model_parameters=list(self.parameters.values()),
            optimizer=self._client,
            config=config,
            dist_init_required=False,
        )

    def forward(self, batch: Batch, totals: Totals, scope: ExitStack) -> LossParts:
        """Return the micro-batch's share of the step's loss."""
        forward = self._engine if torch.is_grad_enabled() else self._engine.module
        return LossParts(*forward(batch, totals, scope))

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of one micro-batch; after the last one, over all ranks."""
        self._engine.backward(loss * self._scale)
        self._pending += 1
        if self._pending < self._accumulation:
            self._engine.step()  # only counts the micro-batch

    def step(self) -> dict[str, float]:
        """Update at this step's learning rate."""
        rate = self.learning_rate * rate_factor(
            self.steps, self.settings.steps, self.settings.optimizer
        )
        for group in self._client.param_groups:
            group["lr"] = rate
        norm = None
        if not self._stage:
            norm = clip_gradients(self.parameters.values(), self.settings.optimizer.clip_norm)
        self._engine.step()
        self._pending = 0
        self.steps += 1
        if norm is None:
            norm = float(self._engine.get_global_grad_norm())
        return {"grad_norm": norm, "learning_rate": rate}

    def state(self) -> State:
        """Return weights and moments of every parameter, gathered over the ranks, on rank 0.

        The other ranks take part and get nothing: for a large model it is more than each can hold.
        """
        state = {"step": torch.tensor(self.steps)}
        for name, parameter in self.parameters.items():
            kinds = self._gathered(parameter) if self._stage else self._own(parameter)
            if dist.get_rank() == 0:
                for kind, value in kinds.items():
                    state[f"{kind}.{name}"] = value.detach().float().cpu().clone()
        return state if dist.get_rank() == 0 else {}

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Set weights and moments of every parameter, whatever they were saved from."""
        missing = [name for name in self.parameters if f"model.{name}" not in state]
        if missing:
            raise CheckpointError(f"the checkpoint has no values of {', '.join(missing[:3])}")
        self.steps = int(state["step"])
        kinds = sorted({key.split(".", 1)[0] for key in state} - {"model", "step"})
        if self._stage and self.steps:
            self._make_moments(kinds)
        for name, parameter in self.parameters.items():
            value = state[f"model.{name}"].to(self._engine.device)
            moments = {k: state[f"{k}.{name}"] for k in kinds if f"{k}.{name}" in state}
            moments = {kind: moment.to(self._engine.device) for kind, moment in moments.items()}
            self._set_weight(parameter, value)
            if self._stage:
                self._set_gathered(parameter, value, moments)
            elif moments:
                steps = state[f"step.{name}"].clone()
                self._client.state[parameter] = {"step": steps, **moments}

    def close(self) -> None:
        """Release DeepSpeed's buffers and hooks."""
        self._engine.destroy()

    def _own(self, parameter: nn.Parameter) -> State:
        return {"model": parameter, **self._client.state.get(parameter, {})}

    def _gathered(self, parameter: nn.Parameter) -> dict[str, Any]:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        values: dict[str, Any] = {"model": safe_get_full_fp32_param(parameter)}
        flat = self._client.state.get(self._flat_shards()[0])
        if flat:
            for kind in sorted(set(flat) - {"step"}):
                values[kind] = safe_get_full_optimizer_state(parameter, kind)
            values["step"] = flat["step"]
        for kind, value in values.items():
            if kind != "step" and value.shape != self._shape(parameter):
                raise RuntimeError(f"gathered {kind} of shape {list(value.shape)}, not whole")
        return values

    def _shape(self, parameter: nn.Parameter) -> torch.Size:
        """Return the whole shape of a parameter, which at stage 3 is empty between its uses."""
        return getattr(parameter, "ds_shape", parameter.shape)

    def _flat_shards(self) -> list[Tensor]:
        """Return this rank's shards, each of many parameters, as the optimiser sees them."""
        if self._stage == 3:
            return self._engine.optimizer.fp32_partitioned_groups_flat
        return [flat for group in self._client.param_groups for flat in group["params"]]

    def _set_weight(self, parameter: nn.Parameter, value: Tensor) -> None:
        if self._stage < 3:
            parameter.data.copy_(value)
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            if dist.get_rank() == 0:
                parameter.data.copy_(value)

    def _make_moments(self, kinds: list[str]) -> None:
        """Create this rank's shard of the moments, which otherwise the first update creates."""
        for flat in self._flat_shards():
            moments = {kind: torch.zeros_like(flat) for kind in kinds}
            step = torch.tensor(float(self.steps))
            self._client.state[flat] = {"step": step, **moments}
        if self._stage < 3:
            # No public function links the shards to their parameters before the first update.
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _set_gathered(self, parameter: nn.Parameter, value: Tensor, moments: State) -> None:
        from deepspeed import utils

        if self._stage < 3:
            utils.safe_set_full_fp32_param(parameter, value)
            for kind, moment in moments.items():
                utils.safe_set_full_optimizer_state(parameter, moment, kind)
            return
        # The functions for whole tensors fail where the ranks' shards are not of equal size.
        utils.safe_set_local_fp32_param(parameter, self._own_shard(parameter, value))
        for kind, moment in moments.items():
            shard = self._own_shard(parameter, moment)
            utils.safe_set_local_optimizer_state(parameter, shard, kind)

    def _own_shard(self, parameter: Any, value: Tensor) -> Tensor:
        """Return this rank's part of a whole tensor, filled up with zeros at the end."""
        size = parameter.ds_tensor.numel()
        flat = value.flatten().float()
        flat = nn.functional.pad(flat, (0, size * dist.get_world_size() - flat.numel()))
        return flat.narrow(0, size * dist.get_rank(), size)


class FrozenModel:
    """Runs a model with no trained parameters of its own; at stage 3 its weights are sharded."""

    def __init__(
        self,
        model: Any,
        objective: Objective,
        settings: StageSettings,
        resources: ResourceSettings,
        device: torch.device,
    ) -> None:
        self._module = StageModule(model, objective)
        self._engine: Any = None
        if resources.zero_stage == 3:
            deepspeed = _import_deepspeed(device)
            join_process_group(device)
            # An engine wants a parameter of its own to train, and a part of the loss.
            self._module.anchor = nn.Parameter(torch.zeros(1))
            anchors = [self._module.anchor]
            config = deepspeed_config(settings, resources, dist.get_world_size(), torch.float32)
            self._scale = float(config["gradient_accumulation_steps"])
            self._engine, *_ = deepspeed.initialize(
                model=self._module.to(device),
                model_parameters=anchors,
                optimizer=torch.optim.SGD(anchors, lr=0.0),
                config=config,
                dist_init_required=False,
            )

    def forward(self, batch: Batch, totals: Totals, scope: ExitStack) -> LossParts:
        """Return the micro-batch's share of the step's loss."""
        engine: Any = self._engine if torch.is_grad_enabled() else None
        return LossParts(*(engine or self._module)(batch, totals, scope))

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of one micro-batch to the tensors that the objective trains."""
        if self._engine is None:
            loss.backward()
        else:
            self._engine.backward(loss * self._scale)  # it divides by the accumulation
            self._engine.step()

    def close(self) -> None:
        """Release DeepSpeed's buffers and hooks."""
        if self._engine is not None:
            self._engine.destroy()


def _import_deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed without its chatter, and on the CPU without need of a compiler."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    if device.type == "cpu":
        # On the CPU every start would compile an operator that gloo does without.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
