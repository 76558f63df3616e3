"""Sweeps: Ray Tune tries settings of finetuning, each trial a run of its own, and compares them on
the validation tasks; the best one and the recipe's own are then scored on the held-out tasks, once.

`<storage>/<recipe>_<space>/` holds `shared/` (shards, teachers), `trials/<key>/` (runs),
`trials.csv`, `best.yaml` and `sweep.html`; `tune/` is Ray Tune's scratch. The same command continues
a sweep.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from ray import tune

from tagi_ray import history, pipeline, recipes, shared_runs
from tagi_ray.cluster import connect
from tagi_ray.config import Experiment
from tagi_ray.errors import ConfigError, RunConflictError, TagiError, TrainingError
from tagi_ray.footprint import meta_model
from tagi_ray.json_files import write_whole
from tagi_ray.launch import answer, fit, release
from tagi_ray.pipeline import Say
from tagi_ray.recipes.yaml_source import parse
from tagi_ray.report import read_records
from tagi_ray.shards import read_manifest
from tagi_ray.space import METHOD, Space, as_text, own_texts
from tagi_ray.stages import StageSpec
from tagi_ray.sweep_report import write_sweep_report
from tagi_ray.teacher_logits import write_teacher_logits
from tagi_ray.trials import (
    ENDED,
    TrialRow,
    best,
    leaderboard,
    pareto,
    read_trials,
    shown_changes,
    shown_loss,
)
from tagi_ray.tuning import (
    TRIALS,
    Board,
    Point,
    key_of,
    left,
    numbers,
    own_row,
    point_of,
    tune_arguments,
)

BEST, SPACE, PAGE, LOCK = "best.yaml", "space.yaml", "sweep.html", ".lock"
HEAD = "node:__internal_head__"
"""Resource of the node that a job's driver is on: trials' drivers stay there, where Ray Train's
controllers are as safe as the job is."""
_RAY_TUNE = {
    "RAY_AIR_NEW_OUTPUT": "0",  # its tables; the leaderboard is ours
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends the job, as of any other
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}

logger = logging.getLogger(__name__)


def sweep(experiment: Experiment, space: Space, say: Say = print) -> Path:
    """Try the space's settings of a recipe; return the path of `sweep.html`.

    Raises ConfigError where values of the space do not fit each other, RunConflictError where the
    folder holds a sweep of other settings or one that runs, TrainingError where no trial took all
    its steps.
    """
    left(space, experiment, [])
    given = experiment.model_copy(update={"name": f"{experiment.name}_{space.name}"})
    located, folder = pipeline.open_run(given)
    _keep_space(folder / SPACE, space)
    # Paths as they were given: a submitted job finds the same files elsewhere each time.
    pinned = given.backbone.model_copy(update={"revision": located.backbone.revision})
    base = given.model_copy(update={"backbone": pinned})
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise RunConflictError([
            f"{folder}: another job runs this sweep: wait for its end, or give another name=..."
        ]) from error  # fmt: skip
    try:
        concurrent = connect(base, space.concurrent)
        try_all(base, space, folder, concurrent, say)
        return _conclude(base, experiment, space, folder, say)
    finally:
        lock.release()


def _conclude(
    base: Experiment, experiment: Experiment, space: Space, folder: Path, say: Say
) -> Path:
    """Write what came out of the trials, score what is compared on the held-out tasks."""
    rows = read_trials(folder / TRIALS)
    say(leaderboard(rows))
    first, own = best(rows), own_row(space, base, rows)
    commands = [
        f"python jobs/sweep.py {experiment.name} --space {space.name}",
        f"python jobs/finetune.py {folder / BEST}",
    ]

    def page(scores: Mapping[str, Any] | None) -> Path:
        return write_sweep_report(
            folder / PAGE,
            base.name,
            rows,
            default=own_texts(space, experiment),
            space=as_text(space),
            test_scores=scores,
            commands=commands,
        )

    page(None)
    if first is None:
        reasons = sorted({row.error for row in rows if row.error})
        raise TrainingError("\n".join([f"{folder}: no trial took all its steps", *reasons]))
    _write_best(folder / BEST, experiment, space, own, first)
    if len(space.objectives) > 1:
        told = "\n".join(f"  {shown_loss(r)}  {r.adapter_parameters:,}" for r in pareto(rows))
        say(f"valid loss and adapter parameters of trials that none beats in both:\n{told}")
    scores, failures = _score(base, folder, {"default": own, "best": first}, space, say)
    written = page(scores or None)
    if failures:
        raise TrainingError("\n".join(failures))
    return written


def _keep_space(path: Path, space: Space) -> None:
    """Note a new sweep's space; refuse a sweep that was begun with another one."""
    if not path.exists():
        write_whole(path, as_text(space))
        return
    was, now = parse(path.read_text("utf-8")).value, parse(as_text(space)).value
    if {**was, **{field: now[field] for field in ("concurrent", "retries")}} != now:
        raise RunConflictError([
            f"{path}: this sweep was begun with another space: give another name=..., or that space"
        ])  # fmt: skip


def _check_validation(base: Experiment, folder: Path, space: Space, maker: Any) -> None:
    """Make the data that trials without other data share; refuse those without validation tasks."""
    trial = shared_runs.trial_run(base, folder, "own", {}, space.seeds)
    run = shared_runs.parts(base, folder, trial)["data"]
    answer(maker.make.remote("data", run, {}))
    if not read_manifest(Path(run.storage) / run.name / "shards").splits["valid"].tasks:
        raise ConfigError([
            f"data.valid_fraction={base.data.valid_fraction:g} leaves no validation task, on which"
            " trials are compared: raise it"
        ])  # fmt: skip


def try_all(base: Experiment, space: Space, folder: Path, concurrent: int, say: Say) -> None:
    """Run the trials that are left."""
    rows = read_trials(folder / TRIALS) if (folder / TRIALS).exists() else []
    known = [row for row in rows if row.status in ENDED]
    rest = left(space, base, rows)
    count = rest if isinstance(rest, int) else len(rest)
    if count <= 0:
        return
    for name, value in _RAY_TUNE.items():
        os.environ.setdefault(name, value)
    before = f", {len(known)} of them known" if known else ""
    say(f"sweep: {count + len(known)} trials{before}, {concurrent} at a time, in {folder}")
    maker, here = shared_runs.start_maker(), os.getcwd()
    _check_validation(base, folder, space, maker)
    state = folder / "tune"
    shutil.rmtree(state, ignore_errors=True)

    def trial(config: Mapping[str, Any]) -> None:
        os.chdir(here)  # Ray Tune starts it elsewhere
        run_trial(point_of(config), base, space, folder, maker)

    params, tuning = tune_arguments(space, base, folder, rows, concurrent)
    board = Board(
        folder,
        known,
        numbers(space, base, rows),
        lambda point: key_of(space, base, point),
        base.finetune.steps,
        say,
    )
    tune.Tuner(
        tune.with_resources(trial, tune.PlacementGroupFactory([{HEAD: 0.001}])),
        param_space=params,
        tune_config=tuning,
        run_config=tune.RunConfig(
            name=state.name,
            storage_path=str(folder),
            verbose=0,
            callbacks=[board],
            failure_config=tune.FailureConfig(max_failures=space.retries),
        ),
    ).fit()
    for row in read_trials(folder / TRIALS):
        release(folder / "trials" / row.folder)


def run_trial(point: Point, base: Experiment, space: Space, folder: Path, maker: Any) -> None:
    """Train one trial and report its validation losses to Ray Tune, in whose process this runs.

    One that was interrupted continues from its last checkpoint, one that is finished has only its
    result to report.
    """
    key = key_of(space, base, point)
    answer(maker.claim.remote(key, tune.get_context().get_trial_id(), os.getpid()))
    trial = shared_runs.trial_run(base, folder, key, point, space.seeds)
    made: dict[shared_runs.Part, Experiment] = {}
    for part, run in shared_runs.parts(base, folder, trial).items():
        answer(maker.make.remote(part, run, made))
        made[part] = run
    shared_runs.link_parts(trial, made)
    trial, run_folder = pipeline.begin(trial, logger.info)
    spec = StageSpec(trial, "finetune", run_folder, trial.seeds[0], METHOD)
    sites, rank = meta_model(trial, "finetune").backbone.sites, trial.lora.rank
    size, steps = sum(rank * (site.d_in + site.d_out) for site in sites), spec.settings.steps

    def report(step: int) -> None:
        told = [
            record
            for record in read_records(run_folder / history.METRICS)
            if (record["stage"], record["seed"]) == (spec.name, spec.seed)
        ]
        losses = [r["valid_loss"] for r in told if "valid_loss" in r and r["step"] <= step]
        result = {"step": step, "steps": steps, "adapter_parameters": size}
        tune.report({**result, "valid_loss": min(losses)})

    def seen(record: Mapping[str, Any]) -> None:
        # The last step only when its checkpoint is there: at it the scheduler ends the trial.
        if "valid_loss" in record and record["step"] < record["steps"]:
            report(record["step"])

    write_teacher_logits([spec.varied], run_folder, logger.info)
    release(run_folder)  # where another attempt was ended, its workers may still write
    fit(spec, logger.info, seen)
    report(steps)


def _write_best(
    path: Path, experiment: Experiment, space: Space, own: TrialRow | None, first: TrialRow
) -> None:
    """Write the recipe with the best trial's changes, as `finetune` takes it."""
    changes = [f"{field}={value}" for field, value in first.changes.items()]
    name = f"{experiment.name}_{space.name}_best"
    settings = recipes.changed(experiment, [*changes, f"name={name}"])
    told = (
        f"# {shown_changes(first)}\n# valid loss {shown_loss(first)} (trial {first.number}); the"
        f" recipe's own settings: {shown_loss(own) if own else '-'}\n"
    )
    write_whole(path, told + recipes.dump(settings))


def _score(
    base: Experiment,
    folder: Path,
    rows: Mapping[str, TrialRow | None],
    space: Space,
    say: Say,
) -> tuple[dict[str, Any], list[str]]:
    """Train the named trials with all seeds and score them on the held-out tasks.

    Returns their scores, and why there are none of some.
    """
    scores: dict[str, Any] = {}
    failures: list[str] = []
    for name, row in rows.items():
        if row is None or row.status == "failed":
            continue
        trial = shared_runs.trial_run(base, folder, row.folder, row.changes, space.seeds)
        path = Path(trial.storage) / trial.name / "scores.json"
        try:
            if not path.exists():
                say(f"scoring {name} (trial {row.number}) with {len(space.seeds)} seeds")
                pipeline.finetune(trial, say)
        except TagiError as error:
            failures.append(f"{name} (trial {row.number}) could not be scored: {error}")
            continue
        scores[name] = json.loads(path.read_text("utf-8"))["systems"][METHOD]
    return scores, failures
