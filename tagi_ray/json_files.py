"""Strict JSON from files that people write, with the place named in every refusal.

And text files of our own, written so that no crash leaves half of one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from tagi_ray.errors import DataError

MAX_LINE_BYTES = 8 << 20

Record = Mapping[str, Any]


def write_whole(path: Path, text: str) -> None:
    """Write a text file that appears complete or not at all. One process writes."""
    draft = path.with_name(f".{path.name}.tmp")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def read_json_lines(path: Path) -> Iterator[tuple[int, Record]]:
    """Yield the line number and the object of every line of a JSONL file that is not blank.

    Raises DataError with file and line for what is not strictly one JSON object in UTF-8.
    """
    for _, number, line in lines_of(str(path)):
        yield number, line_record(line, f"{path}:{number}")


def lines_of(path: str) -> Iterator[tuple[int, int, bytes]]:
    """Yield offset, number and bytes of every line that is not blank."""
    place = 0
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield place, number, line
                place += len(line)
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror}); name another file") from error


def line_record(line: bytes, where: str) -> Record:
    """Return the object of one line; `where` names it in refusals."""
    if len(line) > MAX_LINE_BYTES:
        raise DataError(f"{where}: is {len(line)} bytes long; at most {MAX_LINE_BYTES} are read")
    try:
        text = line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: is not UTF-8 at byte {error.start}; convert the file") from error
    return as_object(_parse(text, where), where)


def as_object(value: Any, where: str) -> Record:
    """Return a parsed value that is an object, else raise a DataError."""
    if not isinstance(value, dict):
        refuse(where, "a record", value, "give a JSON object")
    return value


def read_json_file(path: str, constants: bool = False) -> Any:
    """Return what a JSON file holds; NaN and Infinity are let in with `constants` only."""
    try:
        return _parse(Path(path).read_bytes().decode("utf-8-sig"), path, constants)
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror}); name another file") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 at byte {error.start}; convert the file") from error


def _parse(text: str, where: str, constants: bool = False) -> Any:
    """Parse JSON strictly: no key twice, and no NaN or Infinity unless `constants`."""
    constant = float if constants else _no_constant
    try:
        return json.loads(text, parse_constant=constant, object_pairs_hook=_no_repeats)
    except RecursionError as error:
        raise DataError(f"{where}: is nested too deeply; correct the record") from error
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise DataError(f"{where}: is not JSON ({error.msg}, {place}); correct it") from error
    except ValueError as error:
        raise DataError(f"{where}: {error}; correct the record") from error


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"holds {name}, which is not JSON")


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"holds the key {twice!r} twice")
    return content


def refuse(where: str, field: str, value: Any, cure: str) -> NoReturn:
    """Raise a DataError about a field's value, with the cure."""
    shown = repr(value)
    shown = shown if len(shown) <= 80 else f"{shown[:80]}..."
    raise DataError(f"{where}: {field} can't be {shown}; {cure}")
