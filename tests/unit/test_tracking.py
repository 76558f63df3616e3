"""Loggers: what they get equals metrics.jsonl, whatever restarts a run and whatever breaks."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tagi_ray import loggers, tracking
from tagi_ray.errors import ConfigError
from tagi_ray.history import METRICS
from tagi_ray.loggers import Run, flat_settings, require_packages
from tagi_ray.pipeline import open_run
from tagi_ray.tracking import Feed, Warnings
from tests.logged import closed_port, mlflow_runs, scalars, warnings_in
from tests.tiny_run import tiny_experiment

STAGE = "finetune_tagi/seed_1"
LAST = ("finetune_tagi", 1, 8)


@pytest.fixture(autouse=True)
def own_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No logger's settings but the test's, whatever a feed sets while it runs."""
    before = dict(os.environ)
    for name in before:
        if name.startswith(loggers.ENVIRONMENT):
            del os.environ[name]
    os.environ["NETRC"] = str(tmp_path / "no_netrc")  # where W&B looks for keys, too
    monkeypatch.setattr(tracking, "_told", set())
    yield
    os.environ.clear()
    os.environ.update(before)


def record(step: int, **more: float) -> dict:
    stage, seed, steps = LAST
    names = {"stage": stage, "seed": seed, "variant": "tagi", "steps": steps}
    return {**names, "step": step, "loss": step / 4, **more}


def log(run: Run, names: list[str], *records: dict) -> None:
    """Write records as the loop does, each followed by its report."""
    feed = Feed(run, names, LAST)
    for one in records:
        with (run.folder / METRICS).open("a") as file:
            file.write(json.dumps(one) + "\n")
        feed.report(one)
    feed.finish("FINISHED")


def run_in(folder: Path, **environment: str) -> Run:
    return Run(folder, "tiny", {"lora.rank": "4", "name": "tiny"}, environment)


def test_metrics_and_settings_are_logged_under_the_name_of_the_stage(tmp_path: Path) -> None:
    log(run_in(tmp_path), ["tensorboard", "mlflow"], record(4, kl=0.5), record(8))
    expected = {f"{STAGE}/loss": [(4, 1.0), (8, 2.0)], f"{STAGE}/kl": [(4, 0.5)]}
    assert scalars(tmp_path) == expected
    ((_, status, params, metrics),) = mlflow_runs(tmp_path)
    assert metrics == expected
    assert params == {"lora.rank": "4", "name": "tiny"}
    assert status == "FINISHED"
    assert warnings_in(tmp_path) == []


def test_a_run_that_goes_on_stays_one_run_without_duplicates(tmp_path: Path) -> None:
    log(run_in(tmp_path), ["tensorboard", "mlflow"], record(2), record(4))
    # A stage that continues from the checkpoint at step 2 writes the record of step 4 again.
    (tmp_path / METRICS).write_text(json.dumps(record(2)) + "\n")
    changed = Run(tmp_path, "tiny", {"lora.rank": "4", "name": "tiny", "resources.workers": "2"})
    log(changed, ["tensorboard", "mlflow"], record(4), record(6), record(8))
    steps = [(step, step / 4) for step in (2, 4, 6, 8)]
    ((_, _, params, metrics),) = mlflow_runs(tmp_path)
    assert metrics[f"{STAGE}/loss"] == steps
    assert params["resources.workers"] == "2"
    assert scalars(tmp_path)[f"{STAGE}/loss"] == steps


def test_a_logger_that_is_asked_for_later_gets_what_went_before(tmp_path: Path) -> None:
    log(run_in(tmp_path), [], record(2), record(4))
    log(run_in(tmp_path), ["mlflow"], record(6))
    ((_, _, _, metrics),) = mlflow_runs(tmp_path)
    assert [step for step, _ in metrics[f"{STAGE}/loss"]] == [2, 4, 6]


def test_a_server_that_comes_back_gets_what_it_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "RETRY_SECONDS", 0.1)
    broken = tmp_path / "tensorboard"
    broken.write_text("no folder")
    feed = Feed(run_in(tmp_path), ["tensorboard"], LAST)
    (tmp_path / METRICS).write_text(json.dumps(record(4)) + "\n")
    feed.report(record(4))
    wait_for(lambda: warnings_in(tmp_path))
    broken.unlink()
    wait_for(lambda: broken.is_dir() and scalars(tmp_path))
    feed.finish("FINISHED")
    assert scalars(tmp_path)[f"{STAGE}/loss"] == [(4, 1.0)]
    assert len(warnings_in(tmp_path)) == 1


def wait_for(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("name", "environment", "cure"),
    [
        ("tensorboard", {}, "tensorboard a folder that can be written to"),
        ("mlflow", {"MLFLOW_TRACKING_URI": "http://127.0.0.1:{port}"}, "MLFLOW_TRACKING_URI"),
        ("mlflow", {"MLFLOW_TRACKING_URI": "nonsense://x"}, "MLFLOW_TRACKING_URI"),
        ("wandb", {}, "Set WANDB_API_KEY, or WANDB_MODE=offline"),
    ],
    ids=["a file where the folder goes", "a closed port", "an address of no kind", "no key"],
)
def test_a_broken_logger_is_one_warning_with_its_cure(
    tmp_path: Path, name: str, environment: dict[str, str], cure: str
) -> None:
    (tmp_path / "tensorboard").write_text("no folder")
    told = Warnings(tmp_path)
    port = str(closed_port())
    run = run_in(tmp_path, **{k: v.format(port=port) for k, v in environment.items()})
    log(run, [name], record(4), record(8))
    log(run, [name], record(8))
    (sentence,) = told.read()  # though it failed in two trainings
    assert cure in sentence
    assert sentence.startswith(f"the logger {name} failed (")
    assert "metrics.jsonl has every record" in sentence


@pytest.fixture
def silent_server() -> Iterator[str]:
    """Address of a server that takes connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_a_server_that_hangs_holds_up_neither_reports_nor_the_end_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, silent_server: str
) -> None:
    monkeypatch.setattr(tracking, "FLUSH_SECONDS", 1.0)
    run = run_in(tmp_path, MLFLOW_TRACKING_URI=silent_server)
    feed = Feed(run, ["mlflow", "tensorboard"], LAST)
    start = time.monotonic()
    for step in range(1, 8):
        with (tmp_path / METRICS).open("a") as file:
            file.write(json.dumps(record(step)) + "\n")
        feed.report(record(step))
    assert time.monotonic() - start < 0.5
    feed.report(record(8))  # the last one: it waits
    assert time.monotonic() - start < 3.0
    (warning,) = warnings_in(tmp_path)
    assert warning["text"].startswith("the logger mlflow did not take the last records within 1 s")
    assert len(scalars(tmp_path)[f"{STAGE}/loss"]) == 7  # the other logger is not held up


def test_a_server_that_does_not_answer_is_warned_of_while_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, silent_server: str
) -> None:
    monkeypatch.setattr(tracking, "SLOW_SECONDS", 0.2)
    monkeypatch.setattr(tracking, "FLUSH_SECONDS", 0.2)
    feed = Feed(run_in(tmp_path, MLFLOW_TRACKING_URI=silent_server), ["mlflow"], LAST)
    for step in (1, 2):
        feed.report(record(step))
        time.sleep(0.5)
    (warning,) = warnings_in(tmp_path)
    assert "does not answer for 0.2 s" in warning["text"]
    feed.finish("FAILED")
    assert len(warnings_in(tmp_path)) == 1


OFFLINE = """
import sys
from pathlib import Path
from tests.unit.test_tracking import log, record, run_in

run = run_in(Path(sys.argv[1]), WANDB_MODE="offline")
log(run, ["wandb"], *[record(int(step)) for step in sys.argv[2:]])
"""


def test_wandb_offline_is_one_run_in_the_run_folder(tmp_path: Path) -> None:
    for steps in (["4", "8"], ["6", "12"]):
        # A process each, as controllers are: W&B reads its settings once in a process.
        subprocess.run(
            [sys.executable, "-c", OFFLINE, tmp_path, *steps],
            check=True,
            cwd=Path(__file__).parents[2],
        )
    assert warnings_in(tmp_path) == []
    state = json.loads((tmp_path / "loggers" / "wandb.json").read_text())
    assert state["logged"] == {STAGE: 12}
    files = list(tmp_path.glob(f"wandb/offline-run-*-{state['id']}/run-{state['id']}.wandb"))
    assert len(files) == 2  # `wandb sync` joins them: they have one id
    content = b"".join(path.read_bytes() for path in files)
    assert content.count(f"{STAGE}/loss".encode()) >= 3
    assert b"lora.rank" in content


def test_settings_are_flat_and_hold_no_password(tmp_path: Path) -> None:
    experiment = tiny_experiment(tmp_path)
    located = experiment.model_copy(update={"storage": "s3://me:secret@minio:9000/runs"})
    settings = flat_settings(located)
    assert settings["storage"] == "s3://minio:9000/runs"
    assert settings["lora.rank"] == "2"
    assert settings["lora.targets"] == json.dumps(experiment.lora.targets)
    assert settings["finetune.optimizer.learning_rate"] == "0.003"
    assert "WANDB_API_KEY" not in repr(run_in(tmp_path, WANDB_API_KEY="0" * 40))


def test_a_package_that_is_missing_is_told_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wandb").mkdir()  # what an offline run leaves in a folder is no package
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    require_packages(["tensorboard", "mlflow", "wandb"])
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(ConfigError, match=r"loggers has 'wandb'.*pip install 'tagi-ray\[wandb\]'"):
        require_packages(["wandb"])


def test_nothing_of_the_loggers_reaches_the_callers_threads(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Not even where no warning can be written."""
    before = set(threading.enumerate())
    (tmp_path / "logs").write_text("no folder")
    (tmp_path / "loggers").write_text("no folder")
    with caplog.at_level(logging.WARNING):
        log(run_in(tmp_path), ["tensorboard"], record(4), record(8))
    assert any("the logger tensorboard failed" in one.message for one in caplog.records)
    assert set(threading.enumerate()) <= before


def test_a_run_goes_on_with_other_loggers_and_begins_with_none_that_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = tiny_experiment(tmp_path)
    asking = experiment.model_copy(update={"loggers": ("mlflow",)})
    monkeypatch.setattr("tagi_ray.loggers.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'tagi-ray\[mlflow\]'") as refused:
        open_run(asking)
    assert refused.value.exit_code == 2
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    assert open_run(experiment)[1] == open_run(asking)[1]
