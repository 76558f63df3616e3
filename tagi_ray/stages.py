"""What a training stage is, and how its parts are built on a worker.

Axes: K slots, R rank, D features.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from tagi_ray import objectives
from tagi_ray.config import Experiment
from tagi_ray.errors import AdapterError
from tagi_ray.lora import LoraBank, Site, common_start
from tagi_ray.model import build_model
from tagi_ray.objectives import Objective
from tagi_ray.order import OrderPlan
from tagi_ray.sections import StageSettings, Variant
from tagi_ray.shards import read_manifest
from tagi_ray.teachers import FOLDERS, INDEX, read_teachers, teacher_slots
from tagi_ray.zero import BankEngine, Engine, ZeroEngine

Kind = Literal["teachers", "oracle", "finetune", "metatrain"]

REPORTING = frozenset({"log_every", "save_every", "micro_groups"})
"""Settings of a stage that change neither what is learnt nor in which order."""
BACKBONE = "backbone.json"
"""File of a run that says which backbone's weights it was started with."""
_PLACES = {"path", "revision", "train_tasks_file", "test_tasks_file"}


@dataclass(frozen=True, slots=True)
class StageSpec:
    """One training stage of a run: everything that a worker on another machine needs to know."""

    experiment: Experiment
    kind: Kind
    run_folder: Path
    """Absolute: a worker starts in another folder. Shared by all machines of the cluster."""
    seed: int
    variant: Variant = "tagi"
    """What `finetune` trains."""
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
        if self.kind == "finetune":
            return f"finetune_{self.variant}"
        if self.kind == "metatrain":
            return f"metatrain_{self.rate:g}"
        return f"{self.kind}_{self.part}" if self.part else self.kind

    @property
    def checkpoints(self) -> Path:
        """Folder of the stage's checkpoints."""
        return self.run_folder / f"seed_{self.seed}" / self.name / "checkpoints"

    @property
    def trains_bank(self) -> bool:
        """Whether the stage trains teachers' factors instead of a model's parameters."""
        return self.kind in ("teachers", "oracle")


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage built on one worker."""

    objective: Objective
    engine: Engine
    plan: OrderPlan
    valid_plan: OrderPlan | None
    """None where there is nothing to validate on: no validation tasks, or teachers."""


def fingerprint(spec: StageSpec) -> str:
    """Return a hash of all that decides what the stage learns: settings, data, backbone, teachers.

    The number of workers, the micro-batches and the ZeRO stage are not part of it: a run may
    continue on other machines.
    """
    experiment = spec.experiment
    taught = spec.kind == "finetune" and experiment.teachers.enabled
    parts = {
        "kind": spec.kind,
        "seed": spec.seed,
        "variant": spec.variant,
        "rate": spec.rate,
        "slots": spec.slots,
        "stage": spec.settings.model_dump(mode="json", exclude=set(REPORTING)),
        "data": experiment.data.model_dump(mode="json", exclude=_PLACES),
        "shards": read_manifest(spec.run_folder / "shards").fingerprint,
        "teachers": _teachers_hash(spec.run_folder / FOLDERS["train"]) if taught else None,
        "weights": backbone_weights(spec.run_folder),
        **{
            section: getattr(experiment, section).model_dump(mode="json")
            for section in ("backbone", "lora", "hypernetwork", "fusion", "distillation")
        },
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def backbone_weights(run_folder: Path) -> str | None:
    """Return which backbone's weights a run was started with; None where that was not noted."""
    path = run_folder / BACKBONE
    return json.loads(path.read_text("utf-8"))["weights"] if path.exists() else None


def _teachers_hash(folder: Path) -> str:
    path = folder / INDEX
    if not path.exists():
        raise AdapterError(f"{path}: no such file; train the teachers first")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def build_stage(spec: StageSpec, device: torch.device) -> Stage:
    """Build model, objective, engine and order of a stage."""
    return _build_teachers(spec, device) if spec.trains_bank else _build_trained(spec, device)


def _build_trained(spec: StageSpec, device: torch.device) -> Stage:
    experiment, settings = spec.experiment, spec.settings
    manifest = read_manifest(spec.run_folder / "shards")
    kind = spec.variant if spec.kind == "finetune" else "metatrain"
    model = build_model(experiment, spec.run_folder / "tokenizer", kind, spec.seed).to(device)
    bank, slots = None, None
    if spec.kind == "metatrain":
        objective = objectives.metatrain()
    else:
        if experiment.teachers.enabled:
            folder = spec.run_folder / FOLDERS["train"]
            bank, slots = read_teachers(folder, manifest, model.backbone.sites, experiment)
            bank = bank.to(device)
        prompt = experiment.teachers.prompt
        objective = objectives.finetune(experiment.distillation, bank, prompt)
    stage, splits = experiment.resources.zero_stage, manifest.splits
    return Stage(
        objective,
        ZeroEngine(model, objective, settings, stage, spec.rate, device),
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
    model = build_model(experiment, spec.run_folder / "tokenizer", "teacher", spec.seed).to(device)
    bank = starting_bank(model.backbone.sites, experiment, len(spec.slots))
    bank = bank.map(lambda factor: factor.to(device).requires_grad_())
    objective = objectives.teacher(bank, teaching.prompt)
    slots = teacher_slots(manifest, spec.slots, role, teaching.per)
    split = manifest.splits["oracle" if role == "oracle" else "train"]
    return Stage(
        objective,
        BankEngine(model, objective, bank, settings, spec.rate),
        OrderPlan(split, spec.seed, settings.instances, slots, round_robin=True),
        None,
    )


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
