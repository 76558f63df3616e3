"""Metrics of a running job, scraped from the node's port as Prometheus does it."""

from __future__ import annotations

import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

import pytest

from tagi_ray import history, pipeline, telemetry
from tagi_ray.launch import run_remotely
from tagi_ray.report import read_records
from tagi_ray.teachers import FOLDERS, finished
from tests.tiny_run import tiny_experiment

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_session")]

RUN = "scraped"
SENT_SECONDS = 30.0
"""In which Ray's processes surely send what they have; they do every ten."""
Series = tuple[str, frozenset[tuple[str, str]]]


def endpoint() -> str:
    """The address that Ray gives Prometheus for this node."""
    import ray

    (node,) = ray.nodes()
    return f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"


def scrape(url: str) -> dict[Series, list[float]]:
    """Metrics of the run, by name and own tags: a value of each process that tells one."""
    found: dict[Series, list[float]] = {}
    ours = {*telemetry.STAGE_TAGS, "part", "role"}
    for line in urlopen(url, timeout=10).read().decode().splitlines():
        if line.startswith("ray_tagi_") and f'run="{RUN}"' in line:
            pairs = re.findall(r'(\w+)="([^"]*)"', line)
            key = line.partition("{")[0], frozenset(pair for pair in pairs if pair[0] in ours)
            found.setdefault(key, []).append(float(line.split()[-1]))
    return found


@contextmanager
def scraping(url: str) -> Iterator[dict[Series, list[float]]]:
    """Scrape every second; give all values that a metric had."""
    seen: dict[Series, list[float]] = {}
    over = threading.Event()

    def work() -> None:
        while not over.wait(1.0):
            for key, values in scrape(url).items():
                seen.setdefault(key, []).extend(values)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    yield seen
    over.set()
    thread.join()


def tags(**values: object) -> frozenset[tuple[str, str]]:
    return frozenset((name, str(value)) for name, value in {"run": RUN, **values}.items())


@pytest.mark.timeout(600)
def test_a_running_job_can_be_scraped(tmp_path: Path) -> None:
    experiment = tiny_experiment(tmp_path, taught=True, steps=4)
    evaluation = experiment.evaluation.model_copy(update={"systems": ("tagi",), "actors": 1})
    experiment = experiment.model_copy(update={"name": RUN, "evaluation": evaluation})
    run = tmp_path / RUN
    url = endpoint()
    with scraping(url) as seen:
        pipeline.finetune(experiment, lambda line: None)
        deadline = time.monotonic() + SENT_SECONDS
        while time.monotonic() < deadline:
            time.sleep(1.0)
            names = {name for name, _ in seen}
            if {"ray_tagi_adapters_generated_total", "ray_tagi_teachers_done_total"} <= names:
                break

    # --- gauges: the newest record of each stage, as metrics.jsonl has it
    newest = {record["stage"]: record for record in read_records(run / history.METRICS)}
    assert set(newest) == {"teachers", "finetune_tagi"}
    for stage, record in newest.items():
        own = {"stage": stage, "seed": 0}
        for name in telemetry.GAUGES.keys() & record.keys() - {"loss"}:
            assert record[name] in seen[f"ray_tagi_{name}", tags(**own)], (stage, name)
        for part in set(telemetry.LOSS_PARTS) & record.keys():
            assert record[part] in seen["ray_tagi_loss", tags(**own, part=part)], (stage, part)
    assert {"kl", "alignment"} <= newest["finetune_tagi"].keys()

    # --- counters: what was done stays, and what a later job finds done is not done twice
    teachers = len(finished(run / FOLDERS["train"]))
    adapters = len(list((run / "adapters").iterdir()))
    pipeline.train_teachers(experiment, lambda line: None)
    done = {"run": RUN, "role": "train"}
    run_remotely(experiment, _count_as_another_job, teachers, done)
    time.sleep(12.0)
    found = scrape(url)
    assert sum(found["ray_tagi_adapters_generated_total", tags()]) == adapters > 0
    assert set(found["ray_tagi_teachers_done_total", tags(role="train")]) == {teachers}
    lines = [f"{name}{dict(sorted(own))} {values[-1]:g}\n" for (name, own), values in seen.items()]
    sys.stdout.writelines(sorted(lines))  # `pytest -s` shows them


def _count_as_another_job(number: int, done: dict[str, str]) -> None:
    telemetry.count_up_to("teachers_done", number, **done)
