"""Ray Data writes the cache that one process writes, and training reads it; tuned teachers shard."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tagi_ray.batches import iterate_batches, local_batches
from tagi_ray.config import Experiment
from tagi_ray.errors import AdapterError
from tagi_ray.order import OrderPlan
from tagi_ray.report import read_records
from tagi_ray.shards import read_manifest
from tagi_ray.stages import build_stage
from tagi_ray.teacher_logits import folder_of, write_teacher_logits
from tagi_ray.teachers import FOLDERS
from tagi_ray.train_loop import Worker, run_stage
from tagi_ray.tuned_teacher import pinned_teachers
from tests.ray.ranks import on_ranks
from tests.tiny_run import stage_of, tiny_experiment, tiny_run, write_random_teachers

CACHED = {"logits": "cached", "top_k": 8, "temperature": 2.0}


def experiment_of(storage: Path, resources: dict[str, Any], **distillation: Any) -> Experiment:
    base = tiny_experiment(storage, taught=True, steps=4, log_every=1, save_every=0)
    values = base.model_dump(mode="json")
    return Experiment.model_validate(
        {**values, "resources": resources, "distillation": distillation}
    )


@pytest.fixture(scope="module")
def run(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with teachers, whose cache two actors have written."""
    experiment = experiment_of(tmp_path_factory.mktemp("storage"), {"workers": 2}, **CACHED)
    run = tiny_run(experiment)
    write_random_teachers(experiment, run)
    write_teacher_logits([experiment], run)
    return run


def test_ray_writes_what_one_process_writes(run: Path, tmp_path: Path) -> None:
    experiment = experiment_of(run.parent, {"workers": 1}, **CACHED)
    folder = folder_of(experiment, run)  # not that of other workers: there is only one
    assert folder is not None
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("teacher_logits"))
    write_teacher_logits([experiment], tmp_path / "run", parallel=False)
    alone = folder_of(experiment, tmp_path / "run")
    assert alone is not None
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert files == sorted(p.relative_to(alone) for p in alone.rglob("*") if p.is_file())
    assert len(files) > 2
    for file in files:
        if file.suffix == ".parquet":
            assert pq.read_table(folder / file).equals(pq.read_table(alone / file)), file


def test_finetuning_reads_batches_with_the_teacher_from_ray_data(run: Path) -> None:
    experiment = experiment_of(run.parent, {"workers": 1}, **CACHED)
    plan = OrderPlan(read_manifest(run / "shards").splits["train"], 0, 2)
    arguments = (run / "shards", plan, run / "tokenizer", experiment.data)
    fields: dict[str, Any] = {
        "start_position": 5, "stop_position": 90, "micro_groups": 3, "rank": 1, "world": 2,
        "parts": ("input", "teacher"), "teacher_folder": folder_of(experiment, run),
    }  # fmt: skip
    streamed = list(iterate_batches(*arguments, **fields))
    local = list(local_batches(*arguments, **fields))
    for a, b in zip(local, streamed, strict=True):
        for name in ("teacher_ids_KNTC", "teacher_logp_KNTC", "target_ids_KNT"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert any(batch.teacher_ids_KNTC.any() for batch in local)
    spec = stage_of(experiment, run, "finetune")
    run_stage(spec, Worker(batches=iterate_batches))
    records = [r for r in read_records(run / "metrics.jsonl") if r["stage"] == spec.name]
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert all(record["kl"] > 0 for record in records)


def test_what_a_person_can_cure_keeps_its_words(run: Path, tmp_path: Path) -> None:
    experiment = experiment_of(tmp_path, {"workers": 1}, **CACHED)
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("teacher_logits"))
    weights = next((tmp_path / "run" / FOLDERS["train"]).rglob("adapter_model.safetensors"))
    weights.write_bytes(b"")
    with pytest.raises(AdapterError, match="train the teachers again"):
        write_teacher_logits([experiment], tmp_path / "run")
    folder = folder_of(experiment, tmp_path / "run")
    assert folder is not None
    assert not folder.exists()


@dataclass(frozen=True)
class Case:
    """A finetuning with a tuned teacher, in a run of its own."""

    zero_stage: int


def taught(folder: Path, case: Case) -> dict[str, Tensor]:
    """Train a few steps; return the losses, and how much of the teacher this rank held."""
    world, rank = dist.get_world_size(), dist.get_rank()
    experiment = experiment_of(
        folder,
        {"workers": world, "zero_stage": case.zero_stage},
        checkpoint=str(folder / "tuned"),
    )
    run = folder / f"stage_{case.zero_stage}_on_{world}"
    if rank == 0:
        shutil.copytree(folder / "prepared", run)
    dist.barrier()
    spec = stage_of(experiment, run, "finetune")
    stage = build_stage(spec, torch.device("cpu"))
    engine: Any = stage.engine
    parameters = list(engine._engine.module.model.teacher.parameters())
    held = sum(getattr(p, "ds_tensor", p).numel() for p in parameters)
    whole = sum(getattr(p, "ds_numel", p.numel()) for p in parameters)
    stage.engine.close()
    run_stage(spec, Worker(rank, world))
    dist.barrier()
    records = read_records(run / "metrics.jsonl")
    return {
        "held": torch.tensor([held, whole]),
        **{k: torch.tensor([record[k] for record in records]) for k in ("loss", "kl")},
    }


@pytest.mark.slow
def test_a_tuned_teacher_is_sharded_at_stage_3_and_says_the_same(tmp_path: Path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(3)
    config = T5Config(
        vocab_size=576, d_model=16, d_ff=16, d_kv=8, num_heads=2, num_layers=1, dropout_rate=0.0,
        pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "tuned")
    experiment = experiment_of(tmp_path, {}, checkpoint=str(tmp_path / "tuned"))
    run = tiny_run(experiment)
    write_random_teachers(experiment, run)
    pinned_teachers(experiment, run)
    run.rename(tmp_path / "prepared")
    (expected,) = on_ranks(1, tmp_path, taught, [Case(0)])
    assert expected["kl"].min() > 1e-4
    for case, result in zip((2, 3), on_ranks(2, tmp_path, taught, [Case(2), Case(3)]), strict=True):
        for name in ("loss", "kl"):
            torch.testing.assert_close(result[name], expected[name], rtol=1e-4, atol=0)
        held, whole = result["held"].tolist()
        assert whole / 2 <= held < whole / 2 * 1.05 if case == 3 else held == whole
