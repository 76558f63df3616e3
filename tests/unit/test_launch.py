"""What the driver shows of the metrics that workers write."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tagi_ray import history
from tagi_ray.config import Experiment
from tagi_ray.errors import ConfigError
from tagi_ray.launch import SPARE_CPUS, _check_capacity, _News, connect, progress_line
from tagi_ray.report import read_records
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
    assert read_records(path) == [RECORD, other]


def test_cut_texts_are_counted_for_a_person() -> None:
    assert "  cut 3 texts  " in progress_line({**RECORD, "cut_texts": 3})


def sized(tmp_path: Path, actors: int, **resources: int) -> Experiment:
    experiment = tiny_experiment(tmp_path, resources=resources)
    evaluation = experiment.evaluation.model_copy(update={"actors": actors})
    return experiment.model_copy(update={"evaluation": evaluation})


def test_capacity_counts_workers_and_evaluation_actors(tmp_path: Path) -> None:
    four = {"CPU": 4.0}
    _check_capacity(sized(tmp_path, 4), four)
    with pytest.raises(ConfigError, match=r"evaluation\.actors=5 needs 5 CPUs .* has 4"):
        _check_capacity(sized(tmp_path, 5), four)
    with pytest.raises(ConfigError, match=r"resources\.workers=2 needs 5 CPUs .* has 4"):
        _check_capacity(sized(tmp_path, 1, workers=2, cpus_per_worker=2), four)
    with pytest.raises(ConfigError, match=r"evaluation\.actors=2 needs 2 GPUs .* has 1"):
        _check_capacity(sized(tmp_path, 2, gpus_per_worker=1), {**four, "GPU": 1.0})


def started(monkeypatch: pytest.MonkeyPatch, experiment: Experiment) -> dict[str, object]:
    """What a local Ray is started with, which is not done."""
    asked: dict[str, object] = {}
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", lambda **settings: asked.update(settings))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    connect(experiment)
    return asked


def test_a_local_cluster_has_room_for_every_actor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = started(monkeypatch, sized(tmp_path, 5, cpus_per_worker=2))
    assert asked["num_cpus"] == 10 + SPARE_CPUS


def test_a_local_cluster_without_the_gpus_is_refused_before_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"needs 1 GPUs .* has 0"):
        started(monkeypatch, sized(tmp_path, 1, gpus_per_worker=1))
