"""Readers of task files: Super-NaturalInstructions, JSONL, Alpaca, and datasets of the hub.

A first pass checks every record and finds which task it belongs to; the instances of a task are
then read again where they lie, so that nobody ever holds more than one task.
"""

from __future__ import annotations

import hashlib
import logging
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, TypeGuard

from tagi_ray.errors import DataError
from tagi_ray.json_files import (
    Record,
    as_object,
    line_record,
    lines_of,
    read_json_file,
    refuse,
)
from tagi_ray.sections import DataSettings
from tagi_ray.tasks import Instance, PositiveExample, Task, check_name, listed_names

logger = logging.getLogger(__name__)

NO_CATEGORY = "uncategorised"


def read_tasks(settings: DataSettings) -> Iterator[SniTask | RecordTask]:
    """Yield every task of `settings.path`; its `.instances()` reads the instances."""
    if settings.source == "sni":
        yield from _sni_tasks(settings)
        return
    if settings.source == "hub":
        files: list[Records] = [HubRows(str(settings.path), settings.revision)]
    else:
        files = [
            JsonList(str(path)) if path.suffix == ".json" else JsonLines(str(path))
            for path in _files(settings, (".jsonl", ".json"))
        ]
    yield from _record_tasks(files, settings)


def _files(settings: DataSettings, suffixes: Sequence[str]) -> list[Path]:
    path = Path(str(settings.path))
    found = sorted(p for p in path.iterdir() if p.suffix in suffixes) if path.is_dir() else [path]
    if not path.exists():
        raise DataError(f"data.path={path}: no such file or folder; name an existing one")
    if not found:
        raise DataError(f"data.path={path}: holds no {' or '.join(suffixes)} file; name another")
    return found


# Super-NaturalInstructions: one JSON file a task, in the official schema.


@dataclass(frozen=True, slots=True)
class SniTask:
    """A task file of Super-NaturalInstructions."""

    task: Task
    path: str

    def instances(self) -> Iterator[Instance]:
        """Yield the instances in the order of the file."""
        yield from _sni_instances(_sni_content(self.path), self.path)


def _sni_tasks(settings: DataSettings) -> Iterator[SniTask]:
    listed = listed_names(settings)
    skipped = 0
    for path in _files(settings, (".json",)):
        if listed is not None and path.stem not in listed:
            skipped += 1
            continue
        content = _sni_content(str(path))
        task = _sni_task(content, check_name(path.stem, str(path)), str(path))
        for _ in _sni_instances(content, str(path)):
            pass
        yield SniTask(task, str(path))
    if skipped:
        logger.info("%d task files are in neither list of tasks and are left out", skipped)


def _sni_content(path: str) -> Record:
    # The official files hold NaN in fields that nobody reads; those that are read must be texts.
    content = read_json_file(path, constants=True)
    if not isinstance(content, dict):
        raise DataError(f"{path}: is not a JSON object; use the SNI schema, or another data.source")
    return content


def _sni_task(content: Record, name: str, path: str) -> Task:
    definitions = content.get("Definition")
    if isinstance(definitions, str):
        definitions = [definitions]
    if not _are_texts(definitions) or not all(text.strip() for text in definitions):
        refuse(path, "Definition", definitions, "give a text, or a list of texts, none empty")
    categories = content.get("Categories")
    if not _are_texts(categories):
        refuse(path, "Categories", categories, "give a list with the category first")
    examples = content.get("Positive Examples", [])
    if not isinstance(examples, list):
        refuse(path, "Positive Examples", examples, "give a list of objects")
    for number, example in enumerate(examples, start=1):
        pair = (example.get("input"), example.get("output")) if isinstance(example, dict) else ()
        if len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            where = f"{path}: positive example {number}"
            refuse(where, "input and output", example, "give two texts")
    return Task(
        name=name,
        category=categories[0],
        definitions=tuple(definitions),
        positive_examples=tuple(PositiveExample(e["input"], e["output"]) for e in examples),
    )


def _sni_instances(content: Record, path: str) -> Iterator[Instance]:
    instances: Any = content.get("Instances")
    if not isinstance(instances, list) or not instances:
        refuse(path, "Instances", instances, "give a list with at least one instance")
    met: set[str] = set()
    for number, instance in enumerate(instances, start=1):
        if not isinstance(instance, dict):
            refuse(path, f"instance {number}", instance, "give an object with id, input, output")
        name = instance.get("id")
        if not isinstance(name, str) or not name:
            refuse(path, f"id of instance {number}", name, "give a text that is not empty")
        if name in met:
            refuse(path, f"id of instance {number}", name, "give each instance an id of its own")
        met.add(name)
        where = f"{path}: instance {name}"
        text, outputs = instance.get("input"), instance.get("output")
        if not isinstance(text, str):
            refuse(where, "input", text, "give a text")
        if not _are_texts(outputs):
            refuse(where, "output", outputs, "give a list of texts, at least one")
        yield Instance(name, text, tuple(outputs))


# Records: any file whose tasks may be interleaved, one instance a record.


class Records(Protocol):
    """A file of records that can be read through, and again at the places found then."""

    def scan(self) -> Iterator[tuple[int, str, Record]]:
        """Yield the place of each record, its name in messages, and the record."""
        ...

    def read(self, places: Sequence[int]) -> Iterator[tuple[str, Record]]:
        """Yield the records at some places."""
        ...


@dataclass(frozen=True, slots=True)
class JsonLines:
    """A JSONL file; a place is the offset of a line in bytes."""

    path: str

    def scan(self) -> Iterator[tuple[int, str, Record]]:
        """Yield every line that is not blank."""
        for place, number, line in lines_of(self.path):
            where = f"{self.path}:{number}"
            yield place, where, line_record(line, where)

    def read(self, places: Sequence[int]) -> Iterator[tuple[str, Record]]:
        """Yield the lines that begin at some places."""
        with open(self.path, "rb") as file:
            for place in places:
                file.seek(place)
                where = f"{self.path} (byte {place})"
                yield where, line_record(file.readline(), where)


@dataclass(frozen=True, slots=True)
class JsonList:
    """A JSON file that is one list, as Alpaca was published; read whole."""

    path: str

    def scan(self) -> Iterator[tuple[int, str, Record]]:
        """Yield every element."""
        for place, record in enumerate(_json_list(self.path)):
            where = f"{self.path}: record {place + 1}"
            yield place, where, as_object(record, where)

    def read(self, places: Sequence[int]) -> Iterator[tuple[str, Record]]:
        """Yield the elements at some indices."""
        for place in places:
            yield f"{self.path}: record {place + 1}", _json_list(self.path)[place]


@dataclass(frozen=True, slots=True)
class HubRows:
    """The `train` split of a hub dataset; a place is a row number."""

    path: str
    revision: str | None

    def scan(self) -> Iterator[tuple[int, str, Record]]:
        """Yield every row."""
        for place, row in enumerate(_hub_dataset(self.path, self.revision)):
            yield place, f"{self.path}: row {place}", row

    def read(self, places: Sequence[int]) -> Iterator[tuple[str, Record]]:
        """Yield some rows."""
        rows = _hub_dataset(self.path, self.revision)
        for place in places:
            yield f"{self.path}: row {place}", rows[place]


@dataclass(frozen=True, slots=True)
class RecordTask:
    """A task whose instances are records of one or several files."""

    task: Task
    pieces: tuple[tuple[Records, array[int]], ...]
    """Files, and the places of the task's records in each."""

    def instances(self) -> Iterator[Instance]:
        """Yield the instances in the order of the files."""
        number = 0
        for records, places in self.pieces:
            for where, record in records.read(places):
                number += 1
                yield Instance(f"{self.task.name}-{number}", *_example(record, where))


@dataclass(slots=True)
class _Found:
    """What the first pass knows of a task so far."""

    category: str
    definitions: dict[str, None]
    places: dict[int, array[int]]


def _record_tasks(files: Sequence[Records], settings: DataSettings) -> Iterator[RecordTask]:
    identify: Callable[[Record, str], tuple[str, str, str]] | None = None
    tasks: dict[str, _Found] = {}
    for number, records in enumerate(files):
        for place, where, record in records.scan():
            if identify is None:
                # The columns say which of the two formats it is in.
                identify = _jsonl_identity if "task" in record else _alpaca_identity
            name, category, definition = identify(record, where)
            _example(record, where)
            found = tasks.setdefault(name, _Found(category, {}, {}))
            if found.category != category:
                refuse(where, "category", category, f"task {name} began as {found.category!r}")
            found.definitions[definition] = None
            found.places.setdefault(number, array("q")).append(place)
    if not tasks:
        raise DataError(f"data.path={settings.path}: holds no records; name another file")
    for name, found in tasks.items():
        task = Task(name, found.category, tuple(found.definitions))
        pieces = tuple((files[number], places) for number, places in found.places.items())
        yield RecordTask(task, pieces)


def _jsonl_identity(record: Record, where: str) -> tuple[str, str, str]:
    """Return task name, category and instruction."""
    name = check_name(_text(record, "task", where), where)
    category = _text(record, "category", where) if "category" in record else NO_CATEGORY
    return name, category, _instruction(record, where)


def _alpaca_identity(record: Record, where: str) -> tuple[str, str, str]:
    instruction = _instruction(record, where)
    name = hashlib.sha256(instruction.encode()).hexdigest()[:12]
    return f"alpaca_{name}", NO_CATEGORY, instruction


def _instruction(record: Record, where: str) -> str:
    text = _text(record, "instruction", where)
    if not text.strip():
        refuse(where, "instruction", text, "give a text that is not empty")
    return text


def _example(record: Record, where: str) -> tuple[str, tuple[str, ...]]:
    """Return the input and the outputs of a record."""
    if ("output" in record) == ("outputs" in record):
        raise DataError(f"{where}: needs either 'output' or 'outputs'; give exactly one of them")
    if "output" in record:
        return _text(record, "input", where), (_text(record, "output", where),)
    if not _are_texts(record["outputs"]):
        refuse(where, "outputs", record["outputs"], "give a list of texts, at least one")
    return _text(record, "input", where), tuple(record["outputs"])


def _text(record: Record, field: str, where: str) -> str:
    if field not in record:
        raise DataError(f"{where}: has no field {field!r}; add it")
    if not isinstance(record[field], str):
        refuse(where, field, record[field], "give a text")
    return record[field]


def _are_texts(value: Any) -> TypeGuard[list[str]]:
    return isinstance(value, list) and bool(value) and all(isinstance(one, str) for one in value)


@lru_cache(maxsize=1)
def _json_list(path: str) -> list[Any]:
    content = read_json_file(path)
    if not isinstance(content, list):
        raise DataError(f"{path}: is not a JSON list; name a JSONL file .jsonl")
    return content


@lru_cache(maxsize=1)
def _hub_dataset(path: str, revision: str | None) -> Any:
    from datasets import load_dataset

    try:
        return load_dataset(path, revision=revision, split="train")
    # Whatever the hub, the network or the cache raises, it is the data that can't be had.
    except Exception as error:
        lines = str(error).splitlines()
        reason = lines[0] if lines else type(error).__name__
        raise DataError(
            f"data.path={path}: can't be loaded from the hub ({reason});"
            " check the id, the revision and the connection"
        ) from error
