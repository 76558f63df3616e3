"""Stages on Ray Train workers: other numbers of workers, other ZeRO stages, killed drivers."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tagi_ray import checkpoint, history
from tagi_ray.errors import ConfigError, TrainingError
from tagi_ray.launch import connect, fit
from tagi_ray.stages import StageSpec
from tagi_ray.train_loop import Worker, run_stage
from tests.tiny_run import tiny_experiment, tiny_run, trained

pytestmark = pytest.mark.ray

TOLERANCE = 1e-4
"""Relative, for losses of other numbers of workers: sums are taken in another order."""


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> StageSpec:
    """A finished stage, trained in this process without Ray."""
    torch.set_num_threads(1)
    experiment = tiny_experiment(tmp_path_factory.mktemp("runs"))
    spec = StageSpec(experiment, "finetune", tiny_run(experiment), 0)
    run_stage(spec, Worker())
    return spec


def elsewhere(spec: StageSpec, folder: Path, **changes: object) -> StageSpec:
    """The same stage, not begun, in another folder."""
    for part in ("shards", "tokenizer"):
        shutil.copytree(spec.run_folder / part, folder / "tiny" / part)
    return replace(spec, experiment=tiny_experiment(folder, **changes), run_folder=folder / "tiny")


def assert_same_losses(actual: StageSpec, expected: StageSpec) -> None:
    pairs = zip(trained(actual)["records"], trained(expected)["records"], strict=True)
    for ours, theirs in pairs:
        assert ours["step"] == theirs["step"]
        for name in {"loss", "valid_loss", "grad_norm"} & theirs.keys():
            assert ours[name] == pytest.approx(theirs[name], rel=TOLERANCE), (name, ours["step"])


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize(("workers", "zero_stage"), [(1, 0), (2, 0), (2, 2)])
def test_workers_and_zero_stage_do_not_change_the_losses(
    workers: int, zero_stage: int, alone: StageSpec, tmp_path: Path
) -> None:
    resources = {"workers": workers, "zero_stage": zero_stage}
    spec = elsewhere(alone, tmp_path, resources=resources)
    lines: list[str] = []
    connect(spec.experiment)
    fit(spec, lines.append)
    assert_same_losses(spec, alone)
    if workers == 1:
        for name, tensor in trained(alone)["tensors"].items():
            assert torch.equal(trained(spec)["tensors"][name], tensor), name
    assert [line.split("step ")[1].split()[0] for line in lines] == ["2/8", "4/8", "6/8", "8/8"]
    lines.clear()
    fit(spec, lines.append)
    assert lines == []


@pytest.mark.usefixtures("ray_session")
def test_stages_of_one_fit_continue_with_more_workers(alone: StageSpec, tmp_path: Path) -> None:
    """Two stages on one group of workers; the first was begun by one worker, on another stage."""

    class Killed(Exception):
        pass

    def stop(record: object) -> None:
        raise Killed

    first = elsewhere(alone, tmp_path)
    with pytest.raises(Killed):
        run_stage(first, Worker(report=stop))
    assert checkpoint.steps(first.checkpoints) == [3]
    resources = {"workers": 2, "zero_stage": 2}
    experiment = tiny_experiment(tmp_path, resources=resources, micro_groups=1)
    first = replace(first, experiment=experiment)
    second = StageSpec(experiment, "metatrain", first.run_folder, 0, learning_rate=1e-3)
    connect(experiment)
    fit([first, second])
    assert_same_losses(first, alone)
    assert trained(second)["records"][-1]["step"] == 8


@pytest.mark.usefixtures("ray_session")
def test_the_error_of_a_worker_reaches_the_driver(alone: StageSpec, tmp_path: Path) -> None:
    wild = {"learning_rate": 1e30, "warmup_fraction": 0.0}
    ours = elsewhere(alone, tmp_path / "ours", optimizer=wild)
    ours = replace(ours, kind="metatrain")
    connect(ours.experiment)
    with pytest.raises(TrainingError, match="is nan at step 2"):
        fit(ours)
    foreign = elsewhere(alone, tmp_path / "foreign")
    for part in (foreign.run_folder / "shards" / "train").glob("*.parquet"):
        part.unlink()
    with pytest.raises(TrainingError, match=r"worker 0 failed: .*failure\.txt"):
        fit(foreign)
    assert "Traceback" in (foreign.run_folder / "logs" / "failure.txt").read_text()


@pytest.mark.usefixtures("ray_session")
def test_too_small_a_cluster_is_refused_with_the_number(tmp_path: Path) -> None:
    resources = {"workers": 4, "cpus_per_worker": 3}
    with pytest.raises(ConfigError, match=r"needs 13 CPUs .* has 6"):
        connect(tiny_experiment(tmp_path, groups=8, resources=resources))
    with pytest.raises(ConfigError, match=r"needs 2 GPUs .* has 0"):
        connect(tiny_experiment(tmp_path, resources={"workers": 2, "gpus_per_worker": 1}))


DRIVER = """
import sys
from pathlib import Path
from tagi_ray.launch import connect, fit
from tagi_ray.stages import StageSpec
from tests.tiny_run import tiny_experiment
experiment = tiny_experiment(Path(sys.argv[1]), steps=int(sys.argv[2]), valid_every=20)
connect(experiment)
fit(StageSpec(experiment, "finetune", Path(sys.argv[1]) / "tiny", 0), print)
"""


def test_killed_driver_started_again_ends_as_if_undisturbed(
    alone: StageSpec, tmp_path: Path
) -> None:
    steps = 100
    whole = elsewhere(alone, tmp_path / "whole", steps=steps, valid_every=20)
    broken = elsewhere(alone, tmp_path / "broken", steps=steps, valid_every=20)
    run_stage(whole, Worker())
    command = [sys.executable, "-c", DRIVER, str(tmp_path / "broken"), str(steps)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as driver:
        deadline = time.monotonic() + 60
        while len(history.read(broken.run_folder / history.METRICS)) < 8:
            assert driver.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(driver.pid, signal.SIGKILL)
    reached = checkpoint.steps(broken.checkpoints)
    assert reached
    assert reached[-1] < steps
    subprocess.run(command, check=True, capture_output=True, timeout=90)
    expected, actual = trained(whole), trained(broken)
    assert actual["records"] == expected["records"]
    for name, tensor in expected["tensors"].items():
        assert torch.equal(actual["tensors"][name], tensor), name
