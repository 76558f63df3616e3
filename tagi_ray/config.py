"""What a run is: one frozen, validated tree of settings, checked across its sections.

Imports neither torch nor ray, so that `--help` and `--dry-run` answer at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from pydantic import field_validator, model_validator

from tagi_ray.sections import (
    BackboneSettings,
    BankSettings,
    DataSettings,
    DistillationSettings,
    Distinct,
    EvaluationSettings,
    FusionSettings,
    HypernetworkSettings,
    Logger,
    LoraSettings,
    MetatrainSettings,
    PretrainSettings,
    ResourceSettings,
    Section,
    StageSettings,
    TeacherSettings,
    Variant,
)

RUN_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")


class Experiment(Section):
    """A run. Its name is its identity: the same name continues it."""

    name: str
    """Folder of the run under `storage`."""
    storage: str = "runs"
    """Folder that holds the runs; relative paths are taken from where the job starts."""
    seeds: Distinct[int] = (0,)
    """Everything trained besides teachers is repeated for each seed."""
    data: DataSettings = DataSettings()
    backbone: BackboneSettings = BackboneSettings()
    lora: LoraSettings = LoraSettings()
    hypernetwork: HypernetworkSettings = HypernetworkSettings()
    fusion: FusionSettings = FusionSettings()
    distillation: DistillationSettings = DistillationSettings()
    teachers: TeacherSettings = TeacherSettings()
    pretrain: PretrainSettings = PretrainSettings()
    finetune: StageSettings = StageSettings()
    metatrain: MetatrainSettings = MetatrainSettings()
    oracle: BankSettings = BankSettings()
    """Teachers of the held-out tasks: an upper bound that nothing else may read."""
    variants: Distinct[Variant] = ("tagi",)
    """Hypernetworks to train: the method, or with fusion off, or with the bank zeroed."""
    resources: ResourceSettings = ResourceSettings()
    loggers: tuple[Logger, ...] = ()
    """Where the metrics go besides metrics.jsonl; each takes its own environment variables."""
    evaluation: EvaluationSettings = EvaluationSettings()

    @field_validator("name")
    @classmethod
    def _safe_name(cls, name: str) -> str:
        if not RUN_NAME.fullmatch(name):
            raise ValueError(
                f"{name!r} can't be a folder name: use at most 64 of a to z, 0 to 9,"
                " '.', '_' and '-', a letter or digit first"
            )
        return name

    @model_validator(mode="after")
    def _consistent(self) -> Experiment:
        problems = [
            f"{section}.groups={stage.groups} is not a multiple of"
            f" {section}.micro_groups={stage.micro_groups}"
            f" x resources.workers={self.resources.workers}"
            for section, stage in self.stages().items()
            if stage.groups % (stage.micro_groups * self.resources.workers)
            and (section != "pretrain" or self.pretrain.enabled)
        ]
        problems += [*self._unfit_optimizers(), *self._unread()]
        problems += [*self._unfit_offloading(), *self._unfit_pretraining()]
        needs_oracle = "teacher" in self.evaluation.systems
        if needs_oracle and self.data.oracle_instances == 0:
            problems.append(
                "evaluation.systems asks for 'teacher', which is trained on data.oracle_instances=0"
                " instances of the held-out tasks: set it, or leave the system out"
            )
        for system in self.evaluation.systems:
            variant = system.removesuffix("_shuffled")
            ablated = variant in ("tagi_adapter_only", "tagi_fusion_only")
            if ablated and variant not in self.variants:
                problems.append(
                    f"evaluation.systems asks for {system!r}, but {variant!r} is not in variants"
                )
        if "tagi_fusion_only" in self.variants and self.fusion.kind == "none":
            problems.append(
                "variants has 'tagi_fusion_only', and fusion.kind=none leaves it nothing to train:"
                " set fusion.kind=concat, or leave the variant out"
            )
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _unfit_offloading(self) -> Iterator[str]:
        resources = self.resources
        needed = {"offload_optimizer": 1, "offload_parameters": 3}
        for field, stage in needed.items():
            if getattr(resources, field) and resources.zero_stage < stage:
                yield (
                    f"resources.{field}=true needs resources.zero_stage={stage} or more, not"
                    f" {resources.zero_stage}: only what is sharded can be offloaded"
                )

    def _unfit_pretraining(self) -> Iterator[str]:
        settings = self.pretrain
        if settings.enabled and settings.path is None:
            yield (
                "pretrain.enabled=true reads raw text, and pretrain.path is not set: give"
                " pretrain.path=PATH, a file or folder of texts or the id of a hub dataset"
            )
        if settings.instances != 1:
            yield (
                f"pretrain.instances={settings.instances}: a group of pretraining is one text: set"
                " pretrain.instances=1, and in pretrain.groups the texts of a step"
            )
        scheme, is_url, _ = str(settings.path).partition("://")
        if is_url and scheme not in ("s3", "gs"):
            yield f"pretrain.path={settings.path}: only local paths, s3:// and gs:// are read"

    def _unfit_optimizers(self) -> Iterator[str]:
        zero = self.resources.zero_stage
        for section, stage in self.stages().items():
            if stage.optimizer.name != "adafactor":
                continue
            if isinstance(stage, BankSettings):
                yield f"{section}.optimizer.name=adafactor: teachers are trained with adamw alone"
            elif zero:
                # ZeRO hands the optimiser flat shards, which have no rows and columns.
                yield (
                    f"{section}.optimizer.name=adafactor needs resources.zero_stage=0, not {zero}:"
                    " it factors whole matrices, and ZeRO cuts them"
                )
            elif section == "metatrain" and self.backbone.dtype == "bfloat16":
                yield (
                    f"{section}.optimizer.name=adafactor needs backbone.dtype=float32: weights"
                    " in bfloat16 are trained by ZeRO, which cuts the matrices that it factors"
                )

    def _unread(self) -> Iterator[str]:
        """Tell of fields that were changed, and that nothing reads in their section."""
        defaults = StageSettings()
        for section, stage in self.stages().items():
            if isinstance(stage, BankSettings):
                for name in ("valid_every", "valid_groups"):
                    if getattr(stage, name) != getattr(defaults, name):
                        yield f"{section}.{name} would not be read: teachers are not validated"
        if self.metatrain.optimizer.learning_rate != defaults.optimizer.learning_rate:
            yield (
                "metatrain.optimizer.learning_rate would not be read: set"
                f" metatrain.learning_rates=[{self.metatrain.optimizer.learning_rate:g}]"
            )

    def stages(self) -> dict[str, StageSettings]:
        """Training stages by the name of their section."""
        return {
            "teachers": self.teachers,
            "pretrain": self.pretrain,
            "finetune": self.finetune,
            "metatrain": self.metatrain,
            "oracle": self.oracle,
        }
