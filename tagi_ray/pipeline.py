"""What the jobs do: each runs what is missing before it, and continues what was begun.

A run is a folder; its name is its identity. `config.yaml` there holds the settings it was started
with, and a job with others is refused. Each function returns the path of what it made.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from tagi_ray import checkpoint, recipes
from tagi_ray.config import Experiment
from tagi_ray.errors import ConfigError, RunConflictError
from tagi_ray.evaluate import evaluate as score_systems
from tagi_ray.generate import SYSTEM, generate_adapters, instructed_task, read_instructions
from tagi_ray.launch import connect, fit, run_remotely
from tagi_ray.report import read_records, scores_table, write_report
from tagi_ray.shard_writer import write_shards
from tagi_ray.shards import MANIFEST, read_manifest, read_tasks_of
from tagi_ray.stages import StageSpec, trained_bank
from tagi_ray.systems import KNOWN_SYSTEMS, Weights
from tagi_ray.tasks import Task
from tagi_ray.teachers import FOLDERS, Role, finished, teacher_names, write_teachers
from tagi_ray.vocabulary import TOKENIZER, prepare_tokenizer

logger = logging.getLogger(__name__)

Say = Callable[[str], None]
FREE_TO_CHANGE = frozenset({"storage", "resources", "evaluation"})
"""Sections that may differ when a run is continued: they change no trained weight."""


def prepare_data(experiment: Experiment, say: Say = print) -> Path:
    """Write the shards and the tokenizer of a run, unless they are there."""
    run = open_run(experiment)
    connect(experiment)
    return _prepare(experiment, run, say)


def train_teachers(experiment: Experiment, say: Say = print) -> Path:
    """Train the teachers of the training tasks that have none yet."""
    run = open_run(experiment)
    connect(experiment)
    _prepare(experiment, run, say)
    _train(experiment, run, ["train"], [], say)
    return run / FOLDERS["train"]


def finetune(experiment: Experiment, say: Say = print) -> Path:
    """Train all that a run compares, score it on the held-out tasks, export their adapters."""
    run, systems = open_run(experiment), experiment.evaluation.systems
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
    run = open_run(experiment)
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
    """Write the adapters of one instruction, or of each in a JSONL file, with a trained run."""
    run = open_run(experiment)
    tasks = [instructed_task(instruction)] if instruction else read_instructions(Path(path or ""))
    weights = trained_weights(experiment, run, SYSTEM, experiment.seeds[0])
    folder = (Path(output) if output else run / "adapters").absolute()
    connect(experiment)
    written = run_remotely(
        experiment, generate_adapters, experiment, run, weights, tasks, folder, _alone(run)
    )
    say(f"{len(written)} adapters in {folder}")
    return folder


def open_run(experiment: Experiment) -> Path:
    """Return the folder of a run, made on its first job.

    Raises RunConflictError when its name belongs to a run with other settings.
    """
    run = Path(experiment.storage).absolute() / experiment.name
    path = run / "config.yaml"
    if path.exists():
        differences = _differences(yaml.safe_load(path.read_text("utf-8")), _dumped(experiment))
        if differences:
            raise RunConflictError([
                f"{path}: the run {experiment.name!r} was started with other settings"
                " (give another name=..., or the same settings):",
                *differences,
            ])  # fmt: skip
    else:
        run.mkdir(parents=True, exist_ok=True)
        path.write_text(recipes.dump(experiment), "utf-8")
    return run


def _dumped(experiment: Experiment) -> dict[str, Any]:
    return yaml.safe_load(recipes.dump(experiment))


def _differences(was: Any, now: Any, where: str = "") -> list[str]:
    if isinstance(was, dict) and isinstance(now, dict):
        return [
            line
            for key in sorted({*was, *now})
            if where or key not in FREE_TO_CHANGE
            for line in _differences(was.get(key), now.get(key), f"{where}.{key}".lstrip("."))
        ]
    return [] if was == now else [f"  {where}: was {was}, is {now}"]


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
    """Return the stages of the instruction-tuned baseline: every rate, of one seed or of all."""
    return [
        StageSpec(experiment, "metatrain", run, one, learning_rate=rate)
        for one in (experiment.seeds if seed is None else [seed])
        for rate in experiment.metatrain.learning_rates
    ]


def _train(
    experiment: Experiment, run: Path, roles: Sequence[Role], more: list[StageSpec], say: Say
) -> None:
    """Train the adapters that the stores of these roles lack, each store in one bank, and `more`."""
    specs: dict[Role, StageSpec] = {}
    for role in roles:
        folder, kind = run / FOLDERS[role], "oracle" if role == "oracle" else "teachers"
        per = (experiment.oracle if role == "oracle" else experiment.teachers).per
        names = teacher_names(read_manifest(run / "shards"), role, per)
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
    newest = [checkpoint.latest(spec.checkpoints) for spec in specs]
    trained = [path for path in newest if path is not None]
    if len(trained) < len(specs):
        missing = specs[newest.index(None)]
        raise ConfigError([
            f"{missing.checkpoints}: {missing.name} is not trained yet: run"
            f" `python jobs/finetune.py` with these settings first"
        ])  # fmt: skip
    return checkpoint.best(min(trained, key=checkpoint.best_loss)) / checkpoint.STATE


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
