"""What a worker holds in memory in a training stage, by ZeRO stage: arithmetic on counted parts.

It follows `zero` and `bank_engine`: who keeps weights, gradients, moments and fp32 copies, and what
exists beside them while they are made, reduced, stepped and saved.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from tagi_ray.config import Experiment
from tagi_ray.footprint import Footprint, Kind
from tagi_ray.model import TagiModel
from tagi_ray.zero import deepspeed_config


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one worker at one ZeRO stage."""

    zero_stage: int
    weights: int
    """Of this worker's share, frozen and trained, with the buffers."""
    gathered: int
    """The most that stage 3 gathers of the others' shares at a time."""
    bank: int
    """Teacher adapters: those trained, or those learnt from."""
    gradients: int
    """With the bucket in which they are summed."""
    optimizer: int
    """Moments, and where DeepSpeed keeps them the fp32 copies of the weights."""
    activations: int
    """The most that one micro-batch holds, forward and backward."""
    offloaded: int
    """Of the above what stands in CPU memory beside a GPU; counted there alone."""
    moments: dict[str, int]
    """Total at each moment: init, backward (its start is the end of forward), step, checkpoint."""

    @property
    def peak(self) -> int:
        """The most at any moment."""
        return max(self.moments.values())

    @property
    def peak_at(self) -> str:
        """The moment of the peak."""
        return max(self.moments, key=lambda moment: self.moments[moment])


@dataclass(frozen=True, slots=True)
class Parts:
    """What a stage's model consists of, in elements, and in bytes where so named."""

    frozen: int
    frozen_bytes: int
    trained: int
    size: int
    """Bytes of one trained parameter."""
    largest: int
    """Elements of the largest trained parameter."""
    widest: int
    """Elements of the largest parameter, frozen or not."""
    factored: int
    """Elements of Adafactor's state."""
    buffer_bytes: int
    factors: int
    """Of all teachers."""

    @classmethod
    def of(cls, model: TagiModel, kind: Kind, factors: int) -> Parts:
        """Count a model's parts; `factors` are all teachers' numbers."""
        trained = list(model.trainable().values())
        frozen = [p for p in model.parameters() if not p.requires_grad]
        return cls(
            frozen=sum(p.numel() for p in frozen),
            frozen_bytes=sum(p.numel() * p.element_size() for p in frozen),
            trained=sum(p.numel() for p in trained),
            size=trained[0].element_size() if trained else 4,
            largest=max((p.numel() for p in trained), default=0),
            widest=max(p.numel() for p in model.parameters()),
            factored=sum(
                p.numel() // p.shape[-1] + p.numel() // p.shape[-2] if p.dim() > 1 else p.numel()
                for p in trained
            ),
            buffer_bytes=sum(b.numel() * b.element_size() for b in model.buffers()),
            factors=factors,
        )


def sharding(experiment: Experiment, kind: Kind, parts: Parts, zero: int) -> dict[str, Any]:
    """Return what DeepSpeed is told of its sharding, if the settings asked for this ZeRO stage."""
    resources = experiment.resources.model_copy(
        update={
            "zero_stage": zero,
            "offload_optimizer": experiment.resources.offload_optimizer and zero > 0,
            "offload_parameters": experiment.resources.offload_parameters and zero == 3,
        }
    )
    dtype = torch.bfloat16 if parts.size == 2 else torch.float32
    settings = experiment.stages()[kind]
    return deepspeed_config(settings, resources, resources.workers, dtype)["zero_optimization"]


def estimate(
    experiment: Experiment, kind: Kind, parts: Parts, footprint: Footprint, zero: int
) -> Memory:
    """Count what a worker holds; see `zero` and `bank_engine` for who holds it."""
    settings, resources = experiment.stages()[kind], experiment.resources
    workers, on_gpu = resources.workers, resources.gpus_per_worker > 0
    told = sharding(experiment, kind, parts, zero)
    ours, size = -(-parts.trained // workers), parts.size
    whole = parts.frozen_bytes + parts.trained * size
    elements = parts.frozen + parts.trained
    weights, gathered = whole, 0
    if zero == 3:
        weights = -(-whole // workers)
        # Those that stay for their next use, those fetched ahead, and those in use.
        live = told["stage3_max_live_parameters"] + told["stage3_prefetch_bucket_size"]
        gathered = whole * min(live + parts.widest, elements) // elements

    # --- what one rank keeps of gradients and optimiser state
    share = 1 / workers if zero >= 2 else 1.0
    kept = ours if zero >= 2 else parts.trained
    bucket = 0
    if zero and parts.trained:
        limit = told["reduce_bucket_size"]
        bucket = size * (limit if on_gpu else min(limit, parts.trained))
    gradients = kept * size
    optimizer = (12 * ours if zero else 8 * parts.trained) if parts.trained else 0
    if settings.optimizer.name == "adafactor":
        optimizer = 4 * parts.factored
    bank = 4 * parts.factors
    if kind == "teachers":
        gradients, optimizer = 4 * parts.factors, 8 * parts.factors

    memory = Memory(
        zero, weights + parts.buffer_bytes, gathered, bank, gradients + bucket, optimizer,
        footprint.activations, 0, {},
    )  # fmt: skip

    # --- what is offloaded stands beside a GPU, and without one in the same memory
    away = {"weights": 0, "optimizer": 0, "gradients": 0}
    if on_gpu and "offload_optimizer" in told:
        away |= {"optimizer": optimizer, "gradients": gradients}
    if on_gpu and "offload_param" in told:
        away["weights"] = weights
    here = replace(
        memory,
        weights=memory.weights - away["weights"],
        gradients=memory.gradients - away["gradients"],
        optimizer=memory.optimizer - away["optimizer"],
        offloaded=sum(away.values()),
    )
    accumulates = settings.groups > settings.micro_groups * workers
    moments = _moments(experiment, kind, parts, footprint, here, accumulates, share)
    return replace(here, moments=moments)


def _moments(
    experiment: Experiment, kind: Kind, parts: Parts, footprint: Footprint, held: Memory,
    accumulates: bool, share: float,
) -> dict[str, int]:  # fmt: skip
    """Return the bytes of a worker at each moment that may be the highest."""
    workers, zero = experiment.resources.workers, held.zero_stage
    on_gpu = experiment.resources.gpus_per_worker > 0
    stays = held.weights + held.bank + held.optimizer
    finished = parts.trained * parts.size if kind != "teachers" else 4 * parts.factors
    offloaded_gradients = held.offloaded and on_gpu
    if kind == "teachers" or accumulates or offloaded_gradients:
        backward = held.gradients + footprint.activations
    else:
        bucket = held.gradients - round(finished * share)
        backward = bucket + footprint.peak(share)

    # --- the weights are whole until they are sharded, unless they are read in shards
    whole = parts.frozen_bytes + parts.trained * parts.size + parts.buffer_bytes
    read_whole = experiment.backbone.path == "random"
    if read_whole and not on_gpu:
        whole = 4 * (parts.frozen + parts.trained) + parts.buffer_bytes
    init = held.bank + (whole if zero < 3 or read_whole else held.weights)
    if 0 < zero < 3:
        init += parts.trained * parts.size + 4 * parts.trained // workers

    # --- Adam's denominator; before it, gradients are copied into one shard, or summed in one piece
    step = stays + held.gradients
    if kind == "teachers":
        step += 4 * parts.factors if workers > 1 else 0
    elif not (on_gpu and held.offloaded):
        ours = 4 * -(-parts.trained // workers)
        step += 3 * ours if zero else 8 * parts.largest
    moments = {"init": init, "backward": stays + held.gathered + backward, "step": step}
    if not on_gpu:  # rank 0 gathers weights and moments in CPU memory
        moments["checkpoint"] = stays + 12 * (
            parts.factors if kind == "teachers" else parts.trained
        )
    return moments
