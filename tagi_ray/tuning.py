"""What Ray Tune is told of a sweep, and what is kept of its trials.

`trials.csv` and the trials' own folders are the truth: every start of a sweep gives Ray Tune what
is left to do, and tells searcher and scheduler what is known. A trial's key, which is also its
folder's name, is a hash of its settings.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler

from tagi_ray import recipes
from tagi_ray.config import Experiment
from tagi_ray.errors import ConfigError
from tagi_ray.history import METRICS
from tagi_ray.launch import release
from tagi_ray.recipes.validate import COMMAND_LINE
from tagi_ray.recipes.yaml_source import inline, parse
from tagi_ray.report import read_records
from tagi_ray.shared_runs import runs
from tagi_ray.space import Domain, Space, own_texts, own_values, texts
from tagi_ray.trials import ENDED, TrialRow, leaderboard, loss_of, write_trials

TRIALS = "trials.csv"
DRAWS = 50
"""Draws for each new point of a random search, until its space counts as exhausted."""
TELL_SECONDS = 60.0
"""Between two leaderboards while no trial ends."""
LOOK_SECONDS = 1.0
"""Between two looks at all trials."""
LEAVE_SECONDS = 10.0
"""After which a trial's process is taken to have ended."""
REDUCTION = 3
"""Of the trials at a step, the share that the scheduler lets go on is one of so many."""
STUDY = "sweep"

Point = Mapping[str, str]
"""Dotted field -> value as YAML text."""


def key_of(space: Space, base: Experiment, point: Point) -> str:
    """Return the key of a trial's settings, however their values are written."""
    run = recipes.changed(base, [f"{field}={value}" for field, value in point.items()])
    told = json.dumps(own_values(space, run), sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()[:10]


def points(space: Space, base: Experiment) -> Iterator[dict[str, str]]:
    """Yield the trials' settings of a grid or a random search: the recipe's own, then others.

    A pure function of space and recipe; no two are the same. Raises ConfigError at values that do
    not fit each other.
    """
    import numpy as np

    if space.search == "grid":
        lists = [[inline(value) for value in one.values()] for one in space.space.values()]
        drawn = (
            dict(zip(space.space, values, strict=True)) for values in itertools.product(*lists)
        )
    else:
        generator = np.random.default_rng(space.seed)
        domains = {field: tune_domain(domain) for field, domain in space.space.items()}
        drawn = (
            texts({f: one.sample(random_state=generator) for f, one in domains.items()})
            for _ in range(DRAWS * space.trials)
        )
    written: set[tuple[str, ...]] = set()
    seen: set[str] = set()
    for point in itertools.chain([own_texts(space, base)], drawn):
        if tuple(point.values()) in written:
            continue
        written.add(tuple(point.values()))
        try:
            key = key_of(space, base, point)
        except ConfigError as error:
            told = " ".join(f"{field}={value}" for field, value in point.items())
            where = f"space {space.name} with {told}"
            raise ConfigError(
                [p.replace(COMMAND_LINE, where, 1) for p in error.problems]
            ) from error
        # The same settings may be written in several ways: 5 and 5.0.
        if key not in seen:
            seen.add(key)
            yield point
        if len(seen) == space.count:
            return


def tune_domain(domain: Domain, *own: Any) -> Any:
    """Return a domain of Ray Tune; values of lists are YAML text, and the recipe's `own` joins."""
    if domain.uniform:
        return tune.uniform(*domain.uniform)
    if domain.log_uniform:
        return tune.loguniform(*domain.log_uniform)
    if domain.integers:
        low, high = domain.integers
        return tune.randint(low, high + 1)
    more = [value for value in own if not domain.holds(value)]
    return tune.choice([inline(value) for value in (*domain.values(), *more)])


def point_of(config: Mapping[str, Any]) -> Point:
    """Return a trial's settings from what Ray Tune has of it."""
    return texts(config.get("point", config))


def left(space: Space, base: Experiment, rows: Sequence[TrialRow]) -> list[dict[str, str]] | int:
    """Return what is to be tried yet, given all that is known of earlier trials.

    The points of a grid or a random search; for `tpe` the number of trials.
    """
    ended = {row.folder for row in rows if row.status in ENDED}
    if space.search == "tpe":
        return space.trials - sum(row.status in ENDED for row in rows)
    return [point for point in points(space, base) if key_of(space, base, point) not in ended]


def tune_arguments(
    space: Space, base: Experiment, folder: Path, rows: Sequence[TrialRow], concurrent: int
) -> tuple[dict[str, Any], tune.TuneConfig]:
    """Return the parameter space and the configuration that Ray Tune gets at a start."""
    from ray.tune.search.basic_variant import BasicVariantGenerator

    rest = left(space, base, rows)
    told: dict[str, Any] = {}
    if isinstance(rest, int):
        params: dict[str, Any] = {}
        told = {"max_concurrent_trials": concurrent, "num_samples": rest}
        search = _optuna(space, base, rows)
    else:
        params = {"point": tune.grid_search(rest)}
        search = BasicVariantGenerator(max_concurrent=concurrent)
    scheduler = None
    if space.scheduler == "asha":
        curves = [_curve(folder / "trials" / row.folder) for row in rows if row.status in ENDED]
        stage = base.finetune
        scheduler = Asha(stage.valid_every, stage.steps, curves)
    return params, tune.TuneConfig(
        search_alg=search, scheduler=scheduler, trial_dirname_creator=_trial_id, **told
    )


def _optuna(space: Space, base: Experiment, rows: Sequence[TrialRow]) -> Any:
    """Return Optuna's search, which knows the trials that ended, and begins with those that were
    begun; the recipe's own settings come first.
    """
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    own, own_text = own_values(space, base), own_texts(space, base)
    domains = {field: tune_domain(domain, own[field]) for field, domain in space.space.items()}
    distributions: dict[str, Any] = OptunaSearch.convert_search_space(domains)
    storage = optuna.storages.InMemoryStorage()
    lower: list[Any] = ["minimize"] * len(space.objectives)
    study = optuna.create_study(storage=storage, study_name=STUDY, directions=lower)

    def values(point: Point) -> dict[str, Any]:
        return {
            field: parse(point[field]).value
            if domain.ends
            else inline(domain.listed(parse(point[field]).value))
            for field, domain in space.space.items()
        }

    begun = [row.changes for row in rows if row.status not in ENDED]
    for row in rows:
        if row.status in ENDED and row.adapter_parameters is not None:
            results = {"valid_loss": loss_of(row), "adapter_parameters": row.adapter_parameters}
            told = [float(results[name]) for name in space.objectives]
            study.add_trial(
                optuna.trial.create_trial(
                    values=told, params=values(row.changes), distributions=distributions
                )
            )
    if not rows:
        begun = [own_text]
    for point in begun:
        study.enqueue_trial(values(point))
    single = len(space.objectives) == 1
    return OptunaSearch(
        space=distributions,
        metric=space.objectives[0] if single else list(space.objectives),
        mode="min" if single else ["min"] * len(space.objectives),
        storage=storage,
        study_name=STUDY,
        # An earlier start's would draw its points again.
        seed=space.seed + len(rows),
    )


class Asha(ASHAScheduler):
    """Ray Tune's ASHA, which knows how the trials of earlier starts went."""

    def __init__(
        self, grace: int, steps: int, curves: Sequence[Sequence[tuple[int, float]]]
    ) -> None:
        """curves: (step, best validation loss so far) of each trial that ended."""
        super().__init__(
            time_attr="step", metric="valid_loss", mode="min", max_t=steps, grace_period=grace,
            reduction_factor=REDUCTION,
        )  # fmt: skip
        for number, curve in enumerate(curves):
            known = _Known(f"known_{number}")
            for step, loss in curve:
                self._brackets[0].on_result(known, step, -loss)  # pyright: ignore[reportArgumentType]


class _Known:
    """A trial of an earlier start, as ASHA's brackets tell trials apart."""

    def __init__(self, trial_id: str) -> None:
        self.trial_id = trial_id


def _curve(folder: Path) -> list[tuple[int, float]]:
    records = [r for r in read_records(folder / METRICS) if "valid_loss" in r]
    first = min((r["seed"] for r in records), default=None)
    losses = [(r["step"], r["valid_loss"]) for r in records if r["seed"] == first]
    steps, values = zip(*sorted(losses), strict=True) if losses else ((), ())
    return list(zip(steps, itertools.accumulate(values, min), strict=True))


def _trial_id(trial: Any) -> str:
    return trial.trial_id


class Board(tune.Callback):
    """Keeps `trials.csv` while a sweep runs, and shows the leaderboard when a trial ends."""

    def __init__(
        self,
        folder: Path,
        rows: Sequence[TrialRow],
        numbers: Mapping[str, int],
        key: Callable[[Point], str],
        steps: int,
        say: Callable[[str], None],
    ) -> None:
        """rows: of trials that ended before; numbers: by key, of those that are known to come."""
        self._folder, self._key, self._steps, self._say = folder, key, steps, say
        self._before = list(rows)
        self._coming = dict(numbers)
        self._numbers: dict[str, tuple[int, str]] = {}
        self._rows: list[TrialRow] = []
        self._looked, self._told = 0.0, (0.0, 0)
        self._leaving: dict[str, tuple[float, int | None]] = {}
        self._ends: dict[str, str] = {}

    def on_step_end(self, iteration: int, trials: Sequence[Any], **info: Any) -> None:
        """Called between two events of a sweep."""
        if time.monotonic() - self._looked > LOOK_SECONDS:
            self._look(trials)

    def on_trial_complete(
        self, iteration: int, trials: Sequence[Any], trial: Any, **info: Any
    ) -> None:
        """Called when a trial has ended, by itself or early."""
        self._leave(trials, trial, "TERMINATED")

    def on_trial_error(
        self, iteration: int, trials: Sequence[Any], trial: Any, **info: Any
    ) -> None:
        """Called when a trial has failed for good."""
        self._leave(trials, trial, "ERROR")

    def on_experiment_end(self, trials: Sequence[Any], **info: Any) -> None:
        """Called once, when Ray Tune is through."""
        self._look(trials)

    def _leave(self, trials: Sequence[Any], trial: Any, status: str) -> None:
        self._ends[trial.trial_id] = status  # Ray Tune itself notes it a little later
        pid = (trial.last_result or {}).get("pid")
        self._look(trials)
        self._leaving[self._number(trial)[1]] = (time.monotonic(), pid)

    def _look(self, trials: Sequence[Any]) -> None:
        self._looked = time.monotonic()
        for name, (since, pid) in list(self._leaving.items()):
            # Not before its process has ended, which would take the loss of its workers for a fault.
            if (pid and not runs(pid)) or self._looked - since > LEAVE_SECONDS:
                release(self._folder / "trials" / name)
                del self._leaving[name]
        now = [
            row_of(*self._number(one), one, self._steps, self._ends.get(one.trial_id))
            for one in trials
        ]
        rows = sorted([*self._before, *now], key=lambda row: row.number)
        if rows == self._rows:
            return
        self._rows = rows
        write_trials(self._folder / TRIALS, rows)
        ended = sum(row.status in (*ENDED, "failed") for row in rows)
        since, before = self._told
        if ended > before or self._looked - since > TELL_SECONDS:
            self._told = self._looked, ended
            self._say(leaderboard(rows))

    def _number(self, trial: Any) -> tuple[int, str]:
        """Return a trial's number, which it keeps, and its key."""
        if trial.trial_id not in self._numbers:
            key = self._key(point_of(trial.config))
            taken = {row.number for row in self._before}
            taken |= {number for number, _ in self._numbers.values()} | {*self._coming.values()}
            number = self._coming.pop(key, None)
            if number is None:
                number = next(n for n in itertools.count() if n not in taken)
            self._numbers[trial.trial_id] = (number, key)
        return self._numbers[trial.trial_id]


def row_of(number: int, key: str, trial: Any, steps: int, end: str | None = None) -> TrialRow:
    """Return what Ray Tune knows of a trial; one that only Ray Tune's own end has ended waits.

    end: its status where it has just ended, and Ray Tune has not noted it yet.
    """
    now = end or trial.status
    result: Mapping[str, Any] = trial.last_result or {}
    step, statuses = result.get("step", 0), {"RUNNING": "running", "ERROR": "failed"}
    status: Any = statuses.get(now, "waiting")
    if now == "TERMINATED" and step == result.get("steps", steps):
        status = "done"
    elif now == "TERMINATED" and (end or result.get("done")):
        status = "stopped"
    return TrialRow(
        number=number,
        folder=key,
        status=status,
        step=step,
        valid_loss=result.get("valid_loss"),
        adapter_parameters=result.get("adapter_parameters"),
        seconds=round(result.get("time_total_s", 0.0), 1),
        attempts=trial.num_failures + (now != "ERROR"),
        changes=dict(point_of(trial.config)),
        error="" if status in ENDED else _last_words(trial.error_file),
    )


def _last_words(path: str | None) -> str:
    """Return the last line of a failed trial's error."""
    if not path or not Path(path).exists():
        return ""
    lines = [line.strip() for line in Path(path).read_text("utf-8").splitlines() if line.strip()]
    return lines[-1] if lines else ""


def numbers(space: Space, base: Experiment, rows: Sequence[TrialRow]) -> dict[str, int]:
    """Return the numbers of trials that are known to come, by key."""
    if space.search == "tpe":
        return {row.folder: row.number for row in rows if row.status not in ENDED}
    return {key_of(space, base, point): i for i, point in enumerate(points(space, base))}


def own_row(space: Space, base: Experiment, rows: Sequence[TrialRow]) -> TrialRow | None:
    """Return the trial with the recipe's own settings."""
    own = key_of(space, base, own_texts(space, base))
    return next((row for row in rows if row.folder == own), None)
