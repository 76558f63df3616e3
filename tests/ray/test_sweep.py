"""Sweeps by Ray Tune: shared parts, early stops, failures, and one that is killed and continued."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tagi_ray import recipes, space
from tagi_ray.report import read_records
from tagi_ray.teachers import finished
from tagi_ray.trials import read_trials

pytestmark = pytest.mark.ray
ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "tests" / "recipes" / "tiny.yaml"
OVERRIDES = ["finetune.valid_every=2"]


def write_space(folder: Path, **fields) -> Path:
    path = folder / "tried.yaml"
    path.write_text(yaml.safe_dump(fields))
    return path


def loaded(storage: Path, path: Path):
    experiment = recipes.load(str(RECIPE), [f"storage={storage}", *OVERRIDES])
    return experiment, space.load_space(str(path), experiment)


@pytest.fixture(scope="module")
def swept(tmp_path_factory, ray_session) -> Path:
    """A sweep of the recipe's own settings, of a rate that learns nothing, and of one that fails."""
    from tagi_ray.sweep import sweep

    storage = tmp_path_factory.mktemp("sweeps")
    rates = {"lora.rank": [2], "finetune.optimizer.learning_rate": [1e-7, 1e30]}
    path = write_space(storage, search="grid", concurrent=1, seeds=[0], space=rates)
    said: list[str] = []
    page = sweep(*loaded(storage, path), said.append)
    (page.parent / "said.txt").write_text("\n".join(said))
    return page.parent


@pytest.mark.timeout(600)
def test_trials_share_what_they_can_and_end_as_they_should(swept):
    rows = read_trials(swept / "trials.csv")
    assert [row.status for row in rows] == ["done", "stopped", "failed"]
    own, bad, failed = rows
    assert (own.step, bad.step) == (6, 2)
    assert own.valid_loss < bad.valid_loss
    assert (failed.attempts, bad.attempts) == (2, 1)
    assert "TrainingError" in failed.error
    assert "learning rate 1e+30" in failed.error
    assert bad.adapter_parameters == own.adapter_parameters / 2
    # Shards once; teachers once for each rank, whichever trials read them.
    shared = sorted(path.name.rsplit("_", 1)[0] for path in (swept / "shared").iterdir())
    assert shared == ["data", "teachers_rank_2", "teachers_rank_4"]
    stores = {(swept / "trials" / row.folder / "teachers").resolve() for row in rows}
    assert len(stores) == 2
    assert all(len(finished(store)) == 92 for store in stores)


def test_a_sweep_leaves_a_recipe_a_page_and_scores(swept):
    best = recipes.load(str(swept / "best.yaml"))
    assert best.name == "tiny_tried_best"
    assert best.lora.rank == 4
    row = read_trials(swept / "trials.csv")[0]
    scores = json.loads((swept / "trials" / row.folder / "scores.json").read_text())
    assert [seed["seed"] for seed in scores["systems"]["tagi"]["seeds"]] == [0]
    assert "learning rate 1e+30" in (swept / "sweep.html").read_text()
    said = (swept / "said.txt").read_text()
    assert "3 trials: 1 done, 1 stopped early, 1 failed" in said


def test_no_placement_group_is_left(swept):
    """Ray Train's workers of a trial that is ended early are released a little later."""
    from ray.util import placement_group_table

    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        states = [group["state"] for group in placement_group_table().values()]
        if set(states) <= {"REMOVED"}:
            return
        time.sleep(0.5)
    pytest.fail(f"placement groups are left: {states}")


def job(storage: Path, path: Path) -> subprocess.Popen:
    command = [sys.executable, ROOT / "jobs" / "sweep.py", RECIPE, "--space", path]
    return subprocess.Popen(
        [*command, f"storage={storage}", *OVERRIDES],
        stdout=(storage / "log.txt").open("a"),
        stderr=subprocess.STDOUT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        cwd=storage,
    )


def history(folder: Path) -> dict[str, Any]:
    """All that a trial wrote while it trained."""
    paths = sorted((folder / "seed_0").rglob("*.safetensors"))
    kept: dict[str, Any] = {
        str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in paths
    }
    records = read_records(folder / "metrics.jsonl")
    return {**kept, "metrics": [record for record in records if record["seed"] == 0]}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_killed_sweep_continues_and_repeats_no_finished_trial(tmp_path):
    tried = {"distillation.lambda_kl": [1, 5], "lora.rank": [2, 4, 8]}
    path = write_space(
        tmp_path, search="grid", concurrent=2, scheduler="none", seeds=[0, 1], space=tried
    )
    folder = tmp_path / "tiny_tried"
    first = job(tmp_path, path)
    done: list[str] = []
    while len(done) < 2:
        assert first.poll() is None, (tmp_path / "log.txt").read_text()
        time.sleep(0.2)
        if (folder / "trials.csv").exists():
            rows = read_trials(folder / "trials.csv")
            done = [row.folder for row in rows if row.status == "done"]
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert len(done) < 6
    before = {name: history(folder / "trials" / name) for name in done}

    again = job(tmp_path, path)
    assert again.wait() == 0, (tmp_path / "log.txt").read_text()
    rows = read_trials(folder / "trials.csv")
    assert [row.status for row in rows] == ["done"] * 6
    assert len({tuple(row.changes.items()) for row in rows}) == 6
    assert {name: history(folder / "trials" / name) for name in done} == before
    for row in rows:
        records = read_records(folder / "trials" / row.folder / "metrics.jsonl")
        steps = [r["step"] for r in records if (r["stage"], r["seed"]) == ("finetune_tagi", 0)]
        assert steps == [2, 4, 6]
    best = min(rows, key=lambda row: row.valid_loss)
    scores = json.loads((folder / "trials" / best.folder / "scores.json").read_text())
    assert [seed["seed"] for seed in scores["systems"]["tagi"]["seeds"]] == [0, 1]
    stores = [path for path in (folder / "shared").iterdir() if "teachers" in path.name]
    assert len(stores) == 3
    for store in stores:
        steps = [r["step"] for r in read_records(store / "metrics.jsonl")]
        assert steps == [2, 4]

    third = job(tmp_path, path)
    assert third.wait() == 0
    assert {name: history(folder / "trials" / name) for name in done} == before
