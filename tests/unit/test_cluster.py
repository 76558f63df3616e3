"""What a run is refused for before it takes anything of a cluster."""

from __future__ import annotations

import socket
import time
from pathlib import Path
from typing import Any

import pytest

from tagi_ray.cluster import SPARE_CPUS, check_capacity, connect, runs_that_fit
from tagi_ray.config import Experiment
from tagi_ray.errors import ConfigError
from tests.tiny_run import tiny_experiment

FOUR = [({"CPU": 4.0}, 1)]


def sized(tmp_path: Path, actors: int, **resources: float) -> Experiment:
    experiment = tiny_experiment(tmp_path)
    return experiment.model_copy(
        update={
            "evaluation": experiment.evaluation.model_copy(update={"actors": actors}),
            "resources": experiment.resources.model_copy(update=resources),
        }
    )


def refusal(experiment: Experiment, nodes: list) -> list[str]:
    with pytest.raises(ConfigError) as error:
        check_capacity(experiment, nodes)
    assert error.value.exit_code == 2
    return error.value.problems


def test_what_fits_is_not_refused(tmp_path: Path) -> None:
    check_capacity(sized(tmp_path, 4), FOUR)
    check_capacity(sized(tmp_path, 1, workers=2, gpus_per_worker=1), [({"CPU": 8, "GPU": 1}, 2)])


def test_more_than_there_can_be_is_refused_with_the_number_that_fits(tmp_path: Path) -> None:
    assert refusal(sized(tmp_path, 5), FOUR) == [
        "evaluation.actors=5 needs 5 CPUs (1 CPU each), and the cluster has at most 4 CPUs and"
        " 0 GPUs on 1 node: set evaluation.actors=4, or enlarge the cluster"
    ]
    eight = [({"CPU": 8, "GPU": 1}, 3)]
    assert refusal(sized(tmp_path, 1, workers=4, gpus_per_worker=1), eight) == [
        "resources.workers=4 needs 4 CPUs and 4 GPUs (1 CPU and 1 GPU each) and 1 CPU for reading"
        " data, and the cluster has at most 24 CPUs and 3 GPUs on 3 nodes: set resources.workers=3,"
        " or enlarge the cluster"
    ]


def test_gpus_of_a_cluster_without_any_are_refused(tmp_path: Path) -> None:
    both = refusal(sized(tmp_path, 1, workers=1, gpus_per_worker=8), FOUR)
    assert both[0] == (
        "resources.workers=1 needs 1 CPU and 8 GPUs (1 CPU and 8 GPUs each) and 1 CPU for reading"
        " data, and the cluster has at most 4 CPUs and 0 GPUs on 1 node: not even one fits; ask"
        " for less of each, or enlarge the cluster"
    )


def test_workers_that_would_leave_no_cpu_for_reading_data_are_refused(tmp_path: Path) -> None:
    (problem,) = refusal(sized(tmp_path, 1, workers=4), FOUR)
    assert "and 1 CPU for reading data" in problem
    assert "set resources.workers=3, or" in problem
    check_capacity(sized(tmp_path, 1, workers=3), FOUR)


def test_a_worker_has_to_fit_on_one_node(tmp_path: Path) -> None:
    nodes = [({"CPU": 4}, 2)]
    (problem, _) = refusal(sized(tmp_path, 1, workers=1, cpus_per_worker=6), nodes)
    assert "at most 8 CPUs and 0 GPUs on 2 nodes: not even one fits" in problem


ONE_GPU = [({"CPU": 16, "GPU": 1}, 1)]
MANY = {
    "a laptop": (FOUR, {}, 2),
    "two workers on a laptop": (FOUR, {"workers": 2}, 1),
    "as many as there are, less their readers": ([({"CPU": 8}, 1)], {}, 4),
    "a run that barely fits": ([({"CPU": 2}, 1)], {}, 1),
    "no room, which is told elsewhere": ([({"CPU": 1}, 1)], {"workers": 4}, 1),
    "a head without CPUs": ([({"CPU": 0}, 1), ({"CPU": 4}, 2)], {}, 4),
    "a GPU each": ([({"CPU": 32, "GPU": 8}, 2)], {"gpus_per_worker": 1}, 16),
    "two GPUs each": ([({"CPU": 32, "GPU": 8}, 2)], {"workers": 2, "gpus_per_worker": 1}, 8),
    "CPUs that run out first": ([({"CPU": 8, "GPU": 8}, 1)], {"gpus_per_worker": 1}, 4),
    "odd GPUs of nodes": ([({"CPU": 32, "GPU": 3}, 2)], {"gpus_per_worker": 2}, 2),
    "GPUs beside nodes without": (
        [({"CPU": 64}, 4), ({"CPU": 8, "GPU": 1}, 3)],
        {"gpus_per_worker": 1},
        3,
    ),
    "half a GPU each": (ONE_GPU, {"gpus_per_worker": 0.5}, 2),
    "a fifth of a GPU each": (ONE_GPU, {"gpus_per_worker": 0.2}, 5),
    "a tenth of a GPU each, and CPUs": (ONE_GPU, {"gpus_per_worker": 0.1}, 8),
    "more than half of a GPU each": ([({"CPU": 16, "GPU": 4}, 1)], {"gpus_per_worker": 0.6}, 6),
}


@pytest.mark.parametrize("where", MANY)
def test_runs_that_fit_side_by_side(tmp_path: Path, where: str) -> None:
    nodes, resources, count = MANY[where]
    experiment = sized(tmp_path, 1, **resources)
    assert runs_that_fit(experiment, nodes) == count


def test_processes_share_a_gpu_without_a_rest(tmp_path: Path) -> None:
    check_capacity(sized(tmp_path, 5, gpus_per_worker=0.2), ONE_GPU)
    (problem,) = refusal(sized(tmp_path, 6, gpus_per_worker=0.2), ONE_GPU)
    assert "set evaluation.actors=5, or" in problem


def started(
    monkeypatch: pytest.MonkeyPatch, experiment: Experiment, *side_by_side: Any, gpus: int = 0
) -> dict[str, object]:
    """What a local Ray is started with, which is not done."""
    asked: dict[str, object] = {}

    class Started(Exception):
        pass

    def start(**settings: object) -> None:
        asked.update(settings)
        raise Started

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", start)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    with pytest.raises(Started):
        connect(experiment, *side_by_side)
    return asked


def test_a_local_cluster_has_room_for_every_actor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = started(monkeypatch, sized(tmp_path, 5, cpus_per_worker=2))
    assert asked["num_cpus"] == 10 + SPARE_CPUS


def test_a_local_cluster_has_room_for_runs_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = sized(tmp_path, 1, workers=2)
    assert started(monkeypatch, two, 3)["num_cpus"] == 3 * (2 + SPARE_CPUS)
    # Eight CPUs have room for four runs of two workers.
    assert started(monkeypatch, two, "auto")["num_cpus"] == 4 * (2 + SPARE_CPUS)
    large = sized(tmp_path, 1, workers=2, cpus_per_worker=6)
    assert started(monkeypatch, large, "auto")["num_cpus"] == 12 + SPARE_CPUS


def test_runs_on_this_machine_share_its_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = sized(tmp_path, 1, gpus_per_worker=0.5)
    asked = started(monkeypatch, half, "auto", gpus=2)
    assert asked["num_gpus"] == 2
    assert asked["num_cpus"] == 4 * (1 + SPARE_CPUS)


def test_a_local_cluster_without_the_gpus_is_refused_before_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(ConfigError, match=r"needs 1 CPU and 1 GPU .* 0 GPUs .* not even one"):
        connect(sized(tmp_path, 1, gpus_per_worker=1))


def test_an_address_where_nothing_answers_is_one_sentence_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    began = time.monotonic()
    with pytest.raises(ConfigError, match=f"RAY_ADDRESS={address}: no Ray cluster answered") as one:
        connect(tiny_experiment(tmp_path))
    assert time.monotonic() - began < 30
    assert "\n" not in str(one.value)
