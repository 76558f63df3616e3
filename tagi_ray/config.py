"""What a run is: one frozen, validated tree of settings, checked across its sections.

Imports neither torch nor ray, so that `--help` and `--dry-run` answer at once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator

from pydantic import Field, ValidationError, field_validator, model_validator

from tagi_ray.method_sections import (
    DistillationSettings,
    FusionSettings,
    HypernetworkSettings,
    VariantSettings,
)
from tagi_ray.sections import (
    BackboneSettings,
    BankSettings,
    DataSettings,
    Distinct,
    EvaluationSettings,
    Logger,
    LoraSettings,
    MetatrainSettings,
    PretrainSettings,
    ResourceSettings,
    Section,
    StageSettings,
    TeacherSettings,
)

RUN_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")
VARIANT_NAME = re.compile(r"[a-z][a-z0-9_]{0,31}")
BASELINES = ("base", "metatrain", "teacher")
"""Systems that are no variant of the method."""
CONTROLS = ("no_bank", "no_fusion", "shuffled", "empty")
"""What a variant's name may be followed by, in the name of a system."""


def control_of(system: str, variants: Iterable[str]) -> tuple[str, str | None] | None:
    """Return the variant that a system names, and its control or None; None for another name."""
    for variant in variants:
        if system == variant:
            return variant, None
        if system.removeprefix(f"{variant}_") in CONTROLS and system.startswith(f"{variant}_"):
            return variant, system.removeprefix(f"{variant}_")
    return None


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
    variants: dict[str, VariantSettings] = Field(
        default_factory=lambda: {"tagi": VariantSettings()}
    )
    """Hypernetworks, each named by the system that it is: `tagi` with the settings of the other
    sections, and others with some of them changed. Those that evaluation.systems names are
    trained."""
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
        strange = [
            repr(system)
            for system in self.evaluation.systems
            if system not in BASELINES and control_of(system, self.variants) is None
        ]
        if strange:
            problems.append(
                f"evaluation.systems asks for {', '.join(strange)}: a system is one of"
                f" {', '.join(BASELINES)}, or one of variants ({', '.join(self.variants)}), alone or"
                f" with _{', _'.join(CONTROLS)} behind it"
            )
        problems += self._unfit_variants()
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def scored_variants(self) -> tuple[str, ...]:
        """Return the variants that the systems to score name, which are those that are trained."""
        named = [control_of(system, self.variants) for system in self.evaluation.systems]
        return tuple(v for v in self.variants if any(one and one[0] == v for one in named))

    def varied(self, variant: str) -> Experiment:
        """Return the settings that a variant is trained with."""
        changed: dict[str, Section] = {}
        for section, delta in self.variants[variant]:
            if delta:
                settings: Section = getattr(self, section)
                document = json.dumps({**settings.model_dump(mode="json"), **delta})
                changed[section] = type(settings).model_validate_json(document, strict=True)
        return self.model_copy(update=changed)

    def _unfit_variants(self) -> Iterator[str]:
        if not self.variants:
            yield "variants names none: leave it out, or name one"
        for name in self.variants:
            reserved = name in BASELINES or name.endswith(tuple(f"_{c}" for c in CONTROLS))
            if reserved or not VARIANT_NAME.fullmatch(name):
                yield (
                    f"variants.{name} cannot be the name of a system: use at most 32 of a to z, 0"
                    f" to 9 and '_', a letter first, and neither {', '.join(BASELINES)} nor one"
                    f" that ends in _{', _'.join(CONTROLS)}"
                )
            try:
                one = self.varied(name)
            except ValidationError as error:
                for details in error.errors(include_url=False):
                    where = ".".join(str(part) for part in details["loc"])
                    told = details["msg"].removeprefix("Value error, ")
                    yield f"variants.{name}: {where or error.title}: {told}"
                continue
            if one.hypernetwork.generator == "none" and not one.fusion.cross_attention:
                yield (
                    f"variants.{name}: hypernetwork.generator=none and fusion.kind="
                    f"{one.fusion.kind} leave nothing to train: set a fusion.kind with"
                    " cross_attention, or another generator"
                )
            if one.hypernetwork.generator == "prefix" and one.fusion.kind != "none":
                yield (
                    f"variants.{name}: hypernetwork.generator=prefix and fusion.kind="
                    f"{one.fusion.kind} would stand in one place: set fusion.kind=none, and"
                    " distillation.student_prompt=full for the instruction"
                )
            if one.pretrain.enabled and not self.pretrain.enabled:
                yield (
                    f"variants.{name}.pretrain.enabled=true: variants can leave pretraining out:"
                    " set pretrain.enabled=true for the run, and false where it is not wanted"
                )

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
        distillation = self.distillation
        if distillation.checkpoint and distillation.lambda_kl == 0:
            yield (
                f"distillation.checkpoint={distillation.checkpoint} would not be read:"
                " distillation.lambda_kl=0 has no use for its logits: set it, or leave that out"
            )
        if distillation.checkpoint_revision and not distillation.checkpoint:
            yield (
                f"distillation.checkpoint_revision={distillation.checkpoint_revision} would not be"
                " read: give distillation.checkpoint, the hub id that it is a revision of"
            )
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
