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
from typing import Any, TypeGuard

from tagi_ray.errors import DataError
from tagi_ray.json_files import Faults, Record, read_json_file, refuse
from tagi_ray.record_files import NEEDED, SUFFIXES, Records, hub_rows, records_of
from tagi_ray.remote_files import list_files, stem_of
from tagi_ray.sections import DataSettings
from tagi_ray.tasks import Instance, PositiveExample, Task, check_name, listed_names

logger = logging.getLogger(__name__)

NO_CATEGORY = "uncategorised"
CURES = {
    "sni": "clone https://github.com/allenai/natural-instructions and give its folder tasks",
    "records": f"give a file or folder of {', '.join(SUFFIXES)} with {NEEDED}",
}


def read_tasks(settings: DataSettings) -> Iterator[SniTask | RecordTask]:
    """Yield every task of `settings.path`; its `.instances()` reads the instances.

    Raises DataError with all that is wrong in the files, or in the first file of records.
    """
    if settings.source == "sni":
        yield from _sni_tasks(settings)
    elif settings.source == "hub":
        yield from _record_tasks([hub_rows(settings)], settings)
    else:
        yield from _record_tasks(
            [records_of(path) for path in _files(settings, SUFFIXES)], settings
        )


def _files(settings: DataSettings, suffixes: Sequence[str]) -> list[str]:
    path, cure = str(settings.path), CURES[settings.source]
    found = list_files(path, suffixes)
    if found is None:
        raise DataError(f"data.path={path}: no such file or folder; {cure}")
    if not found:
        raise DataError(f"data.path={path}: holds no {' or '.join(suffixes)} file; {cure}")
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
    faults = Faults()
    for path in _files(settings, (".json",)):
        if listed is not None and stem_of(path) not in listed:
            skipped += 1
            continue
        with faults.noted():
            content = _sni_content(path)
            task = _sni_task(content, check_name(stem_of(path), path), path)
            for _ in _sni_instances(content, path):
                pass
            yield SniTask(task, path)
    faults.raise_any(f"data.path={settings.path}")
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


# Records: tasks may be interleaved in a file, and go on in the next one.


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
    tasks: dict[str, _Found] = {}
    for number, records in enumerate(files):
        _find_tasks(number, records, tasks)
    if not tasks:
        raise DataError(f"data.path={settings.path}: holds no records; name another file")
    for name, found in tasks.items():
        task = Task(name, found.category, tuple(found.definitions))
        pieces = tuple((files[number], places) for number, places in found.places.items())
        yield RecordTask(task, pieces)


def _find_tasks(number: int, records: Records, tasks: dict[str, _Found]) -> None:
    """Check every record of a file, and add its place to its task."""
    identify: Callable[[Record, str], tuple[str, str, str]] | None = None
    faults = Faults()
    for place, where, parse in records.scan():
        with faults.noted():
            record = parse()
            if identify is None:
                # The columns of a file's first record say which of the two formats it is in.
                identify = _jsonl_identity if "task" in record else _alpaca_identity
            name, category, definition = identify(record, where)
            _example(record, where)
            found = tasks.setdefault(name, _Found(category, {}, {}))
            if found.category != category:
                refuse(where, "category", category, f"task {name} began as {found.category!r}")
            found.definitions[definition] = None
            found.places.setdefault(number, array("q")).append(place)
    faults.raise_any(records.path)


def _jsonl_identity(record: Record, where: str) -> tuple[str, str, str]:
    """Return task name, category and instruction."""
    name = check_name(_text(record, "task", where), where)
    category = _text(record, "category", where) if "category" in record else NO_CATEGORY
    return name, category, _instruction(record, where)


def _alpaca_identity(record: Record, where: str) -> tuple[str, str, str]:
    """Return what `_jsonl_identity` does; each instruction is a task of its own."""
    if "task" in record:
        raise DataError(f"{where}: has a task, and the file's first record has none; divide them")
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
