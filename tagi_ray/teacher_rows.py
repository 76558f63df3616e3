"""What one teacher reads: the instances of its tasks as tokens, in an order of its own.

A teacher has few instances and reads them many times: each is tokenised once, in memory. What it
reads in its step t depends on its seed, its tasks and t alone, not on who is trained beside it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tagi_ray.batches import IGNORED, READ
from tagi_ray.errors import DataError
from tagi_ray.groups import Part, TextGroup, definition_choice, reference_choice, tokenise
from tagi_ray.order import OrderPlan
from tagi_ray.prompts import render_instruction
from tagi_ray.sections import DataSettings
from tagi_ray.shards import ShardTask, Split, SplitIndex, read_manifest, read_task
from tagi_ray.tasks import Instance
from tagi_ray.vocabulary import TextTokenizer

AHEAD = 64
"""Steps that are drawn and tokenised at a time."""


class Row(NamedTuple):
    """One instance as tokens."""

    source: np.ndarray
    target: np.ndarray

    @property
    def tokens(self) -> int:
        """Tokens of both."""
        return len(self.source) + len(self.target)


class _Variant(NamedTuple):
    """An instance as it is read once: places of task, instance, definition and reference."""

    task: int
    instance: int
    definition: int
    reference: int


class TeacherRows:
    """The rows of one teacher: those of each step, and those held out for validation."""

    def __init__(
        self,
        tasks: Sequence[ShardTask],
        tokenizer: TextTokenizer,
        data: DataSettings,
        *,
        prompt: Literal["full", "input"],
        instances: int,
        seed: int,
        valid_fraction: float = 0.1,
        valid_instances: int = 16,
    ) -> None:
        """instances: n of one task in each step; the tasks take turns as in any other stage.

        valid_fraction: share of the instances that is held out, but at most `valid_instances` and
        none of a few. Raises DataError without an instance.
        """
        self.instances = instances
        self._tasks, self._tokenizer, self._data, self._seed = tasks, tokenizer, data, seed
        self._part: Part = READ[prompt]
        self._rows: dict[_Variant, Row] = {}
        self._steps: dict[int, list[_Variant]] = {}
        held = held_out(tasks, valid_fraction, valid_instances)
        self._kept = [
            [place for place in range(len(one.instances)) if (number, place) not in held]
            for number, one in enumerate(tasks)
        ]
        counts = np.asarray([len(places) for places in self._kept], np.int32)
        if not counts.sum():
            names = ", ".join(one.task.name for one in tasks)
            raise DataError(f"the teacher of {names or 'no task'} has no instance to learn from")
        names = tuple(one.task.name for one in tasks)
        none, all_tasks = np.zeros(len(tasks), np.int32), np.arange(len(tasks), dtype=np.int32)
        index = SplitIndex((), names, none, none, none, all_tasks, none, counts)
        self._plan = OrderPlan(index, seed, instances)
        self.valid = self._tokenised([_Variant(*places, 0, 0) for places in sorted(held)])

    def of_step(self, step: int) -> list[Row]:
        """Return the n rows of a step, counted from 0."""
        if step not in self._steps:
            self._steps = self._drawn(step - step % AHEAD)
        return [self._rows[variant] for variant in self._steps[step]]

    def _drawn(self, first: int) -> dict[int, list[_Variant]]:
        steps = np.arange(first, first + AHEAD)
        drawn = zip(*(part.tolist() for part in self._plan.draw(steps)), strict=True)
        found = {
            step: [self._variant(step, task, place, epoch) for place in places]
            for step, (task, places, epoch, _) in zip(steps.tolist(), drawn, strict=True)
        }
        self._tokenised([variant for variants in found.values() for variant in variants])
        return found

    def _variant(self, step: int, task: int, place: int, epoch: int) -> _Variant:
        kept = self._kept[task][place]
        one, instance = self._tasks[task].task, self._tasks[task].instances[kept]
        definitions, references = len(one.definitions), len(instance.outputs)
        return _Variant(
            task,
            kept,
            definition_choice(self._seed, one.name, step, definitions),
            reference_choice(self._seed, instance.id, epoch, references),
        )

    def _tokenised(self, variants: Sequence[_Variant]) -> list[Row]:
        missing = [v for v in dict.fromkeys(variants) if v not in self._rows]
        if missing:
            groups = [self._group(variant) for variant in missing]
            table = tokenise(groups, self._tokenizer, self._data, (self._part,))
            sources, targets = table[self._part].to_pylist(), table["target"].to_pylist()
            for variant, [source], [target] in zip(missing, sources, targets, strict=True):
                self._rows[variant] = Row(
                    np.asarray(source, np.int32), np.asarray(target, np.int32)
                )
        return [self._rows[variant] for variant in variants]

    def _group(self, variant: _Variant) -> TextGroup:
        one = self._tasks[variant.task]
        instance = one.instances[variant.instance]
        return TextGroup(
            task=one.task.name,
            category=one.task.category,
            definition=one.task.definitions[variant.definition],
            examples=one.task.positive_examples,
            inputs=(instance.input,),
            targets=(instance.outputs[variant.reference].strip(),),
        )


def held_out(tasks: Sequence[ShardTask], fraction: float, most: int) -> set[tuple[int, int]]:
    """Return which instances validate: places of task and instance, drawn by a hash of the latter."""

    def drawn(task: str, instance: Instance) -> bytes:
        return hashlib.blake2b(f"valid/{task}/{instance.id}".encode(), digest_size=8).digest()

    order = sorted(
        (drawn(one.task.name, instance), number, place)
        for number, one in enumerate(tasks)
        for place, instance in enumerate(one.instances)
    )
    count = min(int(fraction * len(order)), most)
    return {(number, place) for _, number, place in order[:count]}


def read_tasks(shards_folder: Path, split: Split, names: Sequence[str]) -> list[ShardTask]:
    """Return the named tasks of a split with their instances."""
    index = read_manifest(shards_folder).splits[split]
    return [read_task(shards_folder, index, name) for name in names]


def text_length(
    tasks: Sequence[ShardTask], prompt: Literal["full", "input"], data: DataSettings
) -> float:
    """Return the characters of a teacher's mean row: teachers of like length are padded least.

    A queue in this order, the longest first, also ends with its shortest teachers.
    """
    means: list[float] = []
    for one in tasks:
        texts = [len(i.input) + len(i.outputs[0]) for i in one.instances]
        shown = (one.task.definitions[0], one.task.positive_examples, data.prompt)
        instruction = len(render_instruction(*shown)) if prompt == "full" else 0
        means.append(instruction + (fmean(texts) if texts else 0.0))
    return fmean(means)


def forwards(
    tokens_K: Sequence[int], instances: int, forward_tokens: int, most_tokens: int
) -> list[list[int]]:
    """Divide slots among forwards so that tokens, and forwards at their own cost, are fewest.

    tokens_K: the longest row of each slot, to which its forward pads all of its rows. No forward
    has more than `most_tokens` in all, but for one of a single slot. A forward's slots are in their
    order.
    """
    order = sorted(range(len(tokens_K)), key=lambda k: -tokens_K[k])
    best: list[tuple[int, int]] = [(0, 0)]
    """Of the first slots in that order: the least cost, and where the last forward begins."""
    for stop in range(1, len(order) + 1):
        choices: list[tuple[int, int]] = []
        for start in reversed(range(stop)):
            tokens = (stop - start) * instances * tokens_K[order[start]]
            if tokens > most_tokens and choices:
                break
            choices.append((best[start][0] + tokens + forward_tokens, start))
        best.append(min(choices))
    groups: list[list[int]] = []
    stop = len(order)
    while stop:
        start = best[stop][1]
        groups.append(sorted(order[start:stop]))
        stop = start
    return groups


def padded(rows_GN: Sequence[Sequence[Row]]) -> tuple[Tensor, Tensor, Tensor]:
    """Return source ids and mask, both [G, N, S], and target ids [G, N, T]."""
    rows = [row for rows_N in rows_GN for row in rows_N]
    ids = np.zeros((len(rows), max(len(row.source) for row in rows)), np.int64)
    mask = np.zeros(ids.shape, np.bool_)
    targets = np.full((len(rows), max(len(row.target) for row in rows)), IGNORED, np.int64)
    for number, row in enumerate(rows):
        ids[number, : len(row.source)] = row.source
        mask[number, : len(row.source)] = True
        targets[number, : len(row.target)] = row.target
    shape = len(rows_GN), len(rows_GN[0])
    ids_GNS, mask_GNS, targets_GNT = (
        torch.from_numpy(array).unflatten(0, shape) for array in (ids, mask, targets)
    )
    return ids_GNS, mask_GNS, targets_GNT


def even(rows_GN: Sequence[Sequence[Row]]) -> list[list[Row]]:
    """Give all slots as many rows, with some that have no target and so no loss."""
    most = max(map(len, rows_GN))
    empty = Row(np.zeros(1, np.int32), np.zeros(0, np.int32))
    return [[*rows_N, *[empty] * (most - len(rows_N))] for rows_N in rows_GN]


def target_tokens(rows_GN: Sequence[Sequence[Row]]) -> list[int]:
    """Return the target tokens of each slot's rows, [G]."""
    return [sum(len(row.target) for row in rows_N) for rows_N in rows_GN]
