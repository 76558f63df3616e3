"""A recipe, what it is based on, and the command line, merged and validated into an Experiment.

Every value remembers where it was written, so that all problems of a run can be reported at once,
each with its file and line, before anything is started.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from tagi_ray.config import Experiment
from tagi_ray.errors import ConfigError
from tagi_ray.recipes import yaml_source
from tagi_ray.recipes.validate import COMMAND_LINE, did_you_mean, validate
from tagi_ray.recipes.yaml_source import Keys

FOLDER = Path(__file__).parent


def names() -> list[str]:
    """Return the recipes that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load(name_or_path: str, overrides: Sequence[str] = ()) -> Experiment:
    """Return the settings of a run, or raise a ConfigError that lists all of their problems.

    `overrides` are `section.field=value` with the value in YAML; the last one of a field holds.
    """
    tree = _Tree()
    tree.add_recipe(name_or_path)
    for override in overrides:
        tree.add_override(override)
    return tree.checked()


def changed(experiment: Experiment, overrides: Sequence[str]) -> Experiment:
    """Return the settings of a run with some changed, as `load` does; raises ConfigError too."""
    tree = _Tree(experiment.model_dump(mode="json"))
    for override in overrides:
        tree.add_override(override)
    return tree.checked()


def dump(experiment: Experiment) -> str:
    """Write every setting of a run as a recipe that `load` reads back unchanged."""
    return yaml_source.dump(experiment.model_dump(mode="json"))


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of a recipe file, for editors."""
    schema = Experiment.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "tagi_ray recipe"
    base = {"type": "string", "description": "Recipe whose settings this one changes."}
    schema["properties"] = {"base": base, **schema["properties"]}
    schema.pop("required", None)  # the name is taken from the file's
    return schema


@dataclass
class _Tree:
    """Settings merged so far, where each was written, and the problems met on the way."""

    values: dict[str, Any] = field(default_factory=dict[str, Any])
    places: dict[Keys, str] = field(default_factory=dict[Keys, str])
    problems: list[str] = field(default_factory=list[str])
    readable: bool = True
    """Whether every recipe of the chain was found and read."""

    def add_recipe(self, name_or_path: str) -> None:
        chain: list[tuple[str, yaml_source.Parsed]] = []
        wanted, asked_at, opened = name_or_path, COMMAND_LINE, list[Path]()
        while True:
            path = self._find(wanted, asked_at, opened[-1].parent if opened else None)
            if path is None:
                break
            if path in opened:
                circle = " -> ".join(step.stem for step in [*opened, path])
                self._unreadable(f"{asked_at}: base goes in a circle: {circle}")
                break
            opened.append(path)
            shown = _shown(path)
            parsed = self._read(path, shown)
            chain.append((shown, parsed))
            if "base" not in parsed.value:
                break
            wanted, asked_at = parsed.value.pop("base"), f"{shown}:{parsed.lines[('base',)]}"
            if not isinstance(wanted, str):
                self._unreadable(f"{asked_at}: base={wanted!r} should be the name of a recipe")
                break
        for depth, (shown, parsed) in reversed(list(enumerate(chain))):
            if depth > 0:  # a name is a run's identity: it is not inherited
                parsed.value.pop("name", None)
                parsed.lines.pop(("name",), None)
            _merge(self.values, parsed.value)
            self.places |= {keys: f"{shown}:{line}" for keys, line in parsed.lines.items()}
            self.places[()] = f"{shown}:1"
        if opened:
            self.values.setdefault("name", opened[0].stem)

    def checked(self) -> Experiment:
        experiment, problems = validate(self.values, self.places, Experiment, self.readable)
        if self.problems or experiment is None:
            raise ConfigError([*self.problems, *problems])
        return experiment

    def add_override(self, override: str) -> None:
        dotted, equals, text = override.partition("=")
        keys = tuple(dotted.strip().split("."))
        if not equals or not all(keys):
            self.problems.append(f"{COMMAND_LINE}: {override!r} is not section.field=value")
            return
        parsed = yaml_source.parse(text)
        if parsed.problems:
            self.problems += [
                f"{COMMAND_LINE}: {override!r}: {problem} (quote the value: {dotted}='\"...\"')"
                if problem.startswith("not YAML")
                else f"{COMMAND_LINE}: {override!r}: {problem}"
                for _, problem in parsed.problems
            ]
            return
        for end in range(len(keys)):
            self.places.setdefault(keys[:end], COMMAND_LINE)
        self.places |= {(*keys, *rest): COMMAND_LINE for rest in [(), *parsed.lines]}
        delta: Any = parsed.value
        for key in reversed(keys):
            delta = {key: delta}
        _merge(self.values, delta)

    def _find(self, wanted: str, asked_at: str, beside: Path | None) -> Path | None:
        if wanted.endswith((".yaml", ".yml")) or "/" in wanted:
            path = (beside or Path()) / wanted
            if path.is_file():
                return path.resolve()
            self._unreadable(f"{asked_at}: there is no recipe file {wanted!r}")
            return None
        for folder in (beside, FOLDER):
            if folder and (folder / f"{wanted}.yaml").is_file():
                return (folder / f"{wanted}.yaml").resolve()
        listed = ", ".join(names())
        self._unreadable(
            f"{asked_at}: there is no recipe {wanted!r}.{did_you_mean(wanted, names())}"
            f" The recipes are: {listed}; or give the path of a .yaml file"
        )
        return None

    def _read(self, path: Path, shown: str) -> yaml_source.Parsed:
        try:
            parsed = yaml_source.parse(path.read_text(encoding="utf-8-sig"))
        except (OSError, UnicodeDecodeError) as error:
            self._unreadable(f"{shown}: cannot be read as UTF-8 text: {error}")
            parsed = yaml_source.Parsed()
        self.problems += [f"{shown}:{line}: {problem}" for line, problem in parsed.problems]
        if not isinstance(parsed.value, dict):
            if parsed.value is not None:
                self._unreadable(f"{shown}:1: a recipe is a mapping of sections and fields")
            self.readable = self.readable and not parsed.problems
            parsed.value = {}
        return parsed

    def _unreadable(self, problem: str) -> None:
        self.problems.append(problem)
        self.readable = False


def _merge(into: dict[str, Any], delta: dict[str, Any]) -> None:
    for key, value in delta.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], cast(dict[str, Any], value))
        else:
            into[key] = value


def _shown(path: Path) -> str:
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative
