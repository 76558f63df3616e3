"""What a sweep asks Ray Tune for, and what it keeps of its trials; no Ray is started."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.search.basic_variant import BasicVariantGenerator

from tagi_ray import recipes
from tagi_ray.config import Experiment
from tagi_ray.space import Space, load_space, names, own_texts, own_values, texts
from tagi_ray.trials import TrialRow, read_trials
from tagi_ray.tuning import (
    Asha,
    Board,
    key_of,
    left,
    numbers,
    own_row,
    point_of,
    points,
    row_of,
    tune_arguments,
)

DEMO = recipes.load("demo", ["finetune.valid_every=100"])
RATE = "finetune.optimizer.learning_rate"


def space_of(folder: Path, text: str) -> Space:
    (folder / "mine.yaml").write_text(text, encoding="utf-8")
    return load_space(str(folder / "mine.yaml"), DEMO)


def settings_of(point: dict[str, Any], base: Experiment = DEMO) -> Experiment:
    return recipes.changed(base, [f"{field}={value}" for field, value in texts(point).items()])


def test_a_grid_is_complete_and_the_recipes_own_comes_first():
    found = list(points(load_space("lambda1_rank", DEMO), DEMO))
    assert found[0] == {"distillation.lambda_kl": "5.0", "lora.rank": "16"}
    runs = [settings_of(point) for point in found]
    tried = [(run.distillation.lambda_kl, run.lora.rank) for run in runs]
    # The recipe's own settings are in the grid too, written 5 there, and are tried once.
    assert len(tried) == 12
    assert set(tried) == set(product([0.5, 2.0, 5.0, 10.0], [16, 32, 64]))


def test_a_grid_of_lists_of_names(tmp_path):
    space = space_of(tmp_path, "search: grid\nspace: {lora.targets: [[q, v], [q, k, v, o]]}\n")
    assert [point["lora.targets"] for point in points(space, DEMO)] == [
        "[q, k, v, o]",
        "[q, v]",
    ]


def test_points_of_a_random_search_are_distinct_within_and_repeatable():
    space = load_space("learning_rate", DEMO)
    found = list(points(space, DEMO))
    assert found == list(points(space, DEMO))
    assert found[0] == own_texts(space, DEMO) == {
        RATE: "0.001",
        "finetune.optimizer.warmup_fraction": "0.1",
    }  # fmt: skip
    assert len(found) == space.trials == 16
    runs = [settings_of(point).finetune.optimizer for point in found]
    assert len({run.learning_rate for run in runs}) == 16
    assert all(3e-5 <= run.learning_rate <= 3e-3 for run in runs)
    assert all(0 <= run.warmup_fraction <= 0.2 for run in runs)
    other = list(points(space.model_copy(update={"seed": 1}), DEMO))
    assert other[0] == found[0]
    assert other[1:] != found[1:]


def test_a_logarithmic_range_is_drawn_evenly_over_its_magnitudes():
    space = load_space("learning_rate", DEMO).model_copy(update={"trials": 100})
    rates = [float(point[RATE]) for point in points(space, DEMO)]
    assert 35 < sum(rate < 3e-4 for rate in rates) < 65


def test_a_range_of_integers_has_both_ends(tmp_path):
    space = space_of(tmp_path, "trials: 100\nspace: {lora.rank: {integers: [2, 5]}}\n")
    ranks = [settings_of(point).lora.rank for point in points(space, DEMO)]
    assert ranks[0] == 16
    assert sorted(ranks) == [2, 3, 4, 5, 16]


def test_a_small_space_ends_when_all_of_it_was_drawn(tmp_path):
    text = "trials: 50\nspace: {lora.rank: [16, 8], distillation.lambda_kl: [5, 1]}\n"
    space = space_of(tmp_path, text)
    runs = [settings_of(point) for point in points(space, DEMO)]
    tried = [(run.lora.rank, run.distillation.lambda_kl) for run in runs]
    assert tried[0] == (16, 5.0)
    assert sorted(tried) == [(8, 1.0), (8, 5.0), (16, 1.0), (16, 5.0)]


def test_values_that_look_like_others_and_none_at_all_stay_what_they_are(tmp_path):
    text = "search: grid\nspace: {backbone.revision: ['1e4', 'a: b'], fusion.low_rank: [~, 4]}\n"
    runs = [settings_of(point) for point in points(space_of(tmp_path, text), DEMO)]
    tried = [(run.backbone.revision, run.fusion.low_rank) for run in runs]
    assert tried == [(None, None), *product(["1e4", "a: b"], [None, 4])]


def test_a_trials_key_is_that_of_its_settings_however_they_are_written():
    space = load_space("lambda1_rank", DEMO)

    def key(weight: str, rank: str) -> str:
        return key_of(space, DEMO, {"distillation.lambda_kl": weight, "lora.rank": rank})

    assert key("5", "16") == key("5.0", "1.6e1") == key_of(space, DEMO, own_texts(space, DEMO))
    assert len({key("5", "16"), key("2", "16"), key("5", "32")}) == 3
    assert len({key_of(space, DEMO, point) for point in points(space, DEMO)}) == 12


def row(space: Space, number: int, status: Any, loss: float = 0.5, **changes: str) -> TrialRow:
    point = {**own_texts(space, DEMO), **changes}
    return TrialRow(
        number=number,
        folder=key_of(space, DEMO, point),
        status=status,
        step=1200 if status == "done" else 100,
        valid_loss=loss,
        adapter_parameters=100,
        seconds=1.0,
        attempts=1,
        changes=point,
        error="",
    )


def test_what_is_left_of_a_grid_is_what_has_not_ended(tmp_path):
    space = space_of(tmp_path, "search: grid\nspace: {lora.rank: [4, 8, 16]}\n")
    assert left(space, DEMO, []) == [{"lora.rank": rank} for rank in ("16", "4", "8")]
    rows = [
        row(space, 0, "done"),
        row(space, 1, "failed", **{"lora.rank": "4"}),
        row(space, 2, "stopped", **{"lora.rank": "8"}),
    ]
    assert left(space, DEMO, rows) == [{"lora.rank": "4"}]
    assert numbers(space, DEMO, rows) == {one.folder: one.number for one in rows}
    assert own_row(space, DEMO, rows) == rows[0]
    assert own_row(space, DEMO, rows[1:]) is None


def test_what_is_left_of_a_search_that_learns_is_a_number():
    space = load_space("loss_weights", DEMO)
    assert left(space, DEMO, []) == 24
    rows = [row(space, 0, "done"), row(space, 1, "running", **{"distillation.temperature": "2"})]
    assert left(space, DEMO, rows) == 23
    assert numbers(space, DEMO, rows) == {rows[1].folder: 1}


def searching(space: Space, folder: Path, rows: Sequence[TrialRow] = ()) -> Any:
    return tune_arguments(space, DEMO, folder, rows, 3)[1].search_alg


@pytest.mark.parametrize("name", ["loss_weights", "adapter_size"])
def test_optuna_asks_for_settings_that_a_run_can_have_the_recipes_own_first(name, tmp_path):
    space = load_space(name, DEMO)
    search = searching(space, tmp_path)
    assert settings_of(search.suggest("t0")) == DEMO
    for number in range(1, 8):
        point = search.suggest(f"t{number}")
        assert point.keys() == space.space.keys()
        tried, own = own_values(space, settings_of(point)), own_values(space, DEMO)
        assert all(
            domain.holds(tried[field]) or tried[field] == own[field]
            for field, domain in space.space.items()
        )


@pytest.mark.parametrize(
    ("values", "own"),
    [
        ("distillation.lambda_kl: [1, 5]", "5"),  # the recipe's is 5.0
        ("distillation.lambda_kl: [1, 2]", "5.0"),
        ("fusion.low_rank: [4, 8]", "null"),
        ("fusion.low_rank: [4, ~]", "null"),
        ("lora.targets: [[q, v], [q, k, v, o]]", "[q, k, v, o]"),
        ("lora.rank: {integers: [2, 64]}", 16),
        ("backbone.revision: ['1e4', x]", "null"),
    ],
)
def test_the_first_suggestion_is_the_recipes_own_however_it_is_written(values, own, tmp_path):
    space = space_of(tmp_path, f"search: tpe\nspace: {{{values}}}\n")
    search = searching(space, tmp_path)
    (first,) = search.suggest("t0").values()
    assert first == own
    others = [search.suggest(f"t{number}") for number in range(1, 9)]
    assert {type(value) for point in others for value in point.values()} == {type(own)}
    assert all(settings_of(point) for point in others)


def test_optuna_learns_from_both_objectives(tmp_path):
    space = load_space("adapter_size", DEMO)
    search = searching(space, tmp_path)
    for number in range(12):
        name = f"t{number}"
        size = settings_of(search.suggest(name)).lora.rank * 100
        result = {"valid_loss": 1 / size, "adapter_parameters": size, "step": 1200}
        search.on_trial_result(name, result)
        search.on_trial_complete(name, result)
    told = [trial.values for trial in search._ot_study.trials]
    assert all(values == [1 / values[1], values[1]] for values in told)
    # What is smaller is worse here, so that no trial beats another in both.
    assert {tuple(one.values) for one in search._ot_study.best_trials} == set(map(tuple, told))


def test_optuna_goes_on_after_a_trial_that_failed(tmp_path):
    search = searching(load_space("loss_weights", DEMO), tmp_path)
    search.suggest("t0")
    search.on_trial_complete("t0", error=True)
    search.suggest("t1")
    search.on_trial_complete("t1", {"valid_loss": 1.0})
    assert [trial.state.name for trial in search._ot_study.trials] == ["FAIL", "COMPLETE"]


@pytest.mark.parametrize("name", ["loss_weights", "adapter_size"])
def test_optuna_knows_the_trials_of_an_earlier_start_and_repeats_none(name, tmp_path):
    space = load_space(name, DEMO)
    search = searching(space, tmp_path)
    tried = [texts(search.suggest(f"t{number}")) for number in range(5)]
    rows = [row(space, n, "done", n / 10, **point) for n, point in enumerate(tried[:4])]
    begun = row(space, 4, "running", **tried[4])
    again = searching(space, tmp_path, [*rows, begun])
    known = [trial.values[0] for trial in again._ot_study.trials if trial.values]
    assert known == [0.0, 0.1, 0.2, 0.3]
    assert settings_of(again.suggest("t4")) == settings_of(tried[4])  # what was begun goes first
    if name == "loss_weights":  # whose ranges hold more than one can draw twice
        assert texts(again.suggest("t5")) not in tried


@pytest.mark.parametrize("name", names())
def test_what_tune_is_told_of_every_shipped_space(name, tmp_path):
    space = load_space(name, DEMO)
    params, config = tune_arguments(space, DEMO, tmp_path, [], 3)
    if space.search == "tpe":
        assert params == {}
        assert (config.num_samples, config.max_concurrent_trials) == (space.trials, 3)
    else:
        assert params == {"point": {"grid_search": list(points(space, DEMO))}}
        assert config.num_samples == 1
        assert isinstance(config.search_alg, BasicVariantGenerator)
    assert (config.scheduler is not None) == (space.scheduler == "asha")


def stopped_at(asha: Asha, steps: Sequence[int], losses: Sequence[float]) -> int | None:
    """The step at which a trial is ended, if it is before its last."""
    trial: Any = SimpleNamespace(trial_id="new")
    asha.on_trial_add(None, trial)  # pyright: ignore[reportArgumentType]
    for step, loss in zip(steps, losses, strict=True):
        if asha.on_trial_result(None, trial, {"step": step, "valid_loss": loss}) == "STOP":  # pyright: ignore[reportArgumentType]
            return step
    return None


STEPS = (100, 200, 300)
CURVES = [[(step, loss) for step in STEPS] for loss in (0.1, 0.2, 0.3, 0.4, 0.5)]


def test_asha_ends_a_trial_that_is_worse_than_most_at_the_same_step():
    assert stopped_at(Asha(100, 1200, CURVES), STEPS, (0.6, 0.6, 0.6)) == 100
    assert stopped_at(Asha(100, 1200, CURVES), STEPS, (0.05, 0.05, 0.6)) == 300
    assert stopped_at(Asha(100, 1200, CURVES), STEPS, (0.05, 0.05, 0.05)) is None
    assert stopped_at(Asha(100, 1200, []), STEPS, (0.6, 0.6, 0.6)) is None
    assert stopped_at(Asha(300, 1200, CURVES), STEPS, (0.6, 0.6, 0.6)) == 300


def test_asha_knows_the_trials_that_ended_from_their_own_metrics(tmp_path):
    space = load_space("learning_rate", DEMO)
    rows = [row(space, n, "stopped", **{RATE: f"{n + 1}e-4"}) for n in range(len(CURVES))]
    for known, curve in zip(rows, CURVES, strict=True):
        folder = tmp_path / "trials" / known.folder
        folder.mkdir(parents=True)
        records = [
            {"stage": "finetune_tagi", "seed": seed, "step": step, "valid_loss": loss + worse}
            for step, loss in curve
            # The best so far of the first seed counts.
            for seed, worse in ((0, 0.9 * (step > 100)), (1, -9.0))
        ]
        told = [*records, {"stage": "finetune_tagi", "seed": 0, "step": 50, "loss": 1.0}]
        lines = "".join(f"{json.dumps(record)}\n" for record in told)
        (folder / "metrics.jsonl").write_text(lines, "utf-8")
    asha: Any = tune_arguments(space, DEMO, tmp_path, rows, 3)[1].scheduler
    assert stopped_at(asha, STEPS, (0.05, 0.05, 0.25)) == 300
    alone: Any = tune_arguments(space, DEMO, tmp_path, [], 3)[1].scheduler
    assert stopped_at(alone, STEPS, (0.05, 0.05, 0.25)) is None


def tuned(status: str = "TERMINATED", step: int | None = None, **fields: Any) -> Any:
    """A trial as far as rows are made of it."""
    result = {} if step is None else {
        "step": step,
        "valid_loss": 0.5,
        "adapter_parameters": 10,
        "time_total_s": 1.26,
        "done": status == "TERMINATED",
    }  # fmt: skip
    told = {
        "trial_id": "0a_00001",
        "status": status,
        "last_result": result,
        "num_failures": 0,
        "config": {"point": {"lora.rank": "8"}},
        "error_file": None,
    }
    return SimpleNamespace(**{**told, **fields})


@pytest.mark.parametrize(
    ("trial", "status", "attempts"),
    [
        (tuned("PENDING"), "waiting", 1),
        (tuned("PAUSED", 100), "waiting", 1),
        (tuned("RUNNING"), "running", 1),
        (tuned("RUNNING", 100, num_failures=1), "running", 2),
        (tuned("TERMINATED"), "waiting", 1),  # with the sweep, before it told anything
        (tuned("TERMINATED", 1200), "done", 1),
        (tuned("TERMINATED", 1200, num_failures=1), "done", 2),
        (tuned("TERMINATED", 300), "stopped", 1),
        (tuned("ERROR", num_failures=2), "failed", 2),
        (tuned("ERROR", 300, num_failures=1), "failed", 1),
    ],
)
def test_the_row_of_a_trial(trial, status, attempts):
    made = row_of(7, "key", trial, 1200)
    assert (made.number, made.folder, made.status, made.attempts) == (7, "key", status, attempts)
    assert made.step == trial.last_result.get("step", 0)
    assert made.changes == {"lora.rank": "8"}
    assert made.error == ""
    result = (0.5, 10, 1.3) if trial.last_result else (None, None, 0.0)
    assert (made.valid_loss, made.adapter_parameters, made.seconds) == result


def test_a_trial_that_the_end_of_its_sweep_ended_waits():
    trial = tuned("TERMINATED", 300)
    trial.last_result["done"] = False
    assert row_of(0, "key", trial, 1200).status == "waiting"


def test_a_trial_with_steps_of_its_own_is_done_after_these():
    for step, status in ((600, "done"), (300, "stopped")):
        trial = tuned(step=step)
        trial.last_result["steps"] = 600
        assert row_of(0, "key", trial, 1200).status == status


def test_the_settings_of_a_trial_of_optuna():
    config = {"lora.alpha": 0.5, "lora.targets": "[q, v]"}
    assert point_of(config) == {"lora.alpha": "0.5", "lora.targets": "[q, v]"}
    assert row_of(0, "key", tuned(config=config), 1200).changes == point_of(config)


def test_the_row_of_a_failed_trial_ends_with_its_errors_last_line(tmp_path):
    path = tmp_path / "error.txt"
    path.write_text('Traceback:\n  File "x"\nConfigError: lora.rank=0: set it\n\n', "utf-8")
    told = "ConfigError: lora.rank=0: set it"
    assert row_of(0, "key", tuned("ERROR", error_file=str(path)), 1200).error == told
    again = row_of(0, "key", tuned("PENDING", error_file=str(path), num_failures=1), 1200)
    assert (again.status, again.attempts, again.error) == ("waiting", 2, told)
    well = row_of(0, "key", tuned(step=1200, error_file=str(path)), 1200)
    assert (well.status, well.error) == ("done", "")
    gone = tuned("ERROR", error_file=str(tmp_path / "gone"))
    assert row_of(0, "key", gone, 1200).error == ""


def board_of(folder: Path, said: list[str], before: Sequence[TrialRow] = ()) -> Board:
    coming = {"key 4": 3, "key 8": 1}
    return Board(
        folder, before, coming, lambda point: f"key {point['lora.rank']}", 1200, said.append
    )


def at(rank: int, *given: Any, **fields: Any) -> Any:
    config = {"point": {"lora.rank": str(rank)}}
    return tuned(*given, trial_id=f"trial {rank}", config=config, **fields)


def test_the_board_keeps_the_table_and_shows_it_when_a_trial_ends(tmp_path):
    said: list[str] = []
    board = board_of(tmp_path, said)
    first, second = at(8, "RUNNING"), at(4, "PENDING")
    board.on_step_end(0, [first, second])
    (table,) = tmp_path.iterdir()
    assert table.name == "trials.csv"
    assert [one.status for one in read_trials(table)] == ["running", "waiting"]
    before = len(said)
    first.status, first.last_result = "TERMINATED", tuned(step=300).last_result
    board.on_trial_complete(1, [first, second], first)
    assert [(one.status, one.step) for one in read_trials(table)] == [
        ("stopped", 300),
        ("waiting", 0),
    ]
    assert len(said) == before + 1
    assert "stopped early" in said[-1]
    second.status, second.num_failures = "ERROR", 2
    board.on_trial_error(2, [first, second], second)
    assert [one.status for one in read_trials(table)] == ["stopped", "failed"]
    assert "1 failed" in said[-1]
    written, told = table.stat().st_mtime_ns, len(said)
    board.on_trial_error(3, [first, second], second)  # nothing is new
    assert (table.stat().st_mtime_ns, len(said)) == (written, told)


def test_trials_keep_their_numbers_over_starts(tmp_path):
    known = row_of(0, "key 2", at(2, "TERMINATED", 1200), 1200)
    board = board_of(tmp_path, [], [known])
    trials = [at(16, "RUNNING"), at(4, "RUNNING"), at(8, "PENDING")]
    board.on_step_end(0, trials)
    rows = read_trials(tmp_path / "trials.csv")
    assert rows[0] == known
    # Three and one were theirs before; nobody had two.
    assert [(one.number, one.folder) for one in rows[1:]] == [
        (1, "key 8"),
        (2, "key 16"),
        (3, "key 4"),
    ]
