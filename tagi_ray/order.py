"""Order in which groups are drawn: a pure function of (seed, position), for any number of workers.

A group is n instances of one bucket. Nothing here holds state that a resumed run would miss: every
draw is a hash of (seed, epoch, what is drawn), so the plan can be entered at any position.

Axes: P positions, B buckets, N instances in a group.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from tagi_ray.shards import SplitIndex

WINDOW = 4096
"""Buckets among which groups are mixed; reads stay in one stretch of the files at a time."""
KEPT_WINDOWS = 4
REACH = 2048
"""How far a group is moved to part it from its neighbour."""
PATIENCE = 64
"""Groups in a row that find no gap, before the rest of the window is left as it is."""

# One draw must not repeat another's: each purpose has its own salt.
_WINDOWS, _GROUPS, _JITTER, _TASKS, _INSTANCES = range(1, 6)


def hashed(*parts: int | np.ndarray) -> np.ndarray:
    """Mix integers, broadcast against each other, into uniform 64-bit hashes (splitmix64)."""
    with np.errstate(over="ignore"):
        state = np.zeros((), np.uint64)
        for part in parts:
            mixed = state + np.asarray(part).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = mixed ^ (mixed >> np.uint64(31))
    return state


def uniform(*parts: int | np.ndarray) -> np.ndarray:
    """Return draws in [0, 1) that depend on nothing but the parts."""
    return (hashed(*parts) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def rank_positions(start: int, stop: int, rank: int, world: int) -> np.ndarray:
    """Return the positions p in [start, stop) of a rank: those with p mod world = rank."""
    return np.arange(start + (rank - start) % world, stop, world, dtype=np.int64)


def micro_batches(positions: np.ndarray, micro_groups: int) -> Iterator[np.ndarray]:
    """Cut a rank's positions into micro-batches; only the last one may be shorter."""
    for start in range(0, len(positions), micro_groups):
        yield positions[start : start + micro_groups]


@dataclass(frozen=True, slots=True, eq=False)
class _Window:
    bucket: np.ndarray
    part: np.ndarray
    """Which group of its bucket."""


class _Cycle:
    """Endless order over some buckets: every group once per epoch."""

    def __init__(self, index: SplitIndex, buckets: np.ndarray, seed: int, instances: int) -> None:
        self._index, self._seed = index, seed
        self._buckets = [buckets[i : i + WINDOW] for i in range(0, len(buckets), WINDOW)]
        self._groups = -(-index.count.astype(np.int64) // instances)
        sizes = [int(self._groups[window].sum()) for window in self._buckets]
        self._sizes = np.asarray(sizes, np.int64)
        self.groups = int(self._sizes.sum())
        self._kept: dict[tuple[int, int], _Window] = {}

    def at(self, positions_P: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the bucket, the group of that bucket, and the epoch of each position."""
        epochs, places = np.divmod(positions_P, self.groups)
        bucket, part = np.empty_like(places), np.empty_like(places)
        for epoch in np.unique(epochs):
            drawn = hashed(self._seed, _WINDOWS, epoch, np.arange(len(self._sizes)))
            order = np.argsort(drawn, kind="stable")
            ends = np.cumsum(self._sizes[order])
            here = np.flatnonzero(epochs == epoch)
            turns = np.searchsorted(ends, places[here], side="right")
            for turn in np.unique(turns):
                chosen = here[turns == turn]
                window = self._window(int(epoch), int(order[turn]))
                inside = places[chosen] - (ends[turn] - self._sizes[order[turn]])
                bucket[chosen], part[chosen] = window.bucket[inside], window.part[inside]
        return bucket, part, epochs

    def _window(self, epoch: int, number: int) -> _Window:
        key = (epoch, number)
        if key not in self._kept:
            while len(self._kept) >= KEPT_WINDOWS:
                del self._kept[next(iter(self._kept))]
            self._kept[key] = self._draw(epoch, self._buckets[number])
        return self._kept[key]

    def _draw(self, epoch: int, buckets: np.ndarray) -> _Window:
        """Spread the groups of each task evenly over the window, in an order drawn per epoch."""
        repeats = self._groups[buckets]
        bucket = np.repeat(buckets, repeats)
        first = np.repeat(np.cumsum(repeats) - repeats, repeats)
        part = np.arange(len(bucket)) - first
        task = self._index.task[bucket].astype(np.int64)
        # j: place of a group among its task's m groups, drawn anew each epoch.
        by_task = np.lexsort((hashed(self._seed, _GROUPS, epoch, bucket, part), task))
        m = np.bincount(task)
        starts = np.cumsum(m) - m
        j = np.empty(len(bucket), np.int64)
        j[by_task] = np.arange(len(bucket)) - starts[task[by_task]]
        jitter = uniform(self._seed, _JITTER, epoch, bucket, part)
        shift = uniform(self._seed, _TASKS, epoch, task)
        order = np.argsort((j + 0.5 * jitter + shift) / m[task], kind="stable")
        order = order[_apart(task[order])]
        return _Window(bucket[order].astype(np.int64), part[order])


def _apart(task: np.ndarray) -> np.ndarray:
    """Return a permutation that parts equal neighbours, moving each to the nearest gap.

    Every move leaves one pair of equal neighbours less, so that it ends where none is left, or
    where a task has too many groups to be parted.
    """
    task, order = task.copy(), np.arange(len(task))
    moved = True
    while moved:
        moved, failures = False, 0
        for i in np.flatnonzero(task[1:] == task[:-1]) + 1:
            if failures == PATIENCE:
                break
            if task[i] != task[i - 1]:
                continue
            gap = _nearest_gap(task, int(i))
            failures = failures + 1 if gap is None else 0
            if gap is not None:
                _move(task, int(i), gap)
                _move(order, int(i), gap)
                moved = True
    return order


def _nearest_gap(task: np.ndarray, i: int) -> int | None:
    """Return where group i can stand between two groups of other tasks: before which group."""
    low, high = max(0, i - REACH), min(len(task), i + REACH)
    other = task[low:high] != task[i]
    left = np.concatenate(([low == 0 or task[low - 1] != task[i]], other))
    right = np.concatenate((other, [high == len(task) or task[high] != task[i]]))
    gaps = np.flatnonzero(left & right) + low
    return int(gaps[np.argmin(np.abs(gaps - i))]) if len(gaps) else None


def _move(array: np.ndarray, i: int, gap: int) -> None:
    """Take element i out and put it in again before the element that stood at `gap`."""
    if gap > i:
        array[i:gap] = np.roll(array[i:gap], -1)
    else:
        array[gap : i + 1] = np.roll(array[gap : i + 1], 1)


class OrderPlan:
    """Which group stands at each position of an endless run over one split.

    With `round_robin`, position p belongs to slot p mod (number of slots), and each slot goes
    through the groups of its own tasks in epochs of its own; tasks without a slot are left out.
    Otherwise `slots` labels the groups and changes nothing else.
    """

    def __init__(
        self,
        index: SplitIndex,
        seed: int,
        instances: int,
        slots: Mapping[str, int] | None = None,
        round_robin: bool = False,
    ) -> None:
        self.index, self.seed, self.instances = index, seed, instances
        names = slots or {}
        self._slot_of = np.asarray([names.get(task, -1) for task in index.tasks], np.int32)
        slot = self._slot_of[index.task] if len(index.task) else np.empty(0, np.int32)
        if round_robin:
            count = max(names.values(), default=-1) + 1
            members = [np.flatnonzero(slot == number) for number in range(count)]
        else:
            members = [np.arange(len(index.task))]
        empty = [number for number, buckets in enumerate(members) if len(buckets) == 0]
        if empty or not members:
            raise ValueError(f"no instances to draw from{f' in slots {empty}' if slots else ''}")
        self._cycles = [_Cycle(index, buckets, seed, instances) for buckets in members]
        counts = index.count[np.concatenate(members)].astype(np.int64)
        self.groups_per_epoch = sum(cycle.groups for cycle in self._cycles)
        self.wrapped_instances = int((-(-counts // instances) * instances - counts).sum())
        """Instances drawn a second time in each epoch, to fill the last group of a bucket."""

    def draw(
        self, positions_P: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return bucket [P], instance offsets [P, N], epoch [P] and slot [P]."""
        cycles = len(self._cycles)
        bucket, part, epoch = (np.empty(len(positions_P), np.int64) for _ in range(3))
        for number, cycle in enumerate(self._cycles):
            here = np.flatnonzero(positions_P % cycles == number)
            if len(here):
                bucket[here], part[here], epoch[here] = cycle.at(positions_P[here] // cycles)
        slot = self._slot_of[self.index.task[bucket]]
        return bucket, self._offsets(bucket, part, epoch), epoch, slot

    def _offsets(self, bucket: np.ndarray, part: np.ndarray, epoch: np.ndarray) -> np.ndarray:
        """Cut each bucket's permutation of this epoch into groups; the tail wraps to its start."""
        count = self.index.count[bucket].astype(np.int64)
        place = np.arange(int(count.max(initial=0)))
        drawn = hashed(self.seed, _INSTANCES, epoch[:, None], bucket[:, None], place)
        drawn = np.where(place < count[:, None], drawn >> np.uint64(1), np.uint64(2**64 - 1))
        permutation = np.argsort(drawn, axis=1, kind="stable")
        chosen = (part[:, None] * self.instances + np.arange(self.instances)) % count[:, None]
        return np.take_along_axis(permutation, chosen, axis=1)

    def table(self, positions_P: np.ndarray) -> pa.Table:
        """Return where the groups of some positions lie, one row each, in the given order."""
        bucket, offsets, epoch, slot = self.draw(positions_P)
        flat = pa.array(offsets.reshape(-1).astype(np.int16))
        return pa.table(
            {
                "position": positions_P,
                "epoch": epoch,
                "slot": slot.astype(np.int32),
                "file": self.index.file[bucket],
                "row_group": self.index.row_group[bucket],
                "row": self.index.row[bucket],
                "offsets": pa.FixedSizeListArray.from_arrays(flat, self.instances),
            }
        )
