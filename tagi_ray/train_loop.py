"""The one training loop, run by every worker of a stage; it knows no objective by name.

What a step draws depends on its positions alone, so a stage continues from its newest verified
checkpoint on any number of workers as if nothing had happened.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from tagi_ray import history
from tagi_ray.batches import Batch, local_batches
from tagi_ray.errors import TrainingError
from tagi_ray.groups import Part
from tagi_ray.metrics import StepMeter, peak_flops
from tagi_ray.objectives import Objective, Totals
from tagi_ray.order import OrderPlan
from tagi_ray.stages import Stage, StageSpec, build_stage, fingerprint
from tagi_ray.zero import sum_over_ranks

logger = logging.getLogger(__name__)

Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Worker:
    """Where the loop runs. The defaults are those of a single process without Ray."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    batches: Callable[..., Iterator[Batch]] = local_batches
    report: Callable[[Record], None] = lambda record: None
    """Called on all ranks with each record of the metrics; speeds in it are the rank's own."""


def run_stage(spec: StageSpec, worker: Worker) -> None:
    """Train a stage to its last step; one that is done returns at once. All ranks call this.

    Raises TrainingError on a loss or gradient that is not finite, on all ranks, before anything
    non-finite is written.
    """
    settings, identity = spec.settings, fingerprint(spec)

    # --- continue from the newest checkpoint that verifies
    newest = _newest_step(spec, worker)
    progress = history.progress_at(spec, identity, newest)
    if progress.done:
        return
    if worker.rank == 0:
        history.cut(spec, progress.step)
    stage = build_stage(spec, worker.device)
    if newest:
        stage.engine.restore(history.state_at(spec, newest))
    if worker.rank == 0:
        _tell_wrapped(spec, stage.plan)
    first, groups = progress.step, settings.groups
    reads, stop = stage.objective.reads, settings.steps * groups
    stream = _draw(spec, worker, stage.plan, reads, first * groups, stop)
    accumulation = groups // settings.micro_groups // worker.world
    validation = _validation_batches(spec, stage, worker)
    peak = peak_flops(worker.device, spec.dtype)
    meter = StepMeter(settings.steps, first, device=worker.device, world=worker.world, peak=peak)

    for step in range(first + 1, settings.steps + 1):
        # --- one optimiser step: its micro-batches first, the loss is divided by counts of them all
        with meter.waiting():
            batches = list(islice(stream, accumulation))
        with meter.counting():
            losses = _losses(stage, batches, worker, forwards=accumulation, train=True)
        _refuse_non_finite(spec, step, losses)
        update = stage.engine.step()
        _refuse_non_finite(spec, step, update)
        meter.step(int(losses.pop("tokens")))
        progress.add(losses, cut_texts=int(losses.pop("cut_texts")))
        progress.step, progress.done = step, step == settings.steps

        # --- once in a while: validate, log, save
        valid: Record = {}
        if validation and (progress.done or _due(step, settings.valid_every)):
            valid["valid_loss"] = _validate(stage, validation, worker)
        improved = progress.improved(valid)
        record: Record = {}
        if valid or progress.done or _due(step, settings.log_every):
            values = {"step": step, **progress.take(), **valid, **update, **meter.read()}
            record = history.record(spec, values)
            if worker.rank == 0:
                history.append(spec, record)
        if improved or progress.done or _due(step, settings.save_every):
            state = stage.engine.state()
            if worker.rank == 0:
                history.save(spec, identity, progress, state)
        if record:
            worker.report(record)
    stage.engine.close()


def _tell_wrapped(spec: StageSpec, plan: OrderPlan) -> None:
    if plan.wrapped_instances:
        logger.info(
            "stage %s draws %d of its instances a second time in each epoch, to fill groups of %d",
            spec.name, plan.wrapped_instances, plan.instances,
        )  # fmt: skip


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _draw(
    spec: StageSpec, worker: Worker, plan: OrderPlan, parts: Sequence[Part], start: int, stop: int
) -> Iterator[Batch]:
    return worker.batches(
        spec.shards,
        plan,
        spec.run_folder / "tokenizer",
        spec.data,
        start_position=start,
        stop_position=stop,
        micro_groups=spec.settings.micro_groups,
        parts=parts,
        teacher_folder=spec.teacher_logits if "teacher" in parts else None,
        rank=worker.rank,
        world=worker.world,
    )


def _validation_batches(spec: StageSpec, stage: Stage, worker: Worker) -> list[Batch]:
    """Return this rank's share of the fixed validation groups, at least one for each rank."""
    plan = stage.valid_plan
    if plan is None:
        return []
    count = max(min(spec.settings.valid_groups, plan.groups_per_epoch), worker.world)
    here = Worker(worker.rank, worker.world)
    return list(_draw(spec, here, plan, stage.objective.validated, 0, count))


@torch.no_grad()
def _validate(stage: Stage, batches: list[Batch], worker: Worker) -> float:
    """Return the loss over all ranks' validation batches.

    On sharded weights all ranks must run as many forwards as the one with the most batches.
    """
    mine = torch.zeros(worker.world, device=worker.device)
    mine[worker.rank] = len(batches)
    (counts,) = sum_over_ranks([mine])
    return _losses(stage, batches, worker, forwards=int(counts.max()))["loss"]


def _losses(
    stage: Stage, batches: list[Batch], worker: Worker, *, forwards: int, train: bool = False
) -> dict[str, float]:
    """Return the loss over all ranks' batches, its parts, and how many texts were read and cut.

    `tokens` counts what was read, `cut_texts` the texts that were longer than allowed. A rank with
    fewer batches than `forwards` runs its last one again, and drops what comes out.
    """
    counts = {
        "tokens": float(sum(_tokens(batch) for batch in batches)),
        "cut_texts": float(sum(batch.cut_texts for batch in batches)),
    }
    batches = [batch.to(worker.device) for batch in batches]
    totals = _totals(stage.objective, batches)
    sums: dict[str, Tensor] = {}
    for number in range(forwards):
        with ExitStack() as scope:
            share = stage.engine.forward(batches[min(number, len(batches) - 1)], totals, scope)
            if train:
                stage.engine.backward(share.loss)
        if number >= len(batches):
            continue
        for name, part in {"loss": share.loss.detach(), **share.parts}.items():
            sums[name] = sums[name] + part if name in sums else part
    sums |= {name: torch.tensor(count, device=worker.device) for name, count in counts.items()}
    (summed,) = sum_over_ranks([torch.stack([part.float() for part in sums.values()])])
    return dict(zip(sums, summed.tolist(), strict=True))


def _totals(objective: Objective, batches: list[Batch]) -> Totals:
    """Return the objective's counts, summed over micro-batches and ranks."""
    counts = [objective.denominators(batch) for batch in batches]
    own = [torch.stack([count[name] for count in counts]).sum(0) for name in counts[0]]
    return dict(zip(counts[0], sum_over_ranks(own), strict=True))


def _tokens(batch: Batch) -> int:
    masks = (batch.instruction_mask_KI, batch.input_mask_KNS, batch.prompt_mask_KNS)
    return sum(int(mask.sum()) for mask in masks) + int(batch.valid_tokens())


def _refuse_non_finite(spec: StageSpec, step: int, values: Mapping[str, float]) -> None:
    """Raise on a value that is not finite: it is summed over ranks, so all of them raise."""
    bad = {name: value for name, value in values.items() if not math.isfinite(value)}
    if bad:
        raise TrainingError(
            f"stage {spec.name}, seed {spec.seed}: "
            + ", ".join(f"{name} is {value}" for name, value in bad.items())
            + f" at step {step}, with learning rate {spec.rate:g}: lower the rate, or the norm that"
            f" gradients are clipped to ({spec.kind}.optimizer.clip_norm)"
        )


def _newest_step(spec: StageSpec, worker: Worker) -> int:
    """Return where to continue. Rank 0 looks, for it may have to set torn checkpoints aside."""
    own = history.newest_step(spec) if worker.rank == 0 else 0
    (step,) = sum_over_ranks([torch.tensor(float(own), device=worker.device)])
    return int(step)
