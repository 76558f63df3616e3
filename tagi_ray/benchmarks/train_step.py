"""A finetune step that generates adapters once for each task, beside one that does for each row.

Axes: K tasks, N instances, I instruction, S source and T target tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

from tagi_ray.benchmarks.measure import Case, Row, measure
from tagi_ray.benchmarks.shapes import SHAPES, Shape, random_batch, random_model

if TYPE_CHECKING:  # torch would make `--help` slow
    from tagi_ray.batches import Batch

# Tokens of instruction (Def + 2 Pos), input and target with a byte-level BPE of 32k entries fitted
# on 172 tasks of Super-NaturalInstructions and the definitions of all 1654.
MEDIAN = (208, 56, 4)
"""Medians over the tasks (I) and over 100 instances of each (S, T)."""
PADDED = (362, 182, 20)
"""Medians over batches of 4 tasks x 4 instances, each padded to its longest."""
EVEN = (128, 128, 16)
"""Inputs as long as the instruction, where generating once saves less."""


def rows(rounds: int) -> Iterator[Row]:
    """A finetune step: an adapter generated for each task, or for each row."""
    for lengths, tokens in {"median": MEDIAN, "padded": PADDED, "even": EVEN}.items():
        yield from measure(train_step_case(f"M, {lengths}", SHAPES["M"], 4, 4, tokens), rounds)


def train_step_case(
    size: str,
    shape: Shape,
    tasks: int,
    instances: int,
    tokens: tuple[int, int, int],
) -> Case:
    """Forward and backward of the cross-entropy on K tasks x N instances.

    Ours runs the hypernetwork once for each task and routes the rows to K slots. The other side
    gives every row its own copy of the instruction, as a row-wise data set has it: K*N tasks of
    one instance through the same code. tokens: I, S and T, all filled.
    """
    from tagi_ray import objectives
    from tagi_ray.method_sections import DistillationSettings

    model = random_model(shape)
    grouped = random_batch(shape, tasks, instances, tokens)
    single = row_wise(grouped)
    objective = objectives.finetune(DistillationSettings(), None, "full")

    def step(batch: Batch) -> float:
        model.zero_grad(set_to_none=True)
        with ExitStack() as scope:
            result = objective.loss(model, batch, objective.denominators(batch), scope)
            result.loss.backward()
        return result.loss.item()

    name = f"{size} lengths {tokens}, {tasks} tasks x {instances} instances"
    return Case(name, lambda: step(grouped), lambda: step(single))


def row_wise(batch: Batch) -> Batch:
    """Return the same rows as K*N tasks of one instance, each with a copy of its instruction."""
    instances = batch.input_ids_KNS.shape[1]
    rows = {
        field: getattr(batch, field).flatten(0, 1).unsqueeze(1)
        for field in (
            "input_ids_KNS", "input_mask_KNS", "prompt_ids_KNS", "prompt_mask_KNS", "target_ids_KNT"
        )
    }  # fmt: skip
    copies = {
        field: getattr(batch, field).repeat_interleave(instances, 0)
        for field in ("instruction_ids_KI", "instruction_mask_KI", "slots_K")
    }
    names = {
        field: tuple(name for name in getattr(batch, field) for _ in range(instances))
        for field in ("tasks", "categories")
    }
    return replace(batch, **rows, **copies, **names)
