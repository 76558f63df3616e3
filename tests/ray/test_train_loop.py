"""Stages on Ray Train workers: other numbers of workers, other ZeRO stages, killed drivers."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tagi_ray import checkpoint, history
from tagi_ray.cluster import connect
from tagi_ray.errors import ConfigError, TrainingError
from tagi_ray.launch import fit
from tagi_ray.report import read_records
from tagi_ray.stages import Kind, StageSpec
from tagi_ray.train_loop import Worker, run_stage
from tests.tiny_run import (
    stage_of,
    tiny_experiment,
    tiny_run,
    trained,
    write_random_teachers,
)

pytestmark = pytest.mark.ray

TOLERANCE = 1e-4
"""Relative, for losses of other numbers of workers: sums are taken in another order."""
LOSSES = {"loss", "valid_loss", "grad_norm", "cross_entropy", "kl", "alignment", "cut_texts"}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Kind], StageSpec]:
    """Returns a finished stage of a kind, trained in this process without Ray."""
    torch.set_num_threads(1)
    experiment = tiny_experiment(tmp_path_factory.mktemp("runs"), taught=True)
    run = tiny_run(experiment)
    write_random_teachers(experiment, run)

    @cache
    def finished(kind: Kind) -> StageSpec:
        spec = stage_of(experiment, run, kind)
        run_stage(spec, Worker())
        return spec

    return finished


def elsewhere(spec: StageSpec, folder: Path, **changes: object) -> StageSpec:
    """The same stage, not begun, in another folder."""
    run = folder / "tiny"
    for part in ("shards", "tokenizer", "teachers"):
        shutil.copytree(spec.run_folder / part, run / part)
    return stage_of(tiny_experiment(folder, taught=True, **changes), run, spec.kind)


def assert_same_losses(actual: StageSpec, expected: StageSpec) -> None:
    pairs = zip(trained(actual)["records"], trained(expected)["records"], strict=True)
    for ours, theirs in pairs:
        assert ours.keys() == theirs.keys()
        assert ours["step"] == theirs["step"]
        for name in LOSSES & theirs.keys():
            assert ours[name] == pytest.approx(theirs[name], rel=TOLERANCE), (name, ours["step"])


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize(
    ("kind", "workers", "zero_stage"),
    [
        ("finetune", 1, 0),
        ("finetune", 2, 2),
        ("teachers", 2, 0),
        pytest.param("finetune", 2, 0, marks=pytest.mark.slow),
        pytest.param("finetune", 2, 1, marks=pytest.mark.slow),
        pytest.param("metatrain", 2, 0, marks=pytest.mark.slow),
        pytest.param("metatrain", 2, 2, marks=pytest.mark.slow),
    ],
)
def test_workers_and_zero_stage_do_not_change_what_is_learnt(
    kind: Kind,
    workers: int,
    zero_stage: int,
    alone: Callable[[Kind], StageSpec],
    tmp_path: Path,
) -> None:
    expected = alone(kind)
    resources = {"workers": workers, "zero_stage": zero_stage}
    spec = elsewhere(expected, tmp_path, resources=resources)
    lines: list[str] = []
    connect(spec.experiment)
    fit(spec, lines.append)
    assert_same_losses(spec, expected)
    tensors = trained(spec)["tensors"]
    for name, tensor in trained(expected)["tensors"].items():
        if workers == 1:
            assert torch.equal(tensors[name], tensor), name
        elif name.startswith("model."):
            torch.testing.assert_close(tensors[name], tensor, rtol=1e-3, atol=1e-4)
    if kind == "finetune":
        # Half of the tasks have a teacher: counts that ranks don't share would show.
        assert all(r["kl"] > 0 and r["alignment"] > 0 for r in trained(spec)["records"])
    assert [line.split("step ")[1].split()[0] for line in lines] == ["2/8", "4/8", "6/8", "8/8"]
    lines.clear()
    fit(spec, lines.append)
    assert lines == []


@pytest.mark.usefixtures("ray_session")
def test_stages_of_one_fit_continue_with_more_workers(
    alone: Callable[[Kind], StageSpec], tmp_path: Path
) -> None:
    """Two stages on one group of workers; the first was begun by one worker, on another stage."""

    class Killed(Exception):
        pass

    def stop(record: Mapping[str, Any]) -> None:
        if record["step"] > 3:
            raise Killed

    first = elsewhere(alone("finetune"), tmp_path)
    with pytest.raises(Killed):
        run_stage(first, Worker(report=stop))
    assert checkpoint.steps(first.checkpoints) == [3]
    resources = {"workers": 2, "zero_stage": 2}
    experiment = tiny_experiment(tmp_path, taught=True, resources=resources, micro_groups=1)
    first = replace(first, experiment=experiment)
    second = StageSpec(experiment, "metatrain", first.run_folder, 0, learning_rate=1e-3)
    connect(experiment)
    fit([first, second])
    assert_same_losses(first, alone("finetune"))
    assert trained(second)["records"][-1]["step"] == 8


@pytest.mark.usefixtures("ray_session")
@pytest.mark.timeout(120)
def test_the_error_of_a_worker_reaches_the_driver(
    alone: Callable[[Kind], StageSpec], tmp_path: Path
) -> None:
    wild = {"learning_rate": 1e30, "warmup_fraction": 0.0}
    # So many starts would take minutes, and each would end the same way.
    resources = {"workers": 1, "max_failures": 100}
    ours = elsewhere(alone("metatrain"), tmp_path / "ours", optimizer=wild, resources=resources)
    connect(ours.experiment)
    with pytest.raises(TrainingError, match="is nan at step 2"):
        fit(ours)
    foreign = elsewhere(alone("metatrain"), tmp_path / "foreign")
    for part in (foreign.run_folder / "shards" / "train").glob("*.parquet"):
        part.unlink()
    with pytest.raises(TrainingError, match=r"worker 0 failed: .*failure\.txt"):
        fit(foreign)
    assert "Traceback" in (foreign.run_folder / "logs" / "failure.txt").read_text()


@pytest.mark.usefixtures("ray_session")
def test_too_small_a_cluster_is_refused_with_the_number(tmp_path: Path) -> None:
    resources = {"workers": 4, "cpus_per_worker": 3}
    with pytest.raises(
        ConfigError, match=r"needs 12 CPUs .* has at most 6 .* set resources\.workers=1,"
    ):
        connect(tiny_experiment(tmp_path, groups=8, resources=resources))
    with pytest.raises(ConfigError, match=r"and 2 GPUs .* 0 GPUs .* not even one fits"):
        connect(tiny_experiment(tmp_path, resources={"workers": 2, "gpus_per_worker": 1}))


DRIVER = """
import sys
from pathlib import Path
from tagi_ray.cluster import connect
from tagi_ray.launch import fit
from tagi_ray.stages import StageSpec
from tests.tiny_run import tiny_experiment
experiment = tiny_experiment(
    Path(sys.argv[1]), taught=True, steps=int(sys.argv[2]), valid_every=20
)
connect(experiment)
fit(StageSpec(experiment, "finetune", Path(sys.argv[1]) / "tiny", 0), print)
"""


def test_killed_driver_started_again_ends_as_if_undisturbed(
    alone: Callable[[Kind], StageSpec], tmp_path: Path
) -> None:
    steps = 100
    whole = elsewhere(alone("finetune"), tmp_path / "whole", steps=steps, valid_every=20)
    broken = elsewhere(alone("finetune"), tmp_path / "broken", steps=steps, valid_every=20)
    run_stage(whole, Worker())
    command = [sys.executable, "-c", DRIVER, str(tmp_path / "broken"), str(steps)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as driver:
        deadline = time.monotonic() + 180
        while len(read_records(broken.run_folder / history.METRICS)) < 8:
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
