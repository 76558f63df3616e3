"""Strict JSON from files that people write, with the place named in every refusal.

And text files of our own, written so that no crash leaves half of one.
"""

from __future__ import annotations

import gzip
import json
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from tagi_ray.errors import DataError
from tagi_ray.remote_files import opened, read_bytes

MAX_LINE_BYTES = 8 << 20
SHOWN_FAULTS = 5

Record = Mapping[str, Any]


class Faults:
    """Refusals of the records of one file, to be told together."""

    def __init__(self) -> None:
        self._first: list[str] = []
        self._count = 0

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Note a DataError of the block, and go on."""
        try:
            yield
        except DataError as error:
            self._count += 1
            if self._count <= SHOWN_FAULTS:
                self._first.append(str(error))

    def raise_any(self, where: str) -> None:
        """Raise a DataError with the first refusals and their count, if there are any."""
        if self._count == 1:
            raise DataError(self._first[0])
        if self._count:
            some = f", the first {len(self._first)}:" if self._count > SHOWN_FAULTS else ":"
            raise DataError("\n".join([f"{where}: {self._count} problems{some}", *self._first]))


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
    """Yield offset, number and bytes of every line that is not blank.

    Of a line that is longer than the limit only as much is read as `line_record` needs to refuse
    it. Raises DataError for a file that can't be read.
    """
    with opened_lines(path) as file:
        place = number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if line.strip():
                yield place, number, line
            while not line.endswith(b"\n") and (rest := file.readline(MAX_LINE_BYTES)):
                line = rest
            place = file.tell()


@contextmanager
def opened_lines(path: str) -> Iterator[BinaryIO]:
    """Open a text file, unpacked if it is named `.gz`; raises DataError where it can't be read."""
    with opened(_unpacked(path).name if path.endswith(".gz") else path) as file:
        yield file


@lru_cache(maxsize=1)
def _unpacked(path: str) -> Any:
    """Return a temporary file with the content of a gzip file, in which places can be sought."""
    unpacked = tempfile.NamedTemporaryFile(prefix="tagi_", suffix=".jsonl")  # noqa: SIM115
    with opened(path) as packed:
        try:
            with gzip.open(packed) as content:
                shutil.copyfileobj(content, unpacked)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise DataError(
                f"{path}: is damaged or cut off, and nothing of it was read ({error}); fetch or"
                " compress it again"
            ) from error
    unpacked.flush()
    return unpacked


def line_record(line: bytes, where: str) -> Record:
    """Return the object of one line; `where` names it in refusals."""
    return as_object(_parse(line_text(line, where).rstrip(), where), where)


def line_text(line: bytes, where: str) -> str:
    """Return the text of one line; `where` names it in refusals."""
    if len(line) > MAX_LINE_BYTES:
        raise DataError(f"{where}: is longer than {MAX_LINE_BYTES} bytes; divide or remove it")
    try:
        return line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: is not UTF-8 at byte {error.start}; convert the file") from error


def as_object(value: Any, where: str) -> Record:
    """Return a parsed value that is an object, else raise a DataError."""
    if not isinstance(value, dict):
        refuse(where, "a record", value, "give a JSON object")
    return value


def read_json_file(path: str, constants: bool = False) -> Any:
    """Return what a JSON file holds; NaN and Infinity are let in with `constants` only."""
    try:
        return _parse(read_bytes(path).decode("utf-8-sig").rstrip(), path, constants)
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
        place = f"{f'line {error.lineno}, ' if error.lineno > 1 else ''}column {error.colno}"
        cut = error.pos >= len(text) or error.msg.startswith("Unterminated")
        fault = "is cut off, or not JSON" if cut else "is not JSON"
        raise DataError(f"{where}: {fault} ({error.msg}, {place}); correct it") from error
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
