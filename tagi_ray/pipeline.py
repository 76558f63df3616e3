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
from typing import Any, Literal

import yaml

from tagi_ray import checkpoint, corpus, recipes, telemetry
from tagi_ray.architecture import identify, is_causal
from tagi_ray.cluster import connect
from tagi_ray.config import Experiment
from tagi_ray.errors import ConfigError, RunConflictError
from tagi_ray.evaluate import evaluate as score_systems
from tagi_ray.families import check_backbone
from tagi_ray.generate import generate_adapters, instructed_task, read_instructions
from tagi_ray.hub import KEYWORDS, is_on_hub, pinned
from tagi_ray.json_files import write_whole
from tagi_ray.launch import fit, run_remotely
from tagi_ray.loggers import require_packages
from tagi_ray.remote_files import is_remote
from tagi_ray.report import read_records, scores_table, write_report
from tagi_ray.shard_writer import list_sources, write_shards
from tagi_ray.shards import MANIFEST, read_manifest, read_tasks_of
from tagi_ray.stages import (
    BACKBONE,
    RECOMPUTING,
    REPORTING,
    StageSpec,
    backbone_weights,
    last_checkpoint,
    pretrained_variant,
    trained_bank,
    trained_state,
)
from tagi_ray.systems import SYSTEM, plan_of
from tagi_ray.tasks import Task
from tagi_ray.teacher_logits import write_teacher_logits
from tagi_ray.teachers import FOLDERS, Role, finished, teacher_names, write_teachers
from tagi_ray.tuned_teacher import pinned_teachers
from tagi_ray.vocabulary import TOKENIZER, prepare_tokenizer

logger = logging.getLogger(__name__)

Say = Callable[[str], None]
FREE_TO_CHANGE = frozenset({"storage", "resources", "loggers", "evaluation"})
"""Sections that may differ when a run is continued: they change no trained weight."""


def prepare_data(experiment: Experiment, say: Say = print) -> Path:
    """Write the shards and the tokenizer of a run, unless they are there."""
    _, run = begin(experiment, say)
    return run / "shards"


def train_teachers(experiment: Experiment, say: Say = print) -> Path:
    """Train the teachers of the training tasks that have none yet."""
    experiment, run = begin(experiment, say)
    _train(experiment, run, ["train"], [], say)
    return run / FOLDERS["train"]


def pretrain(experiment: Experiment, say: Say = print) -> Path:
    """Pretrain the hypernetworks on raw text. Raises ConfigError where that is not enabled."""
    if not experiment.pretrain.enabled:
        raise ConfigError([
            "pretrain.enabled=false: finetuning would not start from what is pretrained: set"
            " pretrain.enabled=true, and pretrain.path to raw text"
        ])  # fmt: skip
    experiment, run = begin(experiment, say)
    specs = _hypernetworks(experiment, run, "pretrain")
    fit(specs, say)
    return specs[0].checkpoints


def finetune(experiment: Experiment, say: Say = print) -> Path:
    """Train all that a run compares, score it on the held-out tasks, export their adapters."""
    experiment, run = begin(experiment, say)
    systems = experiment.evaluation.systems
    roles: list[Role] = []
    if experiment.teachers.enabled:
        roles.append("train")
    if "teacher" in systems:
        roles.append("oracle")
    more = _hypernetworks(experiment, run, "pretrain") if experiment.pretrain.enabled else []
    if "metatrain" in systems:
        more += _metatrain(experiment, run)
    _train(experiment, run, roles, more, say)
    specs = _hypernetworks(experiment, run, "finetune")
    write_teacher_logits([spec.varied for spec in specs], run, say)
    fit(specs, say)
    _score(experiment, run, say)
    if SYSTEM in experiment.scored_variants() and _writable(experiment):
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
    if not _writable(experiment):
        raise ConfigError([
            f"hypernetwork.generator={experiment.varied(SYSTEM).hypernetwork.generator}: the run"
            f" {experiment.name!r} makes no adapters that could be written: take one with another"
            " generator"
        ])  # fmt: skip
    folder = recipes.lasting("--output", output) if output else run / "adapters"
    written = generate_adapters(experiment, run, weights, tasks, folder, _alone(run))
    say(f"adapters: {len(written)} in {folder}")
    return folder


def open_run(experiment: Experiment, *, begin: bool = True) -> tuple[Experiment, Path]:
    """Return the settings for workers elsewhere, and the run's folder: with absolute local paths,
    and the commit of a hub model.

    The folder is made on the run's first job, which may `begin` it. Raises ConfigError where there
    is none otherwise, RunConflictError when it belongs to a run with other settings or backbone.
    """
    if begin:
        require_packages(experiment.loggers)
    given, experiment = experiment, _located(experiment)
    run = recipes.lasting("storage", experiment.storage) / experiment.name
    settings, backbone = run / "config.yaml", run / BACKBONE
    if not begin and not settings.exists():
        raise ConfigError([
            f"{run}: there is no such run: check name={experiment.name} and"
            f" storage={experiment.storage}, or train it first with `python jobs/finetune.py`"
        ])  # fmt: skip
    if settings.exists():
        # Paths as they were given: a submitted job finds the same files elsewhere each time.
        differences = _differences(yaml.safe_load(settings.read_text("utf-8")), _dumped(given))
        if differences:
            raise RunConflictError([
                f"{settings}: the run {experiment.name!r} was started with other settings"
                " (give another name=..., or the same settings):",
                *differences,
            ])  # fmt: skip
    known = backbone_weights(run)
    noted = json.loads(backbone.read_text("utf-8")) if known else {}
    source = {"path": given.backbone.path, "revision": given.backbone.revision}
    if known and is_on_hub(source["path"]) and source.items() <= noted.items():
        # The run goes on with the commit that it was started with, wherever its branch is now.
        commit = known.rpartition("@")[2]
        found = experiment.backbone.model_copy(update={"revision": commit})
    else:
        found = pinned(experiment.backbone)
    identity = identify(found, noted)
    check_backbone(experiment.model_copy(update={"backbone": found}))
    weights = identity["weights"]
    if known not in (None, weights):
        cure = "bring those weights back"
        if is_on_hub(found.path):
            cure = f"set backbone.revision={str(known).rpartition('@')[2]}"
        raise RunConflictError([
            f"{backbone}: the run {experiment.name!r} was started with other weights in"
            f" backbone.path={found.path} ({known}, now {weights}): give another name=..., or {cure}"
        ])  # fmt: skip
    try:
        run.mkdir(parents=True, exist_ok=True)
        if noted != (identity := {**source, **identity}):
            write_whole(backbone, json.dumps(identity))
        if not settings.exists():
            write_whole(settings, recipes.dump(given))
    except OSError as error:
        raise ConfigError([
            f"storage={experiment.storage}: {run} cannot be written ({error.strerror}): give a"
            " storage=FOLDER that this machine and all workers can write to"
        ]) from error  # fmt: skip
    experiment = experiment.model_copy(update={"backbone": found})
    return pinned_teachers(experiment, run) if begin else experiment, run


def _located(experiment: Experiment) -> Experiment:
    """Return the settings with an absolute path for every local one that exists."""

    def absolute(section: Any, *names: str) -> Any:
        values = {name: getattr(section, name) for name in names}
        found = {
            name: str(Path(value).absolute())
            for name, value in values.items()
            if value and value not in KEYWORDS and not is_remote(value) and Path(value).exists()
        }
        return section.model_copy(update=found)

    return experiment.model_copy(
        update={
            "data": absolute(experiment.data, "path", "train_tasks_file", "test_tasks_file"),
            "pretrain": absolute(experiment.pretrain, "path"),
            "backbone": absolute(experiment.backbone, "path", "tokenizer"),
        }
    )


def _dumped(experiment: Experiment) -> dict[str, Any]:
    return yaml.safe_load(recipes.dump(experiment))


def _differences(was: Any, now: Any, where: tuple[str, ...] = ()) -> list[str]:
    if not FREE_TO_CHANGE.isdisjoint(where[:1]) or not REPORTING.isdisjoint(where[1:2]):
        return []
    if where[:1] == ("backbone",) and not {"revision", *RECOMPUTING}.isdisjoint(where[1:2]):
        return []  # the weights themselves are compared, and recomputing changes no result
    if isinstance(was, dict) and isinstance(now, dict):
        return [
            line
            for key in sorted({*was, *now})
            for line in _differences(was.get(key), now.get(key), (*where, key))
        ]
    return [] if was == now else [f"  {'.'.join(where)}: was {was}, is {now}"]


def begin(experiment: Experiment, say: Say) -> tuple[Experiment, Path]:
    """Open a run, connect to the cluster, and write the run's shards and tokenizer.

    What is wrong with the inputs is raised before the cluster is asked for anything.
    """
    experiment, run = open_run(experiment)
    shards, tokenizer = run / "shards", run / "tokenizer"
    written, seed = (shards / MANIFEST).exists(), experiment.seeds[0]
    sources = [] if written else list_sources(experiment.data, seed)
    fitted, causal = experiment.backbone.tokenizer == "train", is_causal(experiment.backbone)
    if not fitted and not (tokenizer / TOKENIZER).exists():
        prepare_tokenizer(experiment.backbone, shards, tokenizer, causal)
    for folder in FOLDERS.values():
        finished(run / folder)
    _write_corpus(experiment, run, say)
    connect(experiment)
    if not written:
        manifest = write_shards(experiment.data, shards, seed, sources=sources)
        counts = ", ".join(f"{len(index.tasks)} {name}" for name, index in manifest.splits.items())
        say(f"data: {counts} tasks in {shards}")
    if fitted and not (tokenizer / TOKENIZER).exists():
        prepare_tokenizer(experiment.backbone, shards, tokenizer, causal)
    _write_corpus(experiment, run, say)
    return experiment, run


def _write_corpus(experiment: Experiment, run: Path, say: Say) -> None:
    """Write the raw text of pretraining, if there is any to write yet and a tokenizer."""
    folder, tokenizer = run / corpus.FOLDER, run / "tokenizer"
    if not experiment.pretrain.enabled or (folder / MANIFEST).exists():
        return
    if not (tokenizer / TOKENIZER).exists():
        corpus.check_path(experiment.pretrain)
        return
    manifest, too_short = corpus.write_corpus(experiment.pretrain, tokenizer, folder)
    train, valid = (int(manifest.splits[split].count.sum()) for split in ("train", "valid"))
    say(f"corpus: {train} texts, {valid} more to validate on, {too_short} too short, in {folder}")


def _hypernetworks(
    experiment: Experiment, run: Path, kind: Literal["pretrain", "finetune"]
) -> list[StageSpec]:
    """Return the stages of the variants; those in which pretraining sees no difference share one."""
    names = experiment.scored_variants()
    if kind == "pretrain":
        pretrained = (name for name in names if experiment.varied(name).pretrain.enabled)
        names = tuple(dict.fromkeys(pretrained_variant(experiment, name) for name in pretrained))
    return [
        StageSpec(experiment, kind, run, seed, name) for seed in experiment.seeds for name in names
    ]


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
            telemetry.count_up_to("teachers_done", len(names), run=experiment.name, role=role)
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
        telemetry.count_up_to("teachers_done", len(spec.slots), run=experiment.name, role=role)


def trained_weights(experiment: Experiment, run: Path, stage: str, seed: int) -> Path:
    """Return a variant's trained weights: best on the validation tasks, or else the last.

    For `metatrain`, those of its best learning rate. Raises ConfigError where there are none.
    """
    if stage == "metatrain":
        specs = _metatrain(experiment, run, seed)
    else:
        specs = [StageSpec(experiment, "finetune", run, seed, stage)]
    newest = [last_checkpoint(spec) for spec in specs]
    return trained_state(min(newest, key=checkpoint.best_loss))


def _score(experiment: Experiment, run: Path, say: Say) -> None:
    plans = [plan_of(system, experiment) for system in experiment.evaluation.systems]
    stages = {plan.weights for plan in plans if plan.weights is not None}
    weights: dict[int, dict[str, Path]] = {
        seed: {stage: trained_weights(experiment, run, stage, seed) for stage in stages}
        for seed in experiment.seeds
    }
    scores = score_systems(experiment, run, weights, say)
    say(scores_table(scores))


def _writable(experiment: Experiment) -> bool:
    """Tell whether the method, as the settings have it, makes an adapter of each task."""
    return experiment.varied(SYSTEM).hypernetwork.generator not in ("prefix", "none")


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
