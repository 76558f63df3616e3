"""Metrics for Prometheus: every value of a record is one, and the dashboard asks for what there is."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch

from tagi_ray import history
from tagi_ray.report import read_records
from tagi_ray.telemetry import COUNTERS, GAUGES, LOSS_PARTS, STAGE_TAGS
from tagi_ray.train_loop import Worker, run_stage
from tests.tiny_run import stage_of, tiny_experiment, tiny_run, write_random_teachers

DASHBOARD = Path(__file__).parents[2] / "cluster" / "grafana" / "tagi.json"
EXPORTED = {f"ray_tagi_{name}" for name in GAUGES} | {f"ray_tagi_{name}_total" for name in COUNTERS}
TAGS = {*STAGE_TAGS, "part", "role"}


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    return json.loads(DASHBOARD.read_text("utf-8"))


def queries(dashboard: dict[str, Any]) -> list[str]:
    """What panels and variables ask Prometheus for."""
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    variables = dashboard["templating"]["list"]
    return asked + [one["query"]["query"] for one in variables if one["type"] == "query"]


def test_every_value_of_a_record_is_a_metric(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    experiment = tiny_experiment(tmp_path, taught=True, steps=2)
    run = tiny_run(experiment)
    write_random_teachers(experiment, run)
    run_stage(stage_of(experiment, run, "finetune"), Worker())
    (record,) = read_records(run / history.METRICS)
    assert record.keys() - GAUGES.keys() - {"stage", "seed", "variant", "cut_texts"} == set(
        LOSS_PARTS
    ) - {"loss"}
    assert GAUGES.keys() - record.keys() == {"mfu"}  # a CPU has no peak that is known


def test_without_ray_nothing_happens_and_ray_is_not_even_imported() -> None:
    code = """
import sys
from tagi_ray import telemetry
stage = telemetry.Stage("run")
stage.show()
stage.take({"stage": "finetune_tagi", "seed": 0, "loss": 1.0})
stage.show()
telemetry.count("adapters_generated", run="run")
telemetry.count_up_to("teachers_done", 3, run="run", role="train")
assert "ray" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_with_ray_imported_and_not_started_nothing_happens() -> None:
    code = """
import ray
from tagi_ray import telemetry
telemetry.count("adapters_generated", run="run")
telemetry.count_up_to("teachers_done", 3, run="run", role="train")
assert not ray.is_initialized()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_dashboard_shows_all_metrics_and_no_other(dashboard: dict[str, Any]) -> None:
    asked = [set(re.findall(r"\bray_\w+", query)) for query in queries(dashboard)]
    assert all(asked)
    assert set().union(*asked) == EXPORTED


def test_dashboard_knows_the_tags(dashboard: dict[str, Any]) -> None:
    for query in queries(dashboard):
        for labels in re.findall(r"\{(.*?)\}", query):
            assert set(re.findall(r"(\w+)=~", labels)) <= TAGS, query
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            kept = {
                label.strip()
                for labels in re.findall(r"\bby \((.*?)\)", target["expr"])
                for label in labels.split(",")
            }
            assert kept <= TAGS, panel["title"]
            # Grafana writes a label that a series lacks as its name.
            assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) == kept, panel["title"]
    names = {variable["name"] for variable in dashboard["templating"]["list"]}
    assert names == {"datasource", "run", "stage", "seed"}
    assert set(re.findall(r"\$\{?(\w+)", json.dumps(dashboard))) - names == {"__all"}


def test_dashboard_is_one_that_grafana_can_lay_out(dashboard: dict[str, Any]) -> None:
    assert isinstance(dashboard["schemaVersion"], int)
    assert dashboard["title"]
    assert dashboard["uid"]
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        place = panel["gridPos"]
        assert 0 <= place["x"] < place["x"] + place["w"] <= 24, panel["title"]
        assert place["y"] >= 0
        assert place["h"] > 0
        for part in (panel, *panel["targets"]):
            assert part["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    for one, other in combinations(panels, 2):
        a, b = one["gridPos"], other["gridPos"]
        apart = (
            a["x"] + a["w"] <= b["x"]
            or b["x"] + b["w"] <= a["x"]
            or a["y"] + a["h"] <= b["y"]
            or b["y"] + b["h"] <= a["y"]
        )
        assert apart, (one["title"], other["title"])
