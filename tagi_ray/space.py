"""What a sweep tries: a file of swept fields, each with its values, and how they are searched.

Imports neither torch nor ray, so that `--help` and `--dry-run` answer at once.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from functools import reduce
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import Field, model_validator

from tagi_ray.config import RUN_NAME, Experiment
from tagi_ray.errors import ConfigError
from tagi_ray.recipes import changed
from tagi_ray.recipes.validate import COMMAND_LINE, did_you_mean, validate
from tagi_ray.recipes.yaml_source import dump, inline, parse
from tagi_ray.sections import Count, CountOrZero, Distinct, Positive, Section

FOLDER = Path(__file__).parent / "spaces"
METHOD = "tagi"
"""The variant that a sweep trains."""
FIXED = (
    "name", "storage", "seeds", "resources", "loggers", "evaluation", "variants", "metatrain",
    "oracle",
)  # fmt: skip
"""Sections that change nothing of what a trial learns."""
MEASURED = (
    "data.valid_fraction", "data.train_categories", "data.train_instances", "data.max_target_tokens",
    "backbone.path", "backbone.tokenizer", "finetune.valid_groups", "finetune.instances",
)  # fmt: skip
"""Fields that change what the validation loss is of."""
Objective = Literal["valid_loss", "adapter_parameters"]
_FIELD = re.compile(r"\w+(?:\.\w+)*")


class Domain(Section):
    """The values of a swept field: a list of them, or a range with both of its ends."""

    choice: Distinct[Any] | None = None
    uniform: tuple[float, float] | None = None
    log_uniform: tuple[Positive, Positive] | None = None
    integers: tuple[int, int] | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> Domain:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(
                "give a list of values, or one of uniform, log_uniform and integers with its two"
                f" ends, not {' and '.join(given)}"
            )
        if (ends := self.ends) and ends[0] >= ends[1]:
            raise ValueError(
                f"{given[0]}={inline(list(ends))}: give two ends, the first below the second"
            )
        return self

    @property
    def ends(self) -> tuple[float, float] | None:
        """Lowest and highest value of a range; None for a list of values."""
        return self.uniform or self.log_uniform or self.integers

    def values(self) -> tuple[Any, ...]:
        """Return the values of a list, or the ends of a range."""
        return self.ends or self.choice or ()

    def examples(self) -> tuple[Any, ...]:
        """Return what a field has to take: the values of a list, or of a range the ends and, where
        it is not of integers, a fraction between them.
        """
        ends = self.uniform or self.log_uniform
        return (*ends, ends[0] + (ends[1] - ends[0]) / math.pi) if ends else self.values()

    def listed(self, value: Any) -> Any:
        """Return a value as the list has it, 5 for 5.0, or unchanged."""
        return next((one for one in self.values() if one == value), value)

    def holds(self, value: Any) -> bool:
        """Say whether a value is one of these."""
        if self.ends is None:
            return value in self.values()
        return isinstance(value, int | float) and self.ends[0] <= value <= self.ends[1]


class Space(Section):
    """What a sweep tries, and how."""

    name: str
    """Of the file; the sweep's folder is named by the recipe and it."""
    search: Literal["grid", "random", "tpe"] = "random"
    """`grid` tries every combination; `tpe` is Optuna's, which learns from the trials before."""
    trials: Count = 20
    """Trials of `random` and `tpe`, the recipe's own settings, which are always tried, among
    them."""
    objectives: Distinct[Objective] = ("valid_loss",)
    """What `tpe` lowers. valid_loss: the cross-entropy on the validation tasks, which the weights
    of the other losses do not scale."""
    scheduler: Literal["asha", "none"] = "asha"
    """`asha` ends trials early that are worse than most at the same step."""
    concurrent: Literal["auto"] | Count = "auto"
    """Trials at a time; `auto`: as many as the cluster has room for."""
    retries: CountOrZero = 1
    """How often a trial that failed is tried again."""
    seed: int = 0
    """Of the search."""
    seeds: Distinct[int] = (0, 1, 2)
    """Trials have the first; the best one and the recipe's own are scored with all of them."""
    space: dict[str, Domain] = Field(default_factory=dict[str, Domain])
    """Dotted fields of the recipe, and their values."""

    @model_validator(mode="after")
    def _searchable(self) -> Space:
        problems: list[str] = []
        if self.search == "grid":
            problems += [
                f"space.{field}: search=grid needs a list of values, not a range"
                for field, domain in self.space.items()
                if domain.ends
            ]
            if self.trials != type(self).model_fields["trials"].default:
                problems.append(
                    f"trials={self.trials} would not be read: search=grid tries every combination"
                )
        if self.objectives != ("valid_loss",):
            if "valid_loss" not in self.objectives:
                problems.append("objectives leaves valid_loss out, by which the best is chosen")
            elif self.search != "tpe" or self.scheduler != "none":
                problems.append(
                    f"objectives={inline(list(self.objectives))} needs search=tpe and"
                    " scheduler=none: other searches and the scheduler know one objective"
                )
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def count(self) -> int:
        """Trials in all, the recipe's own settings among them."""
        if self.search != "grid":
            return self.trials
        return 1 + math.prod(len(domain.values()) for domain in self.space.values())


def names() -> list[str]:
    """Return the spaces that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_space(name_or_path: str, experiment: Experiment) -> Space:
    """Return the space for sweeps of a recipe, or raise a ConfigError that lists all problems."""
    path = FOLDER / f"{name_or_path}.yaml"
    if name_or_path.endswith((".yaml", ".yml")) or "/" in name_or_path:
        path = Path(name_or_path)
    if not path.is_file():
        raise ConfigError([
            f"--space {name_or_path}: there is no such space.{did_you_mean(name_or_path, names())}"
            f" The spaces are: {', '.join(names())}; or give the path of a .yaml file"
        ])  # fmt: skip
    try:
        parsed = parse(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path}: cannot be read as UTF-8 text: {error}"]) from error
    shown = os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
    problems = [f"{shown}:{line}: {problem}" for line, problem in parsed.problems]
    document = parsed.value
    if not isinstance(document, dict):
        raise ConfigError(problems or [f"{shown}:1: a space is a mapping with a field `space`"])
    values = {"name": path.stem, **cast(dict[str, Any], document)}
    if isinstance(values.get("space"), dict):
        # In a file a list is short for the choice of its values.
        values["space"] = {
            field: {"choice": value} if isinstance(value, list) else value
            for field, value in cast(dict[str, Any], values["space"]).items()
        }
    places = {keys: f"{shown}:{line}" for keys, line in parsed.lines.items()}
    places[()] = f"{shown}:1"
    space, found = validate(values, places, Space)
    problems += found
    if space is not None:
        problems += [
            f"{places[('space', field)] if field else places[()]}: {problem}"
            for field, problem in _unfit(space, experiment)
        ]
    if problems or space is None:
        raise ConfigError(problems)
    return space


def _unfit(space: Space, experiment: Experiment) -> Iterator[tuple[str, str]]:
    """Yield what a space and a recipe have against each other, with the field that it is about."""
    if not RUN_NAME.fullmatch(f"{experiment.name}_{space.name}_best"):
        yield (
            "",
            f"the sweep's best run cannot be named {experiment.name}_{space.name}_best: use at most"
            " 64 of a to z, 0 to 9, '.', '_' and '-', in name=... and the name of the space's file",
        )
    if not space.space:
        yield "", "space names no field: give fields of the recipe, and their values"
    if METHOD not in experiment.variants:
        yield "", f"variants has no {METHOD}, which a sweep trains: add `{METHOD}: {{}}`"
        return
    stage = experiment.finetune
    if space.scheduler == "asha" and not 0 < stage.valid_every < stage.steps:
        yield (
            "",
            f"scheduler=asha compares trials at every validation, and finetune.valid_every="
            f"{stage.valid_every} of finetune.steps={stage.steps} has none before the end: set"
            f" finetune.valid_every={max(1, stage.steps // 8)}, or scheduler: none",
        )
    for field, domain in space.space.items():
        yield from ((field, problem) for problem in _unfit_field(field, domain, space, experiment))


def _unfit_field(field: str, domain: Domain, space: Space, experiment: Experiment) -> Iterator[str]:
    if not _FIELD.fullmatch(field):
        yield f"space: {field!r} is not the name of a field: write it as section.field"
        return
    section, _, rest = field.partition(".")
    if section in FIXED:
        yield f"space.{field}: {section} changes nothing of what a trial learns: leave it out"
        return
    if field in MEASURED:
        yield (
            f"space.{field}: it changes what the validation loss is of, by which trials are"
            " compared: leave it out, and make a sweep for each value"
        )
    if rest.split(".")[0] in dict(experiment.variants[METHOD]).get(section, {}):
        yield (
            f"space.{field} would not be read: variants.{METHOD} of the recipe sets {field}: leave"
            " it out there"
        )
    if field == "finetune.steps" and space.scheduler == "asha":
        yield (
            f"space.{field}: scheduler=asha compares trials that take as many steps: set"
            " scheduler: none, or leave it out"
        )
    if not domain.values():
        yield f"space.{field} has no values: give a list, or a range such as uniform: [0, 1]"
        return
    seen: dict[str, None] = {}
    for value in domain.examples():
        try:
            changed(experiment, [f"{field}={inline(value)}"])
        except ConfigError as error:
            seen |= dict.fromkeys(error.problems)
    yield from (f"space: {p.removeprefix(f'{COMMAND_LINE}: ')}" for p in seen)
    if seen:
        return
    try:
        own = own_value(field, experiment)
    except TypeError:
        yield (
            f"space.{field}: the recipe does not set {field.rpartition('.')[0]}, a part of which"
            " this is: set it there"
        )
        return
    if space.search == "tpe" and domain.ends and not domain.holds(own):
        yield (
            f"space.{field}: the recipe's own value {inline(own)} is tried too, and lies outside:"
            " widen the range, or change the recipe"
        )


def own_value(field: str, experiment: Experiment) -> Any:
    """Return the recipe's own value of a field; TypeError where it sets no section around it."""
    return _at(field, experiment.model_dump(mode="json"))


def _at(field: str, settings: Mapping[str, Any]) -> Any:
    return reduce(lambda at, key: at[key], field.split("."), settings)


def own_values(space: Space, experiment: Experiment) -> dict[str, Any]:
    """Return the recipe's own values of the swept fields."""
    settings = experiment.model_dump(mode="json")
    return {field: _at(field, settings) for field in space.space}


def own_texts(space: Space, experiment: Experiment) -> dict[str, str]:
    """Return the recipe's own values of the swept fields as YAML text."""
    return {field: inline(value) for field, value in own_values(space, experiment).items()}


def texts(values: Mapping[str, Any]) -> dict[str, str]:
    """Return the values of a trial as YAML text, which those of lists are already."""
    return {f: one if isinstance(one, str) else inline(one) for f, one in values.items()}


def as_text(space: Space) -> str:
    """Return the space as YAML that `load_space` reads."""
    return dump(space.model_dump(mode="json", exclude_none=True))
