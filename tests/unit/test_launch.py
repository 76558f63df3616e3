"""What the driver shows of the metrics that workers write."""

from __future__ import annotations

import json
import os
from pathlib import Path

from tagi_ray import history
from tagi_ray.launch import _News, progress_line
from tagi_ray.stages import StageSpec
from tests.tiny_run import tiny_experiment

RECORD = {
    "stage": "finetune_tagi", "seed": 1, "variant": "tagi", "steps": 2000, "step": 50,
    "loss": 1.23456, "kl": 0.5, "valid_loss": 2.0, "grad_norm": 0.123, "learning_rate": 3e-4,
    "tokens_per_second": 12345.6, "step_time": 0.1, "data_wait": 0.031, "seconds_left": 125.4,
}  # fmt: skip


def write(path: Path, *records: dict) -> None:
    """Write a metrics file, with a time of change that differs from the last one's."""
    before = path.stat().st_mtime if path.exists() else 0.0
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    os.utime(path, (before + 1, before + 1))


def test_a_record_is_one_line_for_a_person() -> None:
    assert progress_line(RECORD) == (
        "finetune_tagi seed 1  step 50/2000  loss 1.2346  kl 0.5000  valid 2.0000  lr 3.00e-04"
        "  norm 0.12  12,346 tokens/s  data wait 3%  left 2:05"
    )


def test_only_what_is_new_is_shown_even_when_the_file_is_rewritten(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    one, two = RECORD, {**RECORD, "step": 100}
    write(path, one, two)
    news = _News(path)
    assert list(news.read()) == []
    write(path, one)
    assert list(news.read()) == []
    again = {**two, "tokens_per_second": 1.0}
    write(path, one, again)
    assert list(news.read()) == [again]
    assert list(news.read()) == []


def test_records_beyond_the_checkpoint_are_dropped_and_others_kept(tmp_path: Path) -> None:
    spec = StageSpec(tiny_experiment(tmp_path), "finetune", tmp_path, 1)
    path = tmp_path / history.METRICS
    late, other = {**RECORD, "step": 100}, {**RECORD, "step": 100, "seed": 2}
    write(path, RECORD, late, other)
    with path.open("a") as file:
        file.write('{"stage": "fine')
    history.cut(spec, 50)
    assert history.read(path) == [RECORD, other]
