"""Engines: what one optimiser step does with gradients, over all ranks.

`ZeroEngine` trains the parameters of a model with DeepSpeed's ZeRO; this is the only module that
imports DeepSpeed. `BankEngine` trains the factors of teachers, which are no parameters of a model.
Both save and restore a portable state: full fp32 values and moments by parameter name, the same
for every number of ranks and every stage, the same on every rank.

Axes: K slots of a bank.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tagi_ray.batches import Batch
from tagi_ray.errors import CheckpointError
from tagi_ray.lora import LoraBank
from tagi_ray.objectives import LossParts, Objective, Totals
from tagi_ray.optim import SlotAdamW, build_optimizer, clip_gradients, rate_factor
from tagi_ray.sections import StageSettings

State = dict[str, Tensor]


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
    settings: StageSettings, zero_stage: int, world: int, *, bfloat16: bool = False
) -> dict[str, Any]:
    """Return DeepSpeed's configuration of a training stage on `world` ranks.

    `bfloat16` says that the trained parameters themselves are bfloat16: DeepSpeed then keeps their
    fp32 master copies, which needs ZeRO, so that stage 0 becomes stage 2. A frozen backbone in
    bfloat16 below fp32 parameters needs nothing.
    """
    stage = 2 if bfloat16 and zero_stage == 0 else zero_stage
    return {
        "train_batch_size": settings.groups,
        "train_micro_batch_size_per_gpu": settings.micro_groups,
        "gradient_accumulation_steps": settings.groups // (settings.micro_groups * world),
        # At stage 0 the engine clips itself: DeepSpeed does not tell the norm there.
        "gradient_clipping": settings.optimizer.clip_norm if stage else 0.0,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": bfloat16},
        "steps_per_print": 2**31,
    }


class StageModule(nn.Module):
    """The root module of an engine: all parameters are reached through its forward."""

    def __init__(self, model: Any, objective: Objective) -> None:
        super().__init__()
        self.model = model
        self.objective = objective

    def forward(
        self, batch: Batch, totals: Totals, scope: ExitStack
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and its parts."""
        result = self.objective.loss(self.model, batch, totals, scope)
        return result.loss, result.parts


class ZeroEngine:
    """Trains the parameters of a model, ZeRO stage 0, 1 or 2."""

    def __init__(
        self,
        model: Any,
        objective: Objective,
        settings: StageSettings,
        zero_stage: int,
        learning_rate: float,
        device: torch.device,
    ) -> None:
        """The process group of all ranks must exist; alone, the engine makes one."""
        deepspeed = _import_deepspeed(device)
        if not dist.is_initialized():
            os.environ.setdefault("LOCAL_RANK", "0")
            backend = "nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        self.parameters: dict[str, nn.Parameter] = model.trainable()
        bfloat16 = all(p.dtype == torch.bfloat16 for p in self.parameters.values())
        world = dist.get_world_size()
        config = deepspeed_config(settings, zero_stage, world, bfloat16=bfloat16)
        self.settings, self.learning_rate = settings, learning_rate
        self.steps = 0
        self._sharded = config["zero_optimization"]["stage"] > 0
        self._accumulation = config["gradient_accumulation_steps"]
        # DeepSpeed averages over ranks and micro-batches, while shares of a loss add up.
        self._scale = float(world * self._accumulation)
        self._pending = 0
        self._client = build_optimizer(
            self.parameters.values(), settings.optimizer, self.learning_rate
        )
        module = StageModule(model, objective).to(device)
        self._engine, *_ = deepspeed.initialize(
            model=module,
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
        if not self._sharded:
            norm = clip_gradients(self.parameters.values(), self.settings.optimizer.clip_norm)
        self._engine.step()
        self._pending = 0
        self.steps += 1
        if norm is None:
            norm = float(self._engine.get_global_grad_norm())
        return {"grad_norm": norm, "learning_rate": rate}

    def state(self) -> State:
        """Return weights and moments of every parameter, gathered over the ranks."""
        state = {"step": torch.tensor(self.steps)}
        for name, parameter in self.parameters.items():
            kinds = self._gathered(parameter) if self._sharded else self._own(parameter)
            for kind, value in kinds.items():
                state[f"{kind}.{name}"] = value.detach().float().cpu().clone()
        return state

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Set weights and moments of every parameter, whatever they were saved from."""
        missing = [name for name in self.parameters if f"model.{name}" not in state]
        if missing:
            raise CheckpointError(f"the checkpoint has no values of {', '.join(missing[:3])}")
        self.steps = int(state["step"])
        kinds = sorted({key.split(".", 1)[0] for key in state} - {"model", "step"})
        if self._sharded and self.steps:
            self._make_moments(kinds)
        for name, parameter in self.parameters.items():
            value = state[f"model.{name}"].to(parameter.device)
            parameter.data.copy_(value)
            moments = {k: state[f"{k}.{name}"] for k in kinds if f"{k}.{name}" in state}
            moments = {kind: moment.to(parameter.device) for kind, moment in moments.items()}
            if self._sharded:
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
        flat = self._client.state.get(self._client.param_groups[0]["params"][0])
        if flat:
            for kind in sorted(set(flat) - {"step"}):
                values[kind] = safe_get_full_optimizer_state(parameter, kind)
            values["step"] = flat["step"]
        return values

    def _make_moments(self, kinds: list[str]) -> None:
        """Create this rank's shard of the moments, which otherwise the first update creates."""
        for group in self._client.param_groups:
            for flat in group["params"]:
                moments = {kind: torch.zeros_like(flat) for kind in kinds}
                step = torch.tensor(float(self.steps))
                self._client.state[flat] = {"step": step, **moments}
        # No public function links the shards to their parameters before the first update.
        self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _set_gathered(self, parameter: nn.Parameter, value: Tensor, moments: State) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        safe_set_full_fp32_param(parameter, value)
        for kind, moment in moments.items():
            safe_set_full_optimizer_state(parameter, moment, kind)


class BankEngine:
    """Trains the factors of a bank, each slot as if it were alone; gradients summed over ranks."""

    def __init__(
        self,
        model: Any,
        objective: Objective,
        bank: LoraBank,
        settings: StageSettings,
        learning_rate: float,
    ) -> None:
        """`bank`: leaf tensors that require gradients, the ones that the objective trains."""
        self.model, self.objective = model, objective
        tensors = {f"{name}.lora_A": factor for name, factor in bank.a.items()}
        tensors |= {f"{name}.lora_B": factor for name, factor in bank.b.items()}
        steps_K = slot_steps(settings.steps, settings.groups, bank.slots)
        self.optimizer = SlotAdamW(tensors, settings.optimizer, steps_K, learning_rate)
        self._active_K = torch.zeros(bank.slots, device=next(iter(bank.a.values())).device)

    def forward(self, batch: Batch, totals: Totals, scope: ExitStack) -> LossParts:
        """Return the micro-batch's share of the step's loss."""
        if torch.is_grad_enabled():
            self._active_K[batch.slots_K] = 1
        return self.objective.loss(self.model, batch, totals, scope)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of one micro-batch."""
        loss.backward()

    def step(self) -> dict[str, float]:
        """Update the slots that any rank had rows of; norm and rate are means over these."""
        tensors = list(self.optimizer.tensors.values())
        gradients = [
            torch.zeros_like(tensor) if tensor.grad is None else tensor.grad for tensor in tensors
        ]
        active_K, *summed = sum_over_ranks([self._active_K, *gradients])
        for tensor, gradient in zip(tensors, summed, strict=True):
            tensor.grad = gradient
        chosen_K = active_K > 0
        rates_K = torch.tensor(self.optimizer.rates_K())
        norms_K = self.optimizer.step(chosen_K)
        self._active_K.zero_()
        return {
            "grad_norm": float(norms_K[chosen_K].mean()),
            "learning_rate": float(rates_K[chosen_K.cpu()].mean()),
        }

    def state(self) -> State:
        """Return factors, moments and steps by slot."""
        return self.optimizer.state()

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Set factors, moments and steps by slot."""
        self.optimizer.restore(state)

    def close(self) -> None:
        """Nothing is held."""


def slot_steps(steps: int, groups: int, slots: int) -> list[int]:
    """Return how many of the optimiser steps have rows of each slot, [K].

    Position p belongs to slot p mod `slots`, and step t has positions t*groups to (t+1)*groups.
    """
    if groups >= slots:
        return [steps] * slots
    return [(steps * groups - 1 - slot) // slots + 1 for slot in range(slots)]


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
