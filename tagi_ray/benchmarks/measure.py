"""Timing two ways of doing the same work, and the rows that say what came of it."""

from __future__ import annotations

import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROUNDS = 9
WARM_UP = 2
TOLERANCE = 1e-4
"""Relative difference up to which the results of the two sides are the same."""
CLOCKS: dict[str, Callable[[], float]] = {"CPU s": time.process_time, "wall s": time.perf_counter}
"""Unit -> clock. CPU seconds are those of this process, over all its threads."""


@dataclass(frozen=True, slots=True)
class Case:
    """The same work done in our way and in another."""

    name: str
    ours: Callable[[], float]
    """Does the work once, and returns a number that tells whether it was the same work."""
    other: Callable[[], float]
    pieces: int = 1
    """What the time is divided by: adapters, say."""


@dataclass(frozen=True, slots=True)
class Row:
    """What one case cost by one clock."""

    case: str
    unit: str
    ours: float
    """Median over the rounds."""
    other: float
    ratio: float
    """Median of the rounds' other / ours: how many times faster ours is."""
    iqr: float
    """Interquartile range of the rounds' ratios."""


def measure(case: Case, rounds: int = ROUNDS) -> Iterator[Row]:
    """Time both sides of a case in turns, so that a slow moment of the machine meets both.

    Raises RuntimeError when the two sides do not come to the same result.
    """
    for _ in range(WARM_UP):
        ours, other = case.ours(), case.other()
        if not math.isclose(ours, other, rel_tol=TOLERANCE):
            raise RuntimeError(f"{case.name}: ours came to {ours}, the other side to {other}")
    sides = {"ours": case.ours, "other": case.other}
    spent = {(side, unit): list[float]() for side in sides for unit in CLOCKS}
    for turn in range(rounds):
        for side in sorted(sides, reverse=turn % 2 == 0):
            started = {unit: clock() for unit, clock in CLOCKS.items()}
            sides[side]()
            for unit, clock in CLOCKS.items():
                spent[side, unit].append((clock() - started[unit]) / case.pieces)
    for unit in CLOCKS:
        yield row(case.name, unit, spent["ours", unit], spent["other", unit])


def row(case: str, unit: str, ours: Sequence[float], other: Sequence[float]) -> Row:
    """Return the row of some rounds, of which each side has one value."""
    ratios = [theirs / mine for mine, theirs in zip(ours, other, strict=True)]
    low, high = ratios[0], ratios[0]
    if len(ratios) > 1:
        low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Row(
        case=case,
        unit=unit,
        ours=statistics.median(ours),
        other=statistics.median(other),
        ratio=statistics.median(ratios),
        iqr=high - low,
    )


def table(rows: list[Row]) -> str:
    """Return the rows as text, a line each."""
    width = max(len(one.case) for one in rows)
    unit = max(len(one.unit) for one in rows)
    lines = [f"{'case':<{width}}  {'unit':<{unit}}     ours     other  other/ours    iqr"]
    lines += [
        f"{one.case:<{width}}  {one.unit:<{unit}}  {one.ours:>7.4g}  {one.other:>8.4g}"
        f"  {one.ratio:>10.3f}  {one.iqr:>5.3f}"
        for one in rows
    ]
    return "\n".join(lines)


def machine() -> str:
    """Return the processor, the cores and threads at hand, and the versions that matter."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return (
        f"{_processor()}, {cores} cores, {torch.get_num_threads()} threads, {platform.system()},"
        f" Python {platform.python_version()}, torch {torch.__version__}"
    )


def _processor() -> str:
    """Return the processor's name, which Linux tells in a file alone."""
    lines = Path("/proc/cpuinfo")
    if lines.exists():
        for line in lines.read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
