"""What the jobs do: each runs what is missing before it, and continues what was begun.

A run is a folder; its name is its identity. `config.yaml` there holds the settings it was started
with, and a job with others is refused. Each function returns the path of what it made.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from tagi_ray import checkpoint, recipes
from tagi_ray.backbone import identify
from tagi_ray.config import Experiment
from tagi_ray.errors import ConfigError, RunConflictError
from tagi_ray.evaluate import evaluate as score_systems
from tagi_ray.generate import SYSTEM, generate_adapters, instructed_task, read_instructions
from tagi_ray.json_files import write_whole
from tagi_ray.launch import connect, fit, run_remotely
from tagi_ray.report import read_records, scores_table, write_report
from tagi_ray.shard_writer import write_shards
from tagi_ray.shards import MANIFEST, read_manifest, read_tasks_of
from tagi_ray.stages import BACKBONE, REPORTING, StageSpec, backbone_weights, trained_bank
from tagi_ray.systems import KNOWN_SYSTEMS, Weights
from tagi_ray.tasks import Task
from tagi_ray.teachers import FOLDERS, Role, finished, teacher_names, write_teachers
from tagi_ray.vocabulary import TOKENIZER, prepare_tokenizer

logger = logging.getLogger(__name__)

Say = Callable[[str], None]
FREE_TO_CHANGE = frozenset({"storage", "resources", "evaluation"})
"""Sections that may differ when a run is continued: they change no trained weight."""
KEYWORDS = frozenset({"demo", "random", "train"})
"""Values of backbone.path and backbone.tokenizer that are no paths."""


def prepare_data(experiment: Experiment, say: Say = print) -> Path:
    """Write the shards and the tokenizer of a run, unless they are there."""
    experiment, run = open_run(experiment)
    connect(experiment)
    return _prepare(experiment, run, say)


def train_teachers(experiment: Experiment, say: Say = print) -> Path:
    """Train the teachers of the training tasks that have none yet."""
    experiment, run = open_run(experiment)
    connect(experiment)
    _prepare(experiment, run, say)
    _train(experiment, run, ["train"], [], say)
    return run / FOLDERS["train"]


def finetune(experiment: Experiment, say: Say = print) -> Path:
    """Train all that a run compares, score it on the held-out tasks, export their adapters."""
    experiment, run = open_run(experiment)
    systems = experiment.evaluation.systems
    connect(experiment)
    _prepare(experiment, run, say)
    roles: list[Role] = []
    if experiment.teachers.enabled:
        roles.append("train")
    if "teacher" in systems:
        roles.append("oracle")
    _train(
        experiment, run, roles, _metatrain(experiment, run) if "metatrain" in systems else [], say
    )
    fit(
        [
            StageSpec(experiment, "finetune", run, seed, variant)
            for seed in experiment.seeds
            for variant in experiment.variants
        ],
        say,
    )
    _score(experiment, run, say)
    if SYSTEM in experiment.variants:
        _export(experiment, run, say)
    return write_report(run)


def evaluate(experiment: Experiment, say: Say = print) -> Path:
    """Score a trained run again, with the systems that the settings name."""
    experiment, run = open_run(experiment, begin=False)
    connect(experiment)
    _score(experiment, run, say)
    return write_report(run)


def generate(
    experiment: Experiment,
    instruction: str | None = None,
    path: str | None = None,
    output: str | None = None,
    say: Say = print,
) -> Path:
    """Write the adapters of one instruction, or of each in a JSONL file, with a trained run.

    In this process: it takes a moment, and this machine is where the adapters are wanted.
    """
    experiment, run = open_run(experiment, begin=False)
    tasks = [instructed_task(instruction)] if instruction else read_instructions(Path(path or ""))
    weights = trained_weights(experiment, run, SYSTEM, experiment.seeds[0])
    folder = _lasting("--output", output) if output else run / "adapters"
    written = generate_adapters(experiment, run, weights, tasks, folder, _alone(run))
    say(f"adapters: {len(written)} in {folder}")
    return folder


def open_run(experiment: Experiment, *, begin: bool = True) -> tuple[Experiment, Path]:
    """Return the settings with absolute local paths, for workers elsewhere, and the run's folder.

    The folder is made on the run's first job, which may `begin` it. Raises ConfigError where there
    is none otherwise, RunConflictError when it belongs to a run with other settings or backbone.
    """
    experiment = _located(experiment)
    run = _lasting("storage", experiment.storage) / experiment.name
    settings, backbone = run / "config.yaml", run / BACKBONE
    if not begin and not settings.exists():
        raise ConfigError([
            f"{run}: there is no such run: check name={experiment.name} and"
            f" storage={experiment.storage}, or train it first with `python jobs/finetune.py`"
        ])  # fmt: skip
    if settings.exists():
        differences = _differences(yaml.safe_load(settings.read_text("utf-8")), _dumped(experiment))
        if differences:
            raise RunConflictError([
                f"{settings}: the run {experiment.name!r} was started with other settings"
                " (give another name=..., or the same settings):",
                *differences,
            ])  # fmt: skip
    weights, known = identify(experiment.backbone), backbone_weights(run)
    if known not in (None, weights):
        raise RunConflictError([
            f"{backbone}: the run {experiment.name!r} was started with other weights in"
            f" backbone.path={experiment.backbone.path} ({known}, now {weights}): give another"
            " name=..., or bring those weights back"
        ])  # fmt: skip
    run.mkdir(parents=True, exist_ok=True)
    if known is None:
        write_whole(backbone, json.dumps({"path": experiment.backbone.path, "weights": weights}))
    if not settings.exists():
        write_whole(settings, recipes.dump(experiment))
    return experiment, run


def _located(experiment: Experiment) -> Experiment:
    """Return the settings with an absolute path for every local one that exists."""

    def absolute(section: Any, *names: str) -> Any:
        values = {name: getattr(section, name) for name in names}
        found = {
            name: str(Path(value).absolute())
            for name, value in values.items()
            if value and value not in KEYWORDS and Path(value).exists()
        }
        return section.model_copy(update=found)

    return experiment.model_copy(
        update={
            "data": absolute(experiment.data, "path", "train_tasks_file", "test_tasks_file"),
            "backbone": absolute(experiment.backbone, "path", "tokenizer"),
        }
    )


def _lasting(field: str, path: str) -> Path:
    """Return a folder that is written to as an absolute path.

    Raises ConfigError for a relative one in a submitted job, which starts in a copy of the
    submitted folder that its cluster deletes.
    """
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    if not Path(path).is_absolute() and (job.get("runtime_env") or {}).get("working_dir"):
        raise ConfigError([
            f"{field}={path} would be lost: `ray job submit --working-dir` starts the job in a"
            f" temporary copy of that folder; set {field}=/a/shared/folder"
        ])  # fmt: skip
    return Path(path).absolute()


def _dumped(experiment: Experiment) -> dict[str, Any]:
    return yaml.safe_load(recipes.dump(experiment))


def _differences(was: Any, now: Any, where: tuple[str, ...] = ()) -> list[str]:
    if not FREE_TO_CHANGE.isdisjoint(where[:1]) or not REPORTING.isdisjoint(where[1:2]):
        return []
    if isinstance(was, dict) and isinstance(now, dict):
        return [
            line
            for key in sorted({*was, *now})
            for line in _differences(was.get(key), now.get(key), (*where, key))
        ]
    return [] if was == now else [f"  {'.'.join(where)}: was {was}, is {now}"]


def _prepare(experiment: Experiment, run: Path, say: Say) -> Path:
    shards, tokenizer = run / "shards", run / "tokenizer"
    if not (shards / MANIFEST).exists():
        manifest = write_shards(experiment.data, shards, experiment.seeds[0])
        counts = ", ".join(f"{len(index.tasks)} {name}" for name, index in manifest.splits.items())
        say(f"data: {counts} tasks in {shards}")
    if not (tokenizer / TOKENIZER).exists():
        prepare_tokenizer(experiment.backbone, shards, tokenizer)
    return shards


def _metatrain(experiment: Experiment, run: Path, seed: int | None = None) -> list[StageSpec]:
    """Return the stages of the instruction-tuned baseline: every rate, of one seed or of all.

    Raises ConfigError where there are several rates and no validation task to choose on.
    """
    rates = experiment.metatrain.learning_rates
    if len(rates) > 1 and not read_manifest(run / "shards").splits["valid"].tasks:
        raise ConfigError([
            f"metatrain.learning_rates has {len(rates)} rates, and there is no validation task to"
            " choose on: set data.valid_fraction, or give one rate"
        ])  # fmt: skip
    return [
        StageSpec(experiment, "metatrain", run, one, learning_rate=rate)
        for one in (experiment.seeds if seed is None else [seed])
        for rate in rates
    ]


def _train(
    experiment: Experiment, run: Path, roles: Sequence[Role], more: list[StageSpec], say: Say
) -> None:
    """Train the adapters that the stores of these roles lack, each store in one bank, and `more`."""
    specs: dict[Role, StageSpec] = {}
    manifest = read_manifest(run / "shards")
    for role in roles:
        folder, kind = run / FOLDERS[role], "oracle" if role == "oracle" else "teachers"
        per = (experiment.oracle if role == "oracle" else experiment.teachers).per
        names = teacher_names(manifest, role, per)
        if finished(folder).keys() >= set(names):
            say(f"teachers: all {len(names)} are in {folder}")
        else:
            specs[role] = StageSpec(experiment, kind, run, experiment.seeds[0], slots=names)
    fit([*specs.values(), *more], say)
    for role, spec in specs.items():
        newest = checkpoint.latest(spec.checkpoints)
        assert newest is not None
        bank = trained_bank(checkpoint.load(newest)[0], experiment)
        records = [r for r in read_records(run / "metrics.jsonl") if r["stage"] == spec.name]
        write_teachers(
            run / FOLDERS[role],
            bank,
            spec.slots,
            experiment,
            role=role,
            steps=spec.settings.steps,
            final_loss=records[-1]["cross_entropy"],
            manifest=manifest,
        )
        say(f"teachers: {len(spec.slots)} written to {run / FOLDERS[role]}")


def trained_weights(experiment: Experiment, run: Path, stage: Weights, seed: int) -> Path:
    """Return the weights of a trained stage: best on the validation tasks, or else the last.

    For `metatrain`, those of its best learning rate. Raises ConfigError where there are none.
    """
    if stage == "metatrain":
        specs = _metatrain(experiment, run, seed)
    else:
        specs = [StageSpec(experiment, "finetune", run, seed, stage)]
    newest = [_finished(spec) for spec in specs]
    return checkpoint.best(min(newest, key=checkpoint.best_loss)) / checkpoint.STATE


def _finished(spec: StageSpec) -> Path:
    """Return the last checkpoint of a stage; raises ConfigError unless it has all its steps."""
    newest = checkpoint.latest(spec.checkpoints)
    progress = checkpoint.meta(newest)["progress"] if newest else {"step": 0, "done": False}
    if newest is None or not progress["done"]:
        raise ConfigError([
            f"{spec.checkpoints}: {spec.name} of seed {spec.seed} is at step {progress['step']} of"
            f" {spec.settings.steps}: run `python jobs/finetune.py` with these settings first"
        ])  # fmt: skip
    return newest


def _score(experiment: Experiment, run: Path, say: Say) -> None:
    plans = [KNOWN_SYSTEMS[system] for system in experiment.evaluation.systems]
    stages: set[Weights] = {plan.weights for plan in plans if plan.weights is not None}
    weights: dict[int, dict[Weights, Path]] = {
        seed: {stage: trained_weights(experiment, run, stage, seed) for stage in stages}
        for seed in experiment.seeds
    }
    scores = score_systems(experiment, run, weights, say)
    say(scores_table(scores))


def _export(experiment: Experiment, run: Path, say: Say) -> None:
    """Write the adapter of every held-out task, generated from its first definition."""
    tasks: list[Task] = [
        replace(one.task, definitions=one.task.definitions[:1])
        for one in read_tasks_of(run / "shards", "test")
    ]
    weights = trained_weights(experiment, run, SYSTEM, experiment.seeds[0])
    folder = run / "adapters"
    run_remotely(
        experiment, generate_adapters, experiment, run, weights, tasks, folder, _alone(run)
    )
    say(f"adapters: {len(tasks)} in {folder}")


def _alone(run: Path) -> dict[str, float] | None:
    """Return the scores of the generated adapters without fusion, where they are known."""
    path = run / "scores.json"
    found = json.loads(path.read_text("utf-8"))["systems"] if path.exists() else {}
    scores = found.get("tagi_no_fusion")
    return scores and {"exact match": scores["exact_match"], "ROUGE-L": scores["rouge_l"]}
