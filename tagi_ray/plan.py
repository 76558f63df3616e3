"""What a run would take: parameters, memory by ZeRO stage, tokens, and what is fetched.

Nothing is started, and nothing is downloaded but the configuration of a hub model whose
architecture the settings do not give. Memory is that of a worker's tensors: its GPU's, or without
GPUs that of its process, where Python and its libraries come on top (about 0.7 GB).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from tagi_ray.architecture import family_of
from tagi_ray.config import Experiment
from tagi_ray.families import check_backbone
from tagi_ray.footprint import Kind, Lengths, measure, meta_bank, meta_model
from tagi_ray.hub import KEYWORDS, is_on_hub
from tagi_ray.memory import Memory, Parts, estimate, sharding
from tagi_ray.model import TagiModel
from tagi_ray.sections import Family
from tagi_ray.synthetic import world
from tagi_ray.tasks import read_names

PUBLISHED: Mapping[Family, int] = {
    "t5": 4, "gpt2": 4, "llama": 2, "mistral": 2, "qwen2": 2, "qwen3": 2,
}  # fmt: skip
"""Bytes of a weight in the published files: fp32, or bfloat16."""


@dataclass(frozen=True, slots=True)
class StagePlan:
    """One kind of stage. Tokens are an upper bound, at the full lengths."""

    kind: Kind
    steps: int
    tasks: int
    """Groups in an optimiser step, each of one task (or one text)."""
    instances: int
    """Instances in an optimiser step."""
    tokens: int
    """Tokens in an optimiser step."""
    frozen: int
    """Parameters."""
    trained: int
    """Parameters, or factors of all teachers."""
    zero_stage: int
    """The stage that the settings lead to."""
    memory: tuple[Memory, ...]
    """One for each ZeRO stage that the optimiser allows."""

    def at(self, zero_stage: int) -> Memory:
        """Return the memory at a ZeRO stage."""
        return next(one for one in self.memory if one.zero_stage == zero_stage)


@dataclass(frozen=True, slots=True)
class Input:
    """What a run reads from outside the package."""

    field: str
    path: str
    kind: str
    """`hub`, `local`, `remote` or `missing`."""
    revision: str | None = None
    size: int | None = None
    """Bytes, where they can be computed."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run would take."""

    name: str
    workers: int
    on_gpu: bool
    backbone: int
    """Parameters."""
    hypernetwork: int
    """Parameters."""
    sites: int
    generated: int
    """Numbers generated for a task, which are those of one adapter."""
    teachers: int
    teachers_known: bool
    """False: the data would have to be read; as many as there are groups in a step are assumed."""
    stages: tuple[StagePlan, ...]
    inputs: tuple[Input, ...]

    def stage(self, kind: Kind) -> StagePlan:
        """Return the plan of a stage."""
        return next(one for one in self.stages if one.kind == kind)


def plan(experiment: Experiment) -> Plan:
    """Plan a run.

    Raises ConfigError where the shape of the backbone can't be known, or other settings don't fit
    its family.
    """
    check_backbone(experiment, files=False)
    student = meta_model(experiment, "finetune")
    sites, rank = student.backbone.sites, experiment.lora.rank
    backbone = sum(p.numel() for p in student.backbone.parameters())
    trained = sum(p.numel() for p in student.trainable().values())
    slots, known = _teachers(experiment)
    kinds: list[Kind] = ["finetune"]
    if "metatrain" in experiment.evaluation.systems:
        kinds.insert(0, "metatrain")
    if experiment.pretrain.enabled:
        kinds.insert(0, "pretrain")
    if experiment.teachers.enabled:
        kinds.insert(0, "teachers")
    return Plan(
        name=experiment.name,
        workers=experiment.resources.workers,
        on_gpu=experiment.resources.gpus_per_worker > 0,
        backbone=backbone,
        hypernetwork=trained,
        sites=len(sites),
        generated=sum(rank * (site.d_in + site.d_out) for site in sites),
        teachers=slots,
        teachers_known=known,
        stages=tuple(
            _stage(experiment, kind, slots, student if kind == "finetune" else None)
            for kind in kinds
        ),
        inputs=_inputs(experiment, backbone),
    )


def _teachers(experiment: Experiment) -> tuple[int, bool]:
    """Return how many teachers there are, and whether that is known without reading the data."""
    data, teachers = experiment.data, experiment.teachers
    if not teachers.enabled:
        return 0, True
    if data.source == "synthetic":
        tasks = [task for task in world().tasks if world().split[task.name] == "train"]
        per_task = teachers.per == "task"
        return len({task.name if per_task else task.category for task in tasks}), True
    if teachers.per == "category" and data.train_categories != "all":
        wanted = data.train_categories
        return (wanted if isinstance(wanted, int) else len(wanted)), True
    file = data.train_tasks_file
    if teachers.per == "task" and data.train_categories == "all" and file and Path(file).exists():
        return len(read_names(file)), True
    return teachers.groups, False


def _lengths(experiment: Experiment, kind: Kind) -> Lengths:
    data = experiment.data
    if kind == "pretrain":  # of several texts, each part may be the longest of its kind
        limit = experiment.pretrain.max_tokens
        return Lengths(limit, limit, 0, limit)
    prompt = data.max_prompt_tokens if "full" in _read(experiment, kind) else 0
    return Lengths(
        data.max_instruction_tokens, data.max_input_tokens, prompt, data.max_target_tokens
    )


def _read(experiment: Experiment, kind: Kind) -> set[str]:
    """Return which texts of its instances a stage reads: `full` prompts, `input`s alone."""
    teachers, distillation = experiment.teachers, experiment.distillation
    if kind == "metatrain":
        return {"full"}
    if kind == "teachers":
        return {teachers.prompt}
    read: set[str] = {distillation.student_prompt}
    if distillation.reads_checkpoint:
        read.add("full")
    elif teachers.enabled and distillation.lambda_kl > 0 and distillation.logits == "live":
        read.add(teachers.prompt)
    return read


def _tokens(experiment: Experiment, kind: Kind) -> int:
    """Return the tokens that an optimiser step reads, at most."""
    settings, data = experiment.stages()[kind], experiment.data
    if kind == "pretrain":
        return settings.groups * experiment.pretrain.max_tokens
    longest = {"full": data.max_prompt_tokens, "input": data.max_input_tokens}
    texts = sum(longest[text] for text in _read(experiment, kind)) + data.max_target_tokens
    instruction = data.max_instruction_tokens if kind == "finetune" else 0
    return settings.groups * (instruction + settings.instances * texts)


def _stage(
    experiment: Experiment, kind: Kind, slots: int, model: TagiModel | None = None
) -> StagePlan:
    settings, resources = experiment.stages()[kind], experiment.resources
    model = model or meta_model(experiment, kind)
    taught = slots > 0 and kind in ("teachers", "finetune")
    bank = meta_bank(model, experiment, slots) if taught else None
    factors = sum(f.numel() for f in (*bank.a.values(), *bank.b.values())) if bank else 0
    footprint = measure(model, experiment, kind, _lengths(experiment, kind), bank)
    parts = Parts.of(model, kind, factors)
    chosen = sharding(experiment, kind, parts, resources.zero_stage)["stage"]
    asked = (0,) if settings.optimizer.name == "adafactor" else (0, 1, 2, 3)
    stages = sorted({sharding(experiment, kind, parts, zero)["stage"] for zero in asked})
    return StagePlan(
        kind=kind,
        steps=settings.steps,
        tasks=settings.groups,
        instances=settings.groups * settings.instances,
        tokens=_tokens(experiment, kind),
        frozen=parts.frozen,
        trained=factors if kind == "teachers" else parts.trained,
        zero_stage=chosen,
        memory=tuple(estimate(experiment, kind, parts, footprint, zero) for zero in stages),
    )


def _inputs(experiment: Experiment, backbone: int) -> tuple[Input, ...]:
    settings, data = experiment.backbone, experiment.data
    found: list[Input] = []
    if settings.path not in KEYWORDS:
        size = backbone * PUBLISHED[family_of(settings)] if is_on_hub(settings.path) else None
        found.append(_input("backbone.path", settings.path, settings.revision, size))
    if settings.tokenizer and settings.tokenizer not in KEYWORDS:
        found.append(_input("backbone.tokenizer", settings.tokenizer))
    distillation = experiment.distillation
    if distillation.checkpoint:
        field, revision = "distillation.checkpoint", distillation.checkpoint_revision
        found.append(_input(field, distillation.checkpoint, revision))
    if data.source != "synthetic" and data.path:
        source = _input("data.path", data.path, data.revision)
        found.append(replace(source, kind="hub") if data.source == "hub" else _local(source))
    for field in ("train_tasks_file", "test_tasks_file"):
        if path := getattr(data, field):
            found.append(_local(_input(f"data.{field}", path)))
    if experiment.pretrain.enabled and experiment.pretrain.path:
        found.append(_input("pretrain.path", experiment.pretrain.path))
    return tuple(found)


def _input(field: str, path: str, revision: str | None = None, size: int | None = None) -> Input:
    on_hub = is_on_hub(path) and path.count("/") < 2 and path[0] not in "./~"
    kind = "remote" if "://" in path else "hub" if on_hub else _there(path)
    return Input(field, path, kind, revision or "main" if kind == "hub" else None, size)


def _local(source: Input) -> Input:
    """Return the input as one that the hub is not asked for."""
    if source.kind != "hub":
        return source
    return replace(source, kind=_there(source.path), revision=None)


def _there(path: str) -> str:
    return "local" if Path(path).exists() else "missing"


UNITS = {"GiB": 2**30, "MiB": 2**20}


def as_text(planned: Plan) -> str:
    """Return a plan for people."""
    place = "GPU" if planned.on_gpu else "worker (a process of the CPU)"
    highest = max(one.peak for stage in planned.stages for one in stage.memory)
    unit = "GiB" if highest >= UNITS["GiB"] else "MiB"
    lines = [
        f"{planned.name}: {planned.workers} workers, memory for each {place} in {unit}",
        "",
        "parameters",
        f"  backbone                {_count(planned.backbone)}",
        f"  hypernetwork, fusion    {_count(planned.hypernetwork)}",
        f"  generated for a task    {_count(planned.generated)}, at {planned.sites} sites",
    ]
    if planned.teachers:
        assumed = "" if planned.teachers_known else " (assumed: the data are not read)"
        lines.append(
            f"  teachers                {planned.teachers} of {_count(planned.generated)}{assumed}"
        )
    for stage in planned.stages:
        lines += ["", *_stage_lines(stage, UNITS[unit])]
    return "\n".join([*lines, "", *_input_lines(planned.inputs)]) + "\n"


def _stage_lines(stage: StagePlan, unit: int) -> list[str]:
    what = "text" if stage.kind == "pretrain" else "task group"
    lines = [
        f"{stage.kind}: {_count(stage.frozen)} frozen, {_count(stage.trained)} trained",
        f"  {stage.steps:,} steps of {stage.tasks:,} {what}s, {stage.instances:,} instances and at"
        f" most {stage.tokens:,} tokens; in all {_count(stage.steps * stage.tokens)} tokens",
        "  ZeRO  weights  gathered  teachers  gradients  optimiser  activations    peak",
    ]
    for one in stage.memory:
        cells = (one.weights, one.gathered, one.bank, one.gradients, one.optimizer)
        widths = (9, 10, 10, 11, 11)
        row = "".join(f"{cell / unit:>{w}.2f}" for cell, w in zip(cells, widths, strict=True))
        mark = "*" if one.zero_stage == stage.zero_stage else " "
        beside = f", {one.offloaded / unit:.2f} more in CPU memory" if one.offloaded else ""
        lines.append(
            f"  {one.zero_stage}{mark}  {row}{one.activations / unit:>13.2f}"
            f"{one.peak / unit:>8.2f} at {one.peak_at}{beside}"
        )
    return lines


def _input_lines(inputs: tuple[Input, ...]) -> list[str]:
    if not inputs:
        return ["inputs: none, all of it ships with the package"]
    lines = ["inputs"]
    for one in inputs:
        if one.kind == "hub":
            size = f", {one.size / 1e9:.1f} GB" if one.size else ""
            state = f"from the hub at {one.revision}{size}"
        else:
            state = {"local": "is there", "missing": "is NOT there", "remote": "remote"}[one.kind]
        lines.append(f"  {one.field}={one.path}: {state}")
    return lines


def _count(number: int) -> str:
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if number >= size:
            return f"{number / size:.4g} {unit}"
    return f"{number:,}"
