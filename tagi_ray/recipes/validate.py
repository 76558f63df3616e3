"""Merged settings checked against a tree of sections; every problem told in one line with its place.

A problem names the field, its value and what it should be. Checks between fields can only run where
each field is right by itself, so wrong fields are taken out and the rest is checked once more.
"""

from __future__ import annotations

import copy
import difflib
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar, cast, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from tagi_ray.recipes.yaml_source import Keys

COMMAND_LINE = "command line"
_FIELD_NAME = re.compile(r"[a-z_]+(?:\.[a-z_]+)*")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the nearest known word, or nothing if none is near."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


Tree = TypeVar("Tree", bound=BaseModel)


def validate(
    values: dict[str, Any], places: dict[Keys, str], tree: type[Tree], complete: bool = True
) -> tuple[Tree | None, list[str]]:
    """Return the values as a `tree` of sections, which has a name, or None and all problems.

    `places` says where each value was written. Settings that are not `complete`, because a file
    could not be read, are checked field by field only.
    """
    remaining = copy.deepcopy(values)
    removed: list[Keys] = []
    problems: dict[str, None] = {}  # an ordered set
    while True:
        remaining.setdefault("name", "unnamed")
        try:
            # JSON mode is strict about types (no bool for a number) and takes a list for a tuple.
            document = json.dumps(_whole_numbers(remaining))
            checked = tree.model_validate_json(document, strict=True)
            return (None if problems else checked), list(problems)
        except ValidationError as error:
            found = _by_field(error, remaining)
        for keys, errors in found.items():
            for place, problem in _problems(keys, errors, remaining, places, tree):
                between_fields = isinstance(_at(remaining, keys), dict) and _is_check(errors[0])
                if between_fields and (not complete or _mentions(problem, removed)):
                    continue
                problems[f"{place}: {problem}"] = None
        wrong = [keys for keys in found if keys]
        for keys in wrong:
            _remove(remaining, keys)
        removed += wrong
        if not wrong:
            return None, list(problems)


def _is_check(error: ErrorDetails) -> bool:
    return error["type"] == "value_error"


def _whole_numbers(value: Any) -> Any:
    """Turn 1e4 into 10000, which is welcome where an integer is wanted."""
    if isinstance(value, dict):
        section = cast(dict[str, Any], value)
        return {key: _whole_numbers(item) for key, item in section.items()}
    if isinstance(value, list):
        return [_whole_numbers(item) for item in cast(list[Any], value)]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _by_field(error: ValidationError, values: dict[str, Any]) -> dict[Keys, list[ErrorDetails]]:
    """Group errors by the value they are about: a union reports one for each of its members."""
    grouped: dict[Keys, list[ErrorDetails]] = {}
    for details in error.errors(include_url=False):
        keys: Keys = ()
        for part in details["loc"]:
            if not _has(_at(values, keys), part):
                break
            keys = (*keys, part)
        grouped.setdefault(keys, []).append(details)
    return grouped


def _has(value: Any, key: str | int) -> bool:
    if isinstance(value, dict):
        return key in value
    return isinstance(value, list) and isinstance(key, int) and key < len(cast(list[Any], value))


def _at(values: Any, keys: Keys) -> Any:
    for key in keys:
        values = values[key]
    return values


def _remove(values: dict[str, Any], keys: Keys) -> None:
    """Take a value out; of a list the whole, so that the other positions stay true."""
    in_list = [index for index, key in enumerate(keys) if isinstance(key, int)]
    *section, last = keys[: in_list[0]] if in_list else keys
    try:
        _at(values, tuple(section)).pop(last, None)
    except KeyError:
        return  # the section around it is out already


def _mentions(problem: str, removed: list[Keys]) -> bool:
    mentioned = {tuple(name.split(".")) for name in _FIELD_NAME.findall(problem)}
    return any(name[: len(keys)] == keys for keys in removed for name in mentioned)


def _problems(
    keys: Keys,
    errors: list[ErrorDetails],
    values: dict[str, Any],
    places: dict[Keys, str],
    tree: type[BaseModel],
) -> Iterator[tuple[str, str]]:
    first = errors[0]
    value = _at(values, keys)
    place = _place(keys, places)
    dotted = ".".join(str(key) for key in keys)
    if _is_check(first):
        for line in first["msg"].removeprefix("Value error, ").splitlines():
            if isinstance(value, dict):
                yield _place_of_mention(line, places) or place, line
            else:
                yield place, f"{dotted}: {line}"
    elif first["type"] == "extra_forbidden":
        yield place, _unknown(keys, tree)
    elif first["type"] in ("model_type", "model_attributes_type"):
        listed = ", ".join(_fields(keys, tree))
        yield place, f"{dotted}={_show(value)} should be a section with fields among: {listed}"
    else:
        wanted = " or ".join(dict.fromkeys(_wanted(error) for error in errors))
        choices = [
            choice
            for error in errors
            for choice in re.findall(r"'([^']*)'", str(error.get("ctx", {}).get("expected", "")))
        ]
        hint = did_you_mean(value, choices) if isinstance(value, str) else ""
        yield place, f"{dotted}={_show(value)} should {wanted}.{hint}".replace("..", ".")


def _wanted(error: ErrorDetails) -> str:
    message = re.sub(r"^(Input|Tuple|List) should ", "", error["msg"])
    message = message.replace("a valid tuple", "a list").replace("a valid array", "a list")
    return message.replace(" after validation", "")


def _show(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _place(keys: Keys, places: dict[Keys, str]) -> str:
    """Return where a value, or else the nearest section around it, was written."""
    around = (keys[:end] for end in range(len(keys), -1, -1))
    return next((places[part] for part in around if part in places), COMMAND_LINE)


def _place_of_mention(problem: str, places: dict[Keys, str]) -> str | None:
    """Return where the first field named by a problem was set; the command line goes first."""
    spelled = {".".join(map(str, keys)): place for keys, place in places.items()}
    first = _FIELD_NAME.match(problem)
    # A name without a dot may be a word like any other, unless the problem begins with it.
    found = [
        spelled[name]
        for name in _FIELD_NAME.findall(problem)
        if name in spelled and ("." in name or (first and name == first.group()))
    ]
    return COMMAND_LINE if COMMAND_LINE in found else next(iter(found), None)


def _fields(keys: Keys, tree: type[BaseModel]) -> list[str]:
    section, named = tree, False
    for key in keys:
        if named:  # by the user: a variant
            named = False
            continue
        info = section.model_fields[str(key)]
        below = _section_of(info)
        assert below is not None
        section, named = below, get_origin(info.annotation) is dict
    return list(section.model_fields)


def _unknown(keys: Keys, tree: type[BaseModel]) -> str:
    *section, last = (str(key) for key in keys)
    known = _fields(tuple(section), tree)
    where = ".".join(section) or f"a {tree.__name__.lower().replace('experiment', 'recipe')}"
    hint = did_you_mean(last, known)
    if not hint:
        same = [name for name in _all_fields(tree) if name.split(".")[-1] == last]
        near = [name for name in same if name.split(".")[0] in section] or same
        hint = f" Did you mean {near[0]!r}?" if len(near) == 1 else ""
    return f"{last!r} is not a field of {where}.{hint or ' Its fields: ' + ', '.join(known)}"


def _all_fields(section: type[BaseModel]) -> Iterator[str]:
    for name, info in section.model_fields.items():
        yield name
        if below := _section_of(info):
            yield from (f"{name}.{field}" for field in _all_fields(below))


def _section_of(info: FieldInfo) -> type[BaseModel] | None:
    """Return the section that a field holds, be it always or at times; None for other fields."""
    for kind in (info.annotation, *get_args(info.annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None
