"""The fully tuned model whose logits a student can learn: which one it is, and how it is loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tagi_ray.architecture import backbone_config, identify, is_causal, padded, pretrained_model
from tagi_ray.backbone import Backbone
from tagi_ray.config import Experiment
from tagi_ray.errors import ConfigError, RunConflictError
from tagi_ray.families import wrapped
from tagi_ray.hub import is_on_hub, pinned
from tagi_ray.json_files import write_whole
from tagi_ray.method_sections import DistillationSettings
from tagi_ray.sections import ArchitectureSettings, BackboneSettings
from tagi_ray.vocabulary import TextTokenizer

NOTE = "tuned_teachers.json"
"""File of a run that says which weights its tuned teachers had when it was started."""


def pinned_teachers(experiment: Experiment, run_folder: Path) -> Experiment:
    """Return the settings with each `distillation.checkpoint` as workers elsewhere need it.

    A local path is absolute then, and the revision says which weights they are: the commit of a hub
    model, which a run keeps, or the hash of local files. Raises ConfigError for what is no model
    of the backbone's kind, RunConflictError where other weights are there than when the run began.
    """
    note = run_folder / NOTE
    noted: dict[str, Any] = json.loads(note.read_text("utf-8")) if note.exists() else {}
    known = dict(noted)

    def located(settings: DistillationSettings) -> dict[str, Any]:
        path, given = str(settings.checkpoint), settings.checkpoint_revision
        name = f"{path}@{given}" if given else path
        known[name] = _identified(path, given, known.get(name), experiment.backbone, note)
        is_folder = Path(path).exists()
        return {
            "checkpoint": str(Path(path).absolute()) if is_folder else path,
            "checkpoint_revision": known[name]["weights"].rpartition("@")[2],
        }

    base = experiment.distillation
    changed: dict[str, Any] = {}
    if base.checkpoint:
        changed["distillation"] = base.model_copy(update=located(base))
    variants = dict(experiment.variants)
    for name, variant in variants.items():
        own = experiment.varied(name).distillation
        places = (own.checkpoint, own.checkpoint_revision)
        if own.checkpoint and places != (base.checkpoint, base.checkpoint_revision):
            delta = {**variant.distillation, **located(own)}
            variants[name] = variant.model_copy(update={"distillation": delta})
    if known != noted:
        write_whole(note, json.dumps(known))
    return experiment.model_copy(update={**changed, "variants": variants})


def _identified(
    path: str,
    revision: str | None,
    noted: dict[str, Any] | None,
    student: BackboneSettings,
    note: Path,
) -> dict[str, Any]:
    if noted and is_on_hub(path):
        return noted  # the run goes on with its commit, wherever the branch is now
    with _told_as_checkpoint():
        source = pinned(_source(path, revision))
        found = identify(source, noted)
        causal = is_causal(source)
    if causal != is_causal(student):
        kinds = {True: "decoder-only", False: "an encoder-decoder"}
        raise ConfigError([
            f"distillation.checkpoint={path} is {kinds[causal]}, backbone.path={student.path} is"
            f" {kinds[not causal]}: name a teacher of the backbone's kind"
        ])  # fmt: skip
    if noted and found["weights"] != noted["weights"]:
        raise RunConflictError([
            f"{note}: the run was started with other weights in distillation.checkpoint={path}"
            f" ({noted['weights']}, now {found['weights']}): give another name=..., or bring those"
            " weights back"
        ])  # fmt: skip
    return found


def compared_entries(experiment: Experiment, tokenizer_folder: Path) -> int:
    """Return the entries of the vocabulary that the logits of teacher and student both have."""
    student, settings = experiment.backbone, experiment.distillation
    if student.path == "random":
        shape = student.architecture or ArchitectureSettings()
        entries = shape.vocabulary or padded(TextTokenizer(tokenizer_folder).size)
    else:
        entries = int(_published(student).vocab_size)
    if settings.checkpoint is None:
        return entries
    teacher = _published(_source(settings.checkpoint, settings.checkpoint_revision))
    return min(entries, int(teacher.vocab_size))


def _published(settings: BackboneSettings) -> Any:
    return backbone_config(settings.model_copy(update={"architecture": None}))[0]


def load_tuned_teacher(
    settings: DistillationSettings, student: BackboneSettings, tokenizer_folder: Path
) -> Backbone:
    """Load the model of `distillation.checkpoint`, in the student's precision and without sites.

    Raises ConfigError for one that embeds fewer entries than the tokenizer has.
    """
    source = _source(str(settings.checkpoint), settings.checkpoint_revision)
    with _told_as_checkpoint():
        model = pretrained_model(source.model_copy(update={"dtype": student.dtype}))
    rows = model.get_input_embeddings().num_embeddings  # sharded weights have no shape
    tokenizer = TextTokenizer(tokenizer_folder)
    if tokenizer.size > rows:
        raise ConfigError([
            f"distillation.checkpoint={source.path} embeds {rows} entries, the tokenizer has"
            f" {tokenizer.size}: name a model that was tuned with the backbone's tokenizer"
        ])  # fmt: skip
    return wrapped(model, (), source.path, tokenizer)


def _source(path: str, revision: str | None) -> BackboneSettings:
    if path in ("random", "train"):
        raise ConfigError([
            f"distillation.checkpoint={path} is no tuned model: name a local folder or a hub id"
        ])  # fmt: skip
    return BackboneSettings(path=path, revision=revision)


@contextmanager
def _told_as_checkpoint() -> Iterator[None]:
    """Let errors name the teacher's settings, where the code for backbones names those of one."""
    try:
        yield
    except ConfigError as error:
        names = {
            "backbone.path": "distillation.checkpoint",
            "backbone.revision": "distillation.checkpoint_revision",
        }
        problems = error.problems
        for ours, told in names.items():
            problems = [problem.replace(ours, told) for problem in problems]
        raise ConfigError(problems) from error
