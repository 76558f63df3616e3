"""Prompts against strings typed out by hand from Tk-Instruct's collator."""

from tagi_ray.prompts import render_input, render_instruction
from tagi_ray.tasks import PositiveExample

EXAMPLES = (
    PositiveExample("  2 plus 2", "4 "),
    PositiveExample("Is it 3?", "No."),
    PositiveExample("never", "shown"),
)


def test_definition_gets_a_full_stop_only_without_punctuation():
    assert render_instruction(" Add the numbers ", (), "def") == "Definition: Add the numbers.\n\n"
    assert render_instruction("Add them!", EXAMPLES, "def") == "Definition: Add them!\n\n"


def test_two_positive_examples():
    assert render_instruction("Add.", EXAMPLES, "def_2pos") == (
        "Definition: Add.\n\n"
        " Positive Example 1 -\nInput: 2 plus 2.\n Output: 4.\n\n"
        " Positive Example 2 -\nInput: Is it 3?\n Output: No.\n\n"
    )


def test_fewer_examples_than_asked_for():
    assert render_instruction("Add.", EXAMPLES[1:2], "def_2pos") == (
        "Definition: Add.\n\n Positive Example 1 -\nInput: Is it 3?\n Output: No.\n\n"
    )


def test_input_ends_where_the_answer_begins():
    assert render_input(" a b\n") == ("Now complete the following example -\nInput: a b.\nOutput: ")
    assert render_input("why?") == "Now complete the following example -\nInput: why?\nOutput: "
    assert render_input("") == "Now complete the following example -\nInput: .\nOutput: "


def test_nothing_is_tried_after_a_demonstration_that_does_not_fit():
    long = PositiveExample("x" * 100, "y")
    tried: list[int] = []

    def fits(text: str) -> bool:
        tried.append(len(text))
        return len(text) < 90

    instruction = render_instruction("Add.", (long, EXAMPLES[0]), "def_2pos", fits)
    assert instruction == "Definition: Add.\n\n"
    assert len(tried) == 1

    instruction = render_instruction("Add.", (EXAMPLES[0], long), "def_2pos", fits)
    assert instruction == (
        "Definition: Add.\n\n Positive Example 1 -\nInput: 2 plus 2.\n Output: 4.\n\n"
    )
