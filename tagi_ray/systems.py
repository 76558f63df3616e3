"""The systems that are compared on held-out tasks: the method, baselines, a bound, controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from tagi_ray.config import Experiment, control_of
from tagi_ray.errors import DataError
from tagi_ray.tasks import Task

SYSTEM = "tagi"
"""The method itself, which other variants are changes of."""
EMPTY = Task(name="empty", category="empty", definitions=("",))


@dataclass(frozen=True, slots=True)
class SystemPlan:
    """How a system answers: everything in which the systems differ."""

    about: str
    weights: str | None = None
    """Variant whose weights a system needs, or `metatrain`. None: the backbone as it is, the same
    for every seed."""
    prompt: Literal["input", "full", "oracle"] = "input"
    """`oracle`: what the oracle teachers were trained with."""
    bank: Literal["none", "generated", "oracle"] = "none"
    fusion: bool = False
    instruction: Literal["own", "shuffled", "empty"] = "own"


BASELINES: Mapping[str, SystemPlan] = {
    "base": SystemPlan("The backbone, given the input alone."),
    "metatrain": SystemPlan(
        "The whole backbone after instruction tuning, given instruction and input.",
        weights="metatrain",
        prompt="full",
    ),
    "teacher": SystemPlan(
        "Adapters trained on instances of the held-out tasks themselves: an upper bound.",
        prompt="oracle",
        bank="oracle",
    ),
}


def plan_of(system: str, experiment: Experiment) -> SystemPlan:
    """Return how a system of the settings answers."""
    if system in BASELINES:
        return BASELINES[system]
    named = control_of(system, experiment.variants)
    assert named is not None  # the settings were checked
    variant, control = named
    prompt = experiment.varied(variant).distillation.student_prompt
    about = _about(variant, experiment)
    plan = SystemPlan(about, variant, prompt, bank="generated", fusion=True)
    match control:
        case "no_bank":
            about = f"{variant} without its adapter: the fused instruction alone."
            return replace(plan, about=about, bank="none")
        case "no_fusion":
            about = f"{variant} without fusion: the adapter alone, as stock PEFT and vLLM run it."
            return replace(plan, about=about, fusion=False)
        case "shuffled":
            about = f"{variant}, given another task's instruction: a control."
            return replace(plan, about=about, instruction="shuffled")
        case "empty":
            about = f"{variant}, given an empty instruction: a control."
            return replace(plan, about=about, instruction="empty")
    return plan


def changes(variant: str, experiment: Experiment) -> list[str]:
    """Return what a variant changes, as the command line would: section.field=value."""
    return [
        f"{section}.{field}={_yaml(value)}"
        for section, delta in experiment.variants[variant]
        for field, value in delta.items()
    ]


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _about(variant: str, experiment: Experiment) -> str:
    if told := changes(variant, experiment):
        return f"{SYSTEM} with {', '.join(told)}."
    return "Adapter and fused instruction, both made from the instruction; the prompt is the input."


def instruction_sources(
    tasks: Sequence[Task], kind: Literal["own", "shuffled", "empty"]
) -> dict[str, Task]:
    """Task name -> the task whose instruction a system gets for it.

    `shuffled` is a fixed rotation of the tasks sorted by category: each gets another task's
    instruction, with another wording and from another category as far as the tasks allow it.
    """
    if kind == "own":
        return {task.name: task for task in tasks}
    if kind == "empty":
        return {task.name: EMPTY for task in tasks}
    ordered = sorted(tasks, key=lambda task: (task.category, task.name))
    count = len(ordered)
    if count < 2:
        raise DataError(
            "evaluation.systems asks for shuffled instructions, which takes two held-out tasks:"
            f" there is {count}, so leave out the systems that end in _shuffled"
        )

    def strangers(shift: int) -> tuple[int, int, int]:
        pairs = [(task, ordered[(i + shift) % count]) for i, task in enumerate(ordered)]
        wordings = sum(one.definitions[0] != other.definitions[0] for one, other in pairs)
        categories = sum(one.category != other.category for one, other in pairs)
        return wordings, categories, -abs(shift - count // 2)

    shift = max(range(1, count), key=strangers)
    return {task.name: ordered[(i + shift) % count] for i, task in enumerate(ordered)}
