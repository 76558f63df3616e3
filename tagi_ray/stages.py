"""What a training stage is, and how its parts are built on a worker.

Axes: K slots, R rank, D features.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tagi_ray import checkpoint, corpus, objectives
from tagi_ray.bank_engine import BankEngine
from tagi_ray.config import Experiment
from tagi_ray.errors import ConfigError
from tagi_ray.evaluate import load_weights
from tagi_ray.lora import LoraBank, Site, common_start
from tagi_ray.model import ModelKind, TagiModel, build_model
from tagi_ray.objectives import Objective
from tagi_ray.order import OrderPlan
from tagi_ray.sections import DataSettings, StageSettings
from tagi_ray.shards import read_manifest
from tagi_ray.teacher_logits import cached_entries, folder_of
from tagi_ray.teachers import FOLDERS, read_teachers, store_hash, teacher_slots
from tagi_ray.tuned_teacher import load_tuned_teacher
from tagi_ray.zero import Engine, FrozenModel, ZeroEngine, sharded_loading

Kind = Literal["teachers", "oracle", "pretrain", "finetune", "metatrain"]

REPORTING = frozenset({"log_every", "save_every", "micro_groups"})
"""Settings of a stage that change neither what is learnt nor in which order."""
BACKBONE = "backbone.json"
"""File of a run that says which backbone's weights it was started with."""
RECOMPUTING = frozenset({"activation_checkpointing"})
"""Settings of a backbone that change no result."""
_PLACES = {"path", "revision", "tokenizer", "train_tasks_file", "test_tasks_file"}


@dataclass(frozen=True, slots=True)
class StageSpec:
    """One training stage of a run: everything that a worker on another machine needs to know."""

    experiment: Experiment
    kind: Kind
    run_folder: Path
    """Absolute: a worker starts in another folder. Shared by all machines of the cluster."""
    seed: int
    variant: str = "tagi"
    """What `pretrain` and `finetune` train."""
    learning_rate: float | None = None
    """Instead of the rate of the settings."""
    slots: tuple[str, ...] = ()
    """What `teachers` and `oracle` train: names of tasks or categories, one to a slot."""
    part: int = 0
    """Which of several stages that train the teachers of one store."""

    @property
    def settings(self) -> StageSettings:
        """Settings of this stage."""
        return self.experiment.stages()[self.kind]

    @property
    def varied(self) -> Experiment:
        """Settings of the run with the changes of the variant."""
        varies = self.kind in ("pretrain", "finetune")
        return self.experiment.varied(self.variant) if varies else self.experiment

    @property
    def rate(self) -> float:
        """Learning rate after the warm-up."""
        if self.learning_rate is not None:
            return self.learning_rate
        if self.kind == "metatrain":
            return self.experiment.metatrain.learning_rates[0]
        return self.settings.optimizer.learning_rate

    @property
    def name(self) -> str:
        """Name of the stage in its seed's folder and in the metrics."""
        if self.kind in ("pretrain", "finetune"):
            return f"{self.kind}_{self.variant}"
        if self.kind == "metatrain":
            return f"metatrain_{self.rate:g}"
        return f"{self.kind}_{self.part}" if self.part else self.kind

    @property
    def shards(self) -> Path:
        """Folder of the shards that the stage reads."""
        return self.run_folder / (corpus.FOLDER if self.kind == "pretrain" else "shards")

    @property
    def teacher_logits(self) -> Path | None:
        """Folder of the teacher's logits that the stage reads, if it reads any."""
        return folder_of(self.varied, self.run_folder) if self.kind == "finetune" else None

    @property
    def data(self) -> DataSettings:
        """How the stage's texts are rendered and cut."""
        settings, pretrain = self.experiment.data, self.experiment.pretrain
        if self.kind != "pretrain":
            return settings
        return settings.model_copy(update={"max_prompt_tokens": pretrain.max_tokens})

    @property
    def pretrained(self) -> StageSpec | None:
        """The stage from whose weights this one starts, if there is one."""
        if self.kind == "finetune" and self.varied.pretrain.enabled:
            variant = pretrained_variant(self.experiment, self.variant)
            return replace(self, kind="pretrain", variant=variant)
        return None

    @property
    def dtype(self) -> Literal["float32", "bfloat16"]:
        """Precision of the backbone in this stage."""
        if self.kind == "pretrain":
            return self.experiment.pretrain.dtype
        return self.experiment.backbone.dtype

    @property
    def checkpoints(self) -> Path:
        """Folder of the stage's checkpoints."""
        return self.run_folder / f"seed_{self.seed}" / self.name / "checkpoints"

    @property
    def trains_bank(self) -> bool:
        """Whether the stage trains teachers' factors instead of a model's parameters."""
        return self.kind in ("teachers", "oracle")


def pretrained_variant(experiment: Experiment, variant: str) -> str:
    """Return the variant whose pretrained weights one starts from: the first with such a model."""

    def model(name: str) -> tuple[Any, ...]:
        one = experiment.varied(name)
        return one.hypernetwork, one.fusion, one.pretrain

    return next(name for name in experiment.variants if model(name) == model(variant))


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage built on one worker."""

    objective: Objective
    engine: Engine
    plan: OrderPlan
    valid_plan: OrderPlan | None
    """None where there is nothing to validate on: no validation tasks, or teachers."""


def fingerprint(spec: StageSpec) -> str:
    """Return a hash of all that decides what the stage learns: settings, data, backbone, teachers,
    and the weights that it starts from.

    The number of workers, the micro-batches and the ZeRO stage are not part of it: a run may
    continue on other machines.
    """
    experiment = spec.varied
    taught = spec.kind == "finetune" and experiment.teachers.enabled
    parts = {
        "kind": spec.kind,
        "seed": spec.seed,
        "variant": spec.variant,
        "rate": spec.rate,
        "slots": spec.slots,
        "stage": spec.settings.model_dump(mode="json", exclude=set(REPORTING | _PLACES)),
        "data": experiment.data.model_dump(mode="json", exclude=_PLACES),
        "shards": read_manifest(spec.run_folder / "shards").fingerprint,
        "teachers": store_hash(spec.run_folder / FOLDERS["train"]) if taught else None,
        "weights": backbone_weights(spec.run_folder),
        # Its weights are told above; the tokenizer of a run is a folder of the run.
        "backbone": experiment.backbone.model_dump(mode="json", exclude=_PLACES | RECOMPUTING),
        **{
            section: getattr(experiment, section).model_dump(mode="json")
            for section in ("lora", "hypernetwork", "fusion")
        },
    }
    if spec.kind == "finetune":
        # A pinned revision says which weights the checkpoint has, wherever it is.
        settings = experiment.distillation
        parts["distillation"] = settings.model_dump(mode="json", exclude={"checkpoint"})
    if spec.kind == "pretrain":
        parts["corpus"] = read_manifest(spec.shards).fingerprint
    if spec.pretrained:
        state = trained_state(last_checkpoint(spec.pretrained))
        parts["pretrained"] = state.with_name(checkpoint.COMMIT).read_text("utf-8")
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def last_checkpoint(spec: StageSpec) -> Path:
    """Return the last checkpoint of a stage; raises ConfigError unless it has all its steps."""
    # All ranks look, and a damaged one is no leave for any of them to change the folder.
    newest = checkpoint.latest(spec.checkpoints, set_aside=False)
    progress = checkpoint.meta(newest)["progress"] if newest else {"step": 0, "done": False}
    if newest is None or not progress["done"]:
        raise ConfigError([
            f"{spec.checkpoints}: {spec.name} of seed {spec.seed} is at step {progress['step']} of"
            f" {spec.settings.steps}: run `python jobs/finetune.py` with these settings first"
        ])  # fmt: skip
    return newest


def trained_state(newest: Path) -> Path:
    """Return the tensors of a finished stage: best in validation, or else the last."""
    return checkpoint.best(newest) / checkpoint.STATE


def backbone_weights(run_folder: Path) -> str | None:
    """Return which backbone's weights a run was started with; None where that was not noted."""
    path = run_folder / BACKBONE
    return json.loads(path.read_text("utf-8"))["weights"] if path.exists() else None


def build_stage(spec: StageSpec, device: torch.device) -> Stage:
    """Build model, objective, engine and order of a stage."""
    return _build_teachers(spec, device) if spec.trains_bank else _build_trained(spec, device)


def _build_trained(spec: StageSpec, device: torch.device) -> Stage:
    experiment, settings = spec.varied, spec.settings
    manifest = read_manifest(spec.shards)
    kind = "metatrain" if spec.kind == "metatrain" else "hypernetwork"
    model = _build_model(spec, kind, device)
    if spec.pretrained:
        # Before the engine, which may shard what is trained.
        load_weights(model, trained_state(last_checkpoint(spec.pretrained)))
    bank, slots = None, None
    if spec.kind == "metatrain":
        objective = objectives.metatrain()
    elif spec.kind == "pretrain":
        objective = objectives.pretrain()
    else:
        if experiment.teachers.enabled:
            folder = spec.run_folder / FOLDERS["train"]
            bank, slots = read_teachers(folder, manifest, model.backbone.sites, experiment)
            bank = bank.to(device)
        prompt = experiment.teachers.prompt
        cached = spec.teacher_logits
        entries = cached_entries(cached) if cached else None
        objective = objectives.finetune(experiment.distillation, bank, prompt, entries)
    splits = manifest.splits
    return Stage(
        objective,
        ZeroEngine(model, objective, settings, experiment.resources, spec.rate, device),
        OrderPlan(splits["train"], spec.seed, settings.instances, slots),
        # One order for all seeds and rates, whose losses are compared.
        OrderPlan(splits["valid"], experiment.seeds[0], settings.instances)
        if splits["valid"].tasks
        else None,
    )


def _build_teachers(spec: StageSpec, device: torch.device) -> Stage:
    experiment, settings = spec.experiment, spec.settings
    role = "oracle" if spec.kind == "oracle" else "train"
    teaching = experiment.oracle if spec.kind == "oracle" else experiment.teachers
    manifest = read_manifest(spec.run_folder / "shards")
    model = _build_model(spec, "teacher", device)
    bank = starting_bank(model.backbone.sites, experiment, len(spec.slots))
    bank = bank.map(lambda factor: factor.to(device).requires_grad_())
    objective = objectives.teacher(bank, teaching.prompt)
    frozen = FrozenModel(model, objective, settings, experiment.resources, device)
    slots = teacher_slots(manifest, spec.slots, role, teaching.per)
    split = manifest.splits["oracle" if role == "oracle" else "train"]
    return Stage(
        objective,
        BankEngine(frozen, bank, settings, spec.rate),
        OrderPlan(split, spec.seed, settings.instances, slots, round_robin=True),
        None,
    )


def _build_model(spec: StageSpec, kind: ModelKind, device: torch.device) -> TagiModel:
    backbone = spec.experiment.backbone.model_copy(update={"dtype": spec.dtype})
    experiment = spec.varied.model_copy(update={"backbone": backbone})
    dtype, tokenizer = getattr(torch, spec.dtype), spec.run_folder / "tokenizer"
    distillation = experiment.distillation
    with sharded_loading(spec.settings, experiment.resources, dtype, device):
        model = build_model(experiment, tokenizer, kind, spec.seed)
        if spec.kind == "finetune" and distillation.reads_checkpoint:
            model.teacher = load_tuned_teacher(distillation, backbone, tokenizer)
    return model.to(device)


def starting_bank(sites: tuple[Site, ...], experiment: Experiment, slots: int) -> LoraBank:
    """Return K adapters that change nothing yet: the common A in every slot, and B = 0."""
    lora = experiment.lora
    start = common_start(sites, lora.rank, lora.start_seed)
    return LoraBank(
        {name: a_RD.expand(slots, -1, -1).clone() for name, a_RD in start.items()},
        {site.name: torch.zeros(slots, site.d_out, lora.rank) for site in sites},
        lora.alpha / lora.rank,
    )


def trained_bank(state: Mapping[str, Tensor], experiment: Experiment) -> LoraBank:
    """Return the bank in the checkpoint of a stage that trained one."""

    def factors(end: str) -> dict[str, Tensor]:
        return {
            key.removeprefix("model.").removesuffix(end): tensor
            for key, tensor in state.items()
            if key.startswith("model.") and key.endswith(end)
        }

    lora = experiment.lora
    return LoraBank(factors(".lora_A"), factors(".lora_B"), lora.alpha / lora.rank)
