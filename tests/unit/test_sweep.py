"""A sweep's folder, and what is refused before there is one; no Ray is started."""

from __future__ import annotations

import pytest
from filelock import FileLock

from tagi_ray import recipes, sweep
from tagi_ray.errors import ConfigError, RunConflictError
from tagi_ray.space import load_space
from tagi_ray.trials import TrialRow

DEMO = recipes.load("demo", ["finetune.valid_every=100"])


def test_values_that_do_not_fit_each_other_are_refused_before_anything_is_begun(tmp_path):
    text = "search: grid\nspace: {hypernetwork.width: [128, 132], hypernetwork.heads: [4, 8]}\n"
    (tmp_path / "mine.yaml").write_text(text, "utf-8")
    space = load_space(str(tmp_path / "mine.yaml"), DEMO)
    base = DEMO.model_copy(update={"storage": str(tmp_path / "runs")})
    with pytest.raises(ConfigError) as caught:
        sweep.sweep(base, space)
    assert caught.value.problems == [
        "space mine with hypernetwork.width=132 hypernetwork.heads=8:"
        " hypernetwork.width=132 is not a multiple of hypernetwork.heads=8"
    ]
    assert not (tmp_path / "runs").exists()


def test_a_sweep_goes_on_with_the_space_it_was_begun_with(tmp_path):
    path = tmp_path / "space.yaml"
    space = load_space("learning_rate", DEMO)
    sweep._keep_space(path, space)
    kept = path.read_text("utf-8")
    sweep._keep_space(path, space.model_copy(update={"concurrent": 2, "retries": 5}))
    assert path.read_text("utf-8") == kept
    with pytest.raises(RunConflictError, match="was begun with another space: give another name"):
        sweep._keep_space(path, space.model_copy(update={"trials": 17}))


def trial(number: int, loss: float, **changes: str) -> TrialRow:
    return TrialRow(number, f"key {number}", "done", 1200, loss, 100, 1.0, 1, changes, "")


def test_the_best_trial_is_written_as_a_recipe(tmp_path):
    own, first = trial(0, 0.75), trial(1, 0.5, **{"lora.rank": "8"})
    space = load_space("lambda1_rank", DEMO)
    sweep._write_best(tmp_path / "best.yaml", DEMO, space, own, first)
    text = (tmp_path / "best.yaml").read_text("utf-8")
    assert text.startswith(
        "# lora.rank=8\n# valid loss 0.5000 (trial 1); the recipe's own settings: 0.7500\n"
    )
    best = recipes.load(str(tmp_path / "best.yaml"))
    assert best.name == "demo_lambda1_rank_best"
    assert best.model_copy(update={"name": "demo", "lora": DEMO.lora}) == DEMO
    assert best.lora == DEMO.lora.model_copy(update={"rank": 8})


def test_two_jobs_do_not_run_the_same_sweep(tmp_path):
    base = DEMO.model_copy(update={"storage": str(tmp_path)})
    folder = tmp_path / "demo_fusion"
    folder.mkdir()
    with FileLock(folder / ".lock"), pytest.raises(RunConflictError) as caught:
        sweep.sweep(base, load_space("fusion", DEMO))
    assert caught.value.problems == [
        f"{folder}: another job runs this sweep: wait for its end, or give another name=..."
    ]
