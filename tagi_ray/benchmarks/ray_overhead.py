"""The training loop on a Ray Train worker, beside the same loop without Ray."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tagi_ray.benchmarks.measure import Row, row

if TYPE_CHECKING:  # torch would make `--help` slow
    from tagi_ray.config import Experiment
    from tagi_ray.stages import StageSpec

STEPS = 10
SETTLED = slice(2, -1)
"""Steps that count: the first ones fill caches, the last one also validates and saves."""


def rows(rounds: int) -> Iterator[Row]:
    """Training steps of the loop under Ray Train and Ray Data, or in one process without Ray."""
    import ray

    was_running = ray.is_initialized()
    with tempfile.TemporaryDirectory() as folder:
        try:
            yield from overhead_rows("L", experiment(Path(folder)), rounds)
        finally:
            if not was_running:
                ray.shutdown()


def experiment(storage: Path) -> Experiment:
    """Return a finetuning of shape L on the synthetic tasks, without teachers."""
    from tagi_ray.config import Experiment

    architecture = {
        "d_model": 512, "d_ff": 2048, "d_kv": 64, "heads": 8, "layers": 6, "vocabulary": 32128
    }  # fmt: skip
    backbone = {"path": "random", "architecture": architecture, "tokenizer": "train"}
    finetune = {"groups": 4, "micro_groups": 4, "instances": 4, "valid_groups": 1}
    return Experiment.model_validate({
        "name": "ray_overhead",
        "storage": str(storage),
        "backbone": backbone,
        "teachers": {"enabled": False},
        "finetune": {**finetune, "steps": STEPS, "log_every": 1, "save_every": 0},
    })  # fmt: skip


def overhead_rows(name: str, experiment: Experiment, rounds: int) -> Iterator[Row]:
    """Train a stage from its start, once on each side in each round, in turns.

    A step's time is what the loop itself writes down. Of a round the median of its settled steps
    counts. The rest of a round, from the call to its end, is told as what it takes to start.
    """
    import torch

    from tagi_ray.cluster import connect
    from tagi_ray.launch import fit
    from tagi_ray.shard_writer import write_shards
    from tagi_ray.stages import StageSpec
    from tagi_ray.train_loop import Worker, run_stage
    from tagi_ray.vocabulary import prepare_tokenizer

    run = Path(experiment.storage).absolute() / experiment.name
    run.mkdir(parents=True)
    write_shards(experiment.data, run / "shards", seed=0, parallel=False)
    prepare_tokenizer(experiment.backbone, run / "shards", run / "tokenizer")
    spec = StageSpec(experiment, "finetune", run, experiment.seeds[0])
    connect(experiment)
    threads = torch.get_num_threads()
    torch.set_num_threads(experiment.resources.cpus_per_worker)  # as on a worker
    sides = {"ours": fit, "other": lambda one: run_stage(one, Worker())}
    steps = {side: list[float]() for side in sides}
    starts = {side: list[float]() for side in sides}
    losses: set[str] = set()
    try:
        for turn in range(rounds + 1):
            for side in sorted(sides, reverse=turn % 2 == 0):
                own = replace(spec, run_folder=_sibling(run, f"{side}_{turn}"))
                started = time.perf_counter()
                sides[side](own)
                taken = time.perf_counter() - started
                records = step_records(own)
                losses.add(str([f"{record['loss']:.4g}" for record in records]))
                times = [record["step_time"] for record in records]
                if turn:  # the first round warms up
                    steps[side].append(statistics.median(times[SETTLED]))
                    starts[side].append(taken - sum(times))
    finally:
        torch.set_num_threads(threads)
    if len(losses) > 1:
        raise RuntimeError(f"{name}: the two sides came to losses {sorted(losses)}")
    yield row(f"{name}: step", "wall s", steps["ours"], steps["other"])
    yield row(f"{name}: start and end", "wall s", starts["ours"], starts["other"])


def _sibling(run: Path, name: str) -> Path:
    """Return a run folder with the same shards and tokenizer, in which nothing was trained yet."""
    folder = run.with_name(name)
    folder.mkdir()
    for part in ("shards", "tokenizer"):
        (folder / part).symlink_to(run / part)
    return folder


def step_records(spec: StageSpec) -> list[dict[str, float]]:
    """Return the records of a finished stage, one for each step."""
    from tagi_ray import history
    from tagi_ray.report import read_records

    return read_records(spec.run_folder / history.METRICS)
