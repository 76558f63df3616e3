"""Raw text to a finetuned hypernetwork, by the jobs themselves, on one worker and sharded over two."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tagi_ray.corpus import hash_of, split_of
from tagi_ray.report import read_records

pytestmark = [pytest.mark.ray, pytest.mark.slow]
ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "tests" / "recipes" / "tiny.yaml"
WORDS = ("red", "dog", "and", "its", "old", "friend", "run", "over", "the", "field", "water", "a")


SHARDED = ("resources.workers=2", "resources.zero_stage=3",
           "teachers.micro_groups=23", "oracle.micro_groups=10")  # fmt: skip


def settings(folder: Path) -> list[str]:
    return [
        "evaluation.systems=[tagi]", "teachers.enabled=false",
        "pretrain.enabled=true", f"pretrain.path={folder / 'texts'}", "pretrain.max_tokens=24",
        "pretrain.steps=6", "pretrain.groups=4", "pretrain.micro_groups=2", "pretrain.log_every=2",
        "pretrain.valid_every=3", "pretrain.optimizer.learning_rate=0.003",
    ]  # fmt: skip


def job(name: str, folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, ROOT / "jobs" / f"{name}.py", RECIPE, *settings(folder),
         f"storage={folder}", *more],
        capture_output=True, text=True, cwd=folder, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def losses(run: Path, stage: str) -> dict[int, dict[str, float]]:
    return {
        record["step"]: {key: record[key] for key in ("loss", "valid_loss") if key in record}
        for record in read_records(run / "metrics.jsonl")
        if record["stage"] == stage
    }


@pytest.mark.timeout(900)
def test_pretraining_and_then_finetuning(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    texts = [
        " ".join(WORDS[(n * k) % 12] for k in range(1, 5 + n % 30)) + f" {n}" for n in range(900)
    ]
    held_out = [text for text in texts if split_of(hash_of(text)) == "valid"]
    lines = [json.dumps({"text": text}) + "\n" for text in [*held_out[:5], *texts]]
    (tmp_path / "texts" / "1.jsonl").write_text("".join(lines[:20]))
    (tmp_path / "texts" / "2.jsonl.gz").write_bytes(gzip.compress("".join(lines[20:]).encode()))
    done = job("pretrain", tmp_path, *SHARDED)
    run = tmp_path / "tiny"
    assert f"checkpoints in {run}/seed_0/pretrain_tagi/checkpoints" in done.stdout
    assert "corpus: 24 texts, 5 more to validate on, 0 too short" in done.stdout
    assert {record["stage"] for record in read_records(run / "metrics.jsonl")} == {"pretrain_tagi"}
    before = losses(run, "pretrain_tagi")
    assert sorted(before) == [2, 3, 4, 6]

    done = job("finetune", tmp_path, *SHARDED)
    assert "corpus:" not in done.stdout
    assert losses(run, "pretrain_tagi") == before
    assert sorted(losses(run, "finetune_tagi")) == [2, 4, 6]
    assert (run / "scores.json").exists()

    # One command does both, and on one worker with nothing sharded gives the same losses.
    job("finetune", tmp_path, "name=alone")
    for stage in ("pretrain_tagi", "finetune_tagi"):
        alone = losses(tmp_path / "alone", stage)
        for step, expected in losses(run, stage).items():
            assert alone[step] == pytest.approx(expected, rel=1e-4), (stage, step)
