"""Loggers beside real training: they hold what metrics.jsonl holds, and can't stop it."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tagi_ray import checkpoint, history
from tagi_ray.config import Experiment
from tagi_ray.errors import TrainingError
from tagi_ray.launch import fit
from tagi_ray.report import read_records
from tests.logged import closed_port, mlflow_runs, scalars, warnings_in
from tests.tiny_run import stage_of, tiny_experiment, tiny_run

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]


def asking(storage: Path, *loggers: str) -> Experiment:
    return tiny_experiment(storage).model_copy(update={"loggers": loggers})


def in_metrics(run: Path) -> dict[str, list[tuple[int, float]]]:
    """What metrics.jsonl holds, named as loggers name it."""
    found: dict[str, list[tuple[int, float]]] = {}
    for record in read_records(run / history.METRICS):
        for name in record.keys() - {"stage", "seed", "variant", "step", "steps"}:
            key = f"{record['stage']}/seed_{record['seed']}/{name}"
            found.setdefault(key, []).append((record["step"], record[name]))
    return found


def without_speeds(metrics: dict[str, list[tuple[int, float]]]) -> dict:
    speeds = ("tokens_per_second", "step_time", "data_wait", "seconds_left", "peak_memory")
    return {name: points for name, points in metrics.items() if not name.endswith(speeds)}


@pytest.mark.timeout(240)
def test_loggers_hold_the_metrics_of_one_run_over_stages_and_restarts(tmp_path: Path) -> None:
    experiment = asking(tmp_path, "tensorboard", "mlflow")
    run = tiny_run(experiment)
    finetune = stage_of(experiment, run, "finetune")
    fit(finetune)
    assert len(in_metrics(run)["finetune_tagi/seed_0/loss"]) == 4
    ((first, status, params, logged),) = mlflow_runs(run)
    assert logged == in_metrics(run)
    assert status == "FINISHED"
    assert params["finetune.optimizer.learning_rate"] == "0.003"

    # Its last checkpoint is lost, so that the stage goes on from an earlier one; then another one.
    newest = checkpoint.latest(finetune.checkpoints)
    assert newest is not None
    shutil.rmtree(newest)
    fit([finetune, stage_of(experiment, run, "metatrain")])
    ((again, _, _, logged),) = mlflow_runs(run)
    assert again == first
    expected = without_speeds(in_metrics(run))
    assert {name.split("/")[0] for name in expected} == {"finetune_tagi", "metatrain_0.003"}
    assert without_speeds(logged) == expected
    rounded = without_speeds(scalars(run))
    assert rounded.keys() == expected.keys()
    for name, points in expected.items():
        steps, values = zip(*points, strict=True)
        assert tuple(step for step, _ in rounded[name]) == steps
        assert [value for _, value in rounded[name]] == pytest.approx(values, rel=1e-6)  # float32
    assert warnings_in(run) == []


@pytest.mark.timeout(240)
def test_broken_loggers_are_a_warning_each_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("tagi_ray.tracking._told", set())
    port = closed_port()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")  # no machine has its key
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    experiment = asking(tmp_path, "tensorboard", "mlflow", "wandb")
    run = tiny_run(experiment)
    (run / "tensorboard").write_text("no folder")
    with caplog.at_level(logging.WARNING, logger="tagi_ray"):
        fit(stage_of(experiment, run, "finetune"))
        fit(stage_of(experiment, run, "metatrain"))
    steps = [(r["stage"], r["step"]) for r in read_records(run / history.METRICS)]
    stages = ("finetune_tagi", "metatrain_0.003")
    assert steps == [(stage, step) for stage in stages for step in (2, 4, 6, 8)]
    told = [one.message for one in caplog.records if one.message.startswith("the logger")]
    assert sorted(line.split()[2] for line in told) == ["mlflow", "tensorboard", "wandb"]
    assert all("failed (" in line for line in told), told
    assert all(cure in "\n".join(told) for cure in ("MLFLOW_TRACKING_URI", "Set WANDB_API_KEY"))


def test_a_failed_training_is_a_failed_run_and_becomes_a_finished_one(tmp_path: Path) -> None:
    experiment = asking(tmp_path, "mlflow")
    run = tiny_run(experiment)
    good = stage_of(experiment, run, "metatrain")
    with pytest.raises(TrainingError, match="lower the rate"):
        fit([stage_of(experiment, run, "finetune"), replace(good, learning_rate=1e30)])
    ((first, status, _, _),) = mlflow_runs(run)
    assert status == "FAILED"
    fit(good)
    ((again, status, _, logged),) = mlflow_runs(run)
    assert (again, status) == (first, "FINISHED")
    assert logged == in_metrics(run)
