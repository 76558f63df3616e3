"""Errors that a person can cure: one sentence with the field, the value and the cure.

A job prints them without a traceback and ends with their exit code; anything else is a defect of
the project and keeps its traceback. All of them survive pickling, since they cross Ray's processes.
"""

from __future__ import annotations

from collections.abc import Sequence


class TagiError(Exception):
    """A failed run, explained in one sentence."""

    exit_code = 1


class ConfigError(TagiError):
    """Every problem of a run's settings, found before any cluster resource is taken."""

    exit_code = 2

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__(list(problems))
        self.problems = list(problems)

    def __str__(self) -> str:
        if len(self.problems) == 1:
            return self.problems[0]
        return "\n".join([f"{len(self.problems)} problems:", *self.problems])


class RunConflictError(ConfigError):
    """The name of the run belongs to a run with other settings."""


class DataError(TagiError):
    """Task files that cannot be used."""

    exit_code = 2


class AdapterError(TagiError):
    """An adapter directory that cannot be used."""

    exit_code = 2


class CheckpointError(TagiError):
    """A checkpoint that is damaged, or belongs to another run."""


class TrainingError(TagiError):
    """Training that cannot go on, such as a loss that is not finite."""
