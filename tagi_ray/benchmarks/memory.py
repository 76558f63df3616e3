"""Peak memory of a sharded finetuning, beside what the plan says of it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tagi_ray.benchmarks.measure import Row, row

if TYPE_CHECKING:  # torch would make `--help` slow
    from tagi_ray.config import Experiment

BASE = {
    "d_model": 768, "d_ff": 2048, "d_kv": 64, "heads": 12, "layers": 12, "vocabulary": 32128,
    "feed_forward": "gated-gelu", "tied_embeddings": False,
}  # fmt: skip
"""Shape of google/t5-base-lm-adapt."""
TINY = {**BASE, "d_model": 16, "d_ff": 16, "d_kv": 8, "heads": 2, "layers": 1, "vocabulary": 4096}
"""What a worker holds besides a model: Python, its libraries, and buffers of its own."""
GIB = 2**30


def rows(rounds: int) -> Iterator[Row]:
    """Peak memory of a worker that finetunes T5-base under ZeRO-3, beside the plan's estimate."""
    import ray

    from tagi_ray.plan import plan

    was_running = ray.is_initialized()
    measured, planned = list[float](), list[float]()
    with tempfile.TemporaryDirectory() as folder:
        try:
            for turn in range(min(rounds, 3)):
                storage = Path(folder) / str(turn)
                tiny, base = experiment(storage / "tiny", TINY), experiment(storage, BASE)
                measured.append((peak(base) - peak(tiny)) / GIB)
                estimates = [plan(one).stage("finetune").at(3).peak for one in (base, tiny)]
                planned.append((estimates[0] - estimates[1]) / GIB)
        finally:
            if not was_running:
                ray.shutdown()
    yield row("T5-base, finetune, ZeRO-3, 2 workers: planned as other", "GiB", measured, planned)


def experiment(storage: Path, architecture: Mapping[str, Any]) -> Experiment:
    """Return three finetuning steps with a random backbone and teachers on two workers."""
    from tagi_ray.config import Experiment

    stage = {"groups": 8, "micro_groups": 2, "instances": 2, "log_every": 1, "save_every": 0}
    lengths = {"instruction": 64, "input": 48, "prompt": 96, "target": 16}
    return Experiment.model_validate({
        "name": "memory",
        "storage": str(storage),
        "data": {f"max_{text}_tokens": length for text, length in lengths.items()},
        "backbone": {"path": "random", "architecture": architecture, "tokenizer": "train"},
        "teachers": {**stage, "per": "category"},
        "finetune": {**stage, "steps": 3, "valid_groups": 2},
        "resources": {"workers": 2, "zero_stage": 3},
    })  # fmt: skip


def peak(experiment: Experiment) -> float:
    """Run the finetuning, and return the most bytes that any of its workers held."""
    from tagi_ray import history
    from tagi_ray.cluster import connect
    from tagi_ray.launch import fit
    from tagi_ray.report import read_records
    from tagi_ray.shard_writer import write_shards
    from tagi_ray.stages import StageSpec
    from tagi_ray.vocabulary import prepare_tokenizer

    run = Path(experiment.storage).absolute() / experiment.name
    run.mkdir(parents=True)
    write_shards(experiment.data, run / "shards", seed=0, parallel=False)
    prepare_tokenizer(experiment.backbone, run / "shards", run / "tokenizer")
    _write_teachers(experiment, run)
    connect(experiment)
    spec = StageSpec(experiment, "finetune", run, experiment.seeds[0])
    fit(spec)
    return max(record["peak_memory"] for record in read_records(run / history.METRICS))


def _write_teachers(experiment: Experiment, run: Path) -> None:
    """Write untrained teachers, which take as much memory as trained ones."""
    from tagi_ray.footprint import meta_model
    from tagi_ray.shards import read_manifest
    from tagi_ray.stages import starting_bank
    from tagi_ray.teachers import FOLDERS, teacher_names, write_teachers

    manifest = read_manifest(run / "shards")
    names = teacher_names(manifest, "train", experiment.teachers.per)
    sites = meta_model(experiment, "finetune").backbone.sites
    write_teachers(
        run / FOLDERS["train"],
        starting_bank(sites, experiment, len(names)),
        names,
        experiment,
        role="train",
        steps=0,
        final_loss=0.0,
        manifest=manifest,
    )
