from __future__ import annotations

import copy
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.runtime_env import RuntimeEnv

ROOT = Path(__file__).parents[2]


@pytest.fixture
def cluster(monkeypatch) -> dict[str, Any]:
    monkeypatch.chdir(ROOT)
    return yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))


def test_ray_accepts_the_file(cluster):
    validate_config(prepare_config(cluster))


def test_ray_refuses_a_file_with_a_typing_error(cluster):
    wrong = copy.deepcopy(cluster)
    wrong["available_node_types"]["gpu_spot"]["max_wrokers"] = 1
    with pytest.raises(Exception, match="max_wrokers"):
        validate_config(prepare_config(wrong))


def test_the_image_has_the_ray_of_the_constraints(cluster):
    assert cluster["docker"]["image"].split(":")[1].startswith(f"{ray.__version__}-py311-")
    assert f"ray=={ray.__version__}" in (ROOT / "constraints.txt").read_text().splitlines()


def test_the_head_is_on_demand_and_guarded(cluster):
    head = cluster["available_node_types"][cluster["head_node_type"]]
    assert "InstanceMarketOptions" not in head["node_config"]
    assert head["resources"] == {"CPU": 0}
    start = " ".join(cluster["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in start
    for commands in (start, " ".join(cluster["worker_start_ray_commands"])):
        assert "RAY_AUTH_MODE=token" in commands


def test_node_types_do_not_mix_up_gpus_and_spot(cluster):
    workers = {k: v for k, v in cluster["available_node_types"].items() if k != "head"}
    assert workers
    for node in workers.values():
        assert node["resources"]["GPU"] >= 1
        assert node["max_workers"] <= cluster["max_workers"]


def test_the_runtime_environment_pins_every_dependency_as_the_constraints_do():
    text = (ROOT / "cluster" / "runtime_env.yaml").read_text(encoding="utf-8")
    runtime = RuntimeEnv(**yaml.safe_load(text))
    pins = runtime.pip_config()["packages"]
    assert set(pins) <= set((ROOT / "constraints.txt").read_text().splitlines())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {name(pin) for pin in pins} == {name(one) for one in project["dependencies"]} - {"ray"}


def test_no_secret_and_no_environment_travels_in_the_runtime_environment():
    text = (ROOT / "cluster" / "runtime_env.yaml").read_text(encoding="utf-8")
    assert yaml.safe_load(text).keys() == {"pip", "config"}


def name(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement)[0].lower().replace("_", "-")
