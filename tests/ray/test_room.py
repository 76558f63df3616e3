"""What a person sees while the cluster has no room for the workers."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import ray
from ray.util import placement_group, remove_placement_group

from tagi_ray import cluster
from tagi_ray.cluster import connect
from tagi_ray.errors import ConfigError
from tagi_ray.launch import fit
from tests.tiny_run import stage_of, tiny_experiment, tiny_run, trained

pytestmark = pytest.mark.ray


@pytest.mark.usefixtures("ray_session")
def test_a_wait_for_room_is_told_and_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "LOOK_SECONDS", 0.2)
    monkeypatch.setattr(cluster, "WAIT_SECONDS", 1.0)
    experiment = tiny_experiment(tmp_path)
    spec = stage_of(experiment, tiny_run(experiment), "finetune")
    others = placement_group([{"CPU": 6}])
    ray.get(others.ready(), timeout=30)
    lines: list[str] = []

    def say(line: str) -> None:
        lines.append(line)
        if len(lines) == 2:
            threading.Thread(target=remove_placement_group, args=(others,)).start()

    fit(spec, say)
    assert trained(spec)["records"]
    assert lines[0].startswith("waiting for room for 1 workers (1 CPU each) for 1 s: ")
    assert "the cluster has 6 CPUs and 0 GPUs, free are 0 CPUs and 0 GPUs" in lines[0]
    assert " for 2 s: " in lines[1]
    assert [line for line in lines if "step 8/8" in line]
    assert not [line for line in lines[4:] if line.startswith("waiting")]


@pytest.mark.usefixtures("ray_session")
def test_a_cluster_that_grows_refuses_nothing_that_one_may_wait_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = tiny_experiment(tmp_path, resources={"workers": 2, "cpus_per_worker": 64})
    with pytest.raises(ConfigError, match="not even one fits"):
        connect(more)
    labelled = [{**node, "Labels": {"ray.io/node-group": "head"}} for node in ray.nodes()]
    monkeypatch.setattr(ray, "nodes", lambda: labelled)
    connect(more)
