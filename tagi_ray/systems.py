"""The systems that are compared on held-out tasks: the method, baselines, a bound, controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from tagi_ray.errors import DataError
from tagi_ray.sections import System, Variant
from tagi_ray.tasks import Task

Weights = Literal["metatrain"] | Variant
"""Stage whose checkpoint a system needs."""
EMPTY = Task(name="empty", category="empty", definitions=("",))


@dataclass(frozen=True, slots=True)
class SystemPlan:
    """How a system answers: everything in which the systems differ."""

    about: str
    weights: Weights | None = None
    """None: the backbone as it is, the same for every seed."""
    prompt: Literal["input", "full", "oracle"] = "input"
    """`oracle`: what the oracle teachers were trained with."""
    bank: Literal["none", "generated", "oracle"] = "none"
    fusion: bool = False
    instruction: Literal["own", "shuffled", "empty"] = "own"


KNOWN_SYSTEMS: Mapping[System, SystemPlan] = {
    "base": SystemPlan("The backbone, given the input alone."),
    "metatrain": SystemPlan(
        "The whole backbone after instruction tuning, given instruction and input.",
        weights="metatrain",
        prompt="full",
    ),
    "tagi": SystemPlan(
        "Adapter and fused instruction, both made from the instruction; the prompt is the input.",
        weights="tagi",
        bank="generated",
        fusion=True,
    ),
    "tagi_no_bank": SystemPlan(
        "The same model without its adapter: the fused instruction alone.",
        weights="tagi",
        fusion=True,
    ),
    "tagi_no_fusion": SystemPlan(
        "The same model without fusion: the adapter alone, as stock PEFT and vLLM run it.",
        weights="tagi",
        bank="generated",
    ),
    "tagi_shuffled": SystemPlan(
        "The same model, given another task's instruction: a control.",
        weights="tagi",
        bank="generated",
        fusion=True,
        instruction="shuffled",
    ),
    "tagi_empty": SystemPlan(
        "The same model, given an empty instruction: a control.",
        weights="tagi",
        bank="generated",
        fusion=True,
        instruction="empty",
    ),
    "teacher": SystemPlan(
        "Adapters trained on instances of the held-out tasks themselves: an upper bound.",
        prompt="oracle",
        bank="oracle",
    ),
    "tagi_adapter_only": SystemPlan(
        "A model trained without fusion.", weights="tagi_adapter_only", bank="generated"
    ),
    "tagi_adapter_only_shuffled": SystemPlan(
        "The model trained without fusion, given another task's instruction.",
        weights="tagi_adapter_only",
        bank="generated",
        instruction="shuffled",
    ),
    "tagi_fusion_only": SystemPlan(
        "A model trained without adapters.", weights="tagi_fusion_only", fusion=True
    ),
    "tagi_fusion_only_shuffled": SystemPlan(
        "The model trained without adapters, given another task's instruction.",
        weights="tagi_fusion_only",
        fusion=True,
        instruction="shuffled",
    ),
}


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
