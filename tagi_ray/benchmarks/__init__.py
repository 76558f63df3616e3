"""What the project's own ways cost beside the best straightforward alternative.

A benchmark is a function in `BENCHMARKS` that yields rows, most of them through `measure`: both
sides of a case do the same work and say what came out of it, and are timed only after these agree.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from tagi_ray.benchmarks import (
    distillation,
    generation,
    ingest,
    memory,
    ray_overhead,
    sweep,
    teachers,
    train_step,
)
from tagi_ray.benchmarks.measure import ROUNDS, Row, machine, table

__all__ = ["BENCHMARKS", "run", "summaries", "table"]

BENCHMARKS: dict[str, Callable[[int], Iterator[Row]]] = {
    "train_step": train_step.rows,
    "generation": generation.rows,
    "ray_overhead": ray_overhead.rows,
    "ingest": ingest.rows,
    "memory": memory.rows,
    "distillation": distillation.rows,
    "sweep": sweep.rows,
    "teachers": teachers.rows,
}
"""By the name that `jobs/benchmark.py` takes; the docstring's first line is its summary."""


def run(name: str, storage: Path = Path("runs"), rounds: int = ROUNDS) -> tuple[list[Row], Path]:
    """Run a benchmark, and return its rows and the JSON file that holds them."""
    path = storage / "benchmark" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = list(BENCHMARKS[name](rounds))
    result = {"name": name, "machine": machine(), "rows": [asdict(row) for row in rows]}
    path.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    return rows, path


def summaries() -> str:
    """Return the benchmarks' names, each with what it compares, a line each."""
    width = max(map(len, BENCHMARKS))
    firsts = {name: (made.__doc__ or "").splitlines()[0] for name, made in BENCHMARKS.items()}
    return "\n".join(f"  {name:<{width}}  {first}" for name, first in firsts.items())
