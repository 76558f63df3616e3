"""Text of the instruction and of the input, exactly as Tk-Instruct writes them.

A prompt is the instruction followed by the input. The two are rendered apart, because the
hypernetwork reads the instruction alone and the student reads the input alone.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from typing import Literal

from tagi_ray.tasks import PositiveExample

PromptKind = Literal["def", "def_2pos"]

DEMONSTRATIONS: dict[PromptKind, int] = {"def": 0, "def_2pos": 2}


def render_instruction(
    definition: str,
    examples: Sequence[PositiveExample],
    kind: PromptKind,
    fits: Callable[[str], bool] | None = None,
) -> str:
    """Render the definition and the demonstrations that `kind` asks for.

    A demonstration is added only if `fits` accepts the instruction that includes it; after the
    first that does not fit no other is tried.
    """
    instruction = _closed(f"Definition: {definition.strip()}") + "\n\n"
    for number, example in enumerate(examples[: DEMONSTRATIONS[kind]], start=1):
        longer = instruction + _demonstration(number, example)
        if fits is not None and not fits(longer):
            break
        instruction = longer
    return instruction


def render_input(text: str) -> str:
    """Render the input of one instance, up to the place where the answer begins."""
    return _closed(f"Now complete the following example -\nInput: {text.strip()}") + "\nOutput: "


def _demonstration(number: int, example: PositiveExample) -> str:
    shown = _closed(f" Positive Example {number} -\nInput: {example.input.strip()}")
    return _closed(f"{shown}\n Output: {example.output.strip()}") + "\n\n"


def _closed(text: str) -> str:
    """Append a full stop unless the text ends in ASCII punctuation."""
    return text if text[-1] in string.punctuation else text + "."
