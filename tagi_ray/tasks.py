"""Tasks and instances, and which tasks are trained on, validated on and held out."""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from tagi_ray.errors import DataError
from tagi_ray.remote_files import read_bytes
from tagi_ray.sections import DataSettings

logger = logging.getLogger(__name__)

SplitName = Literal["train", "valid", "test"]

# Task names become folder and file names: nothing that could leave the folder or confuse a shell.
SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,199}")


@dataclass(frozen=True, slots=True)
class Instance:
    """One input of a task, with every accepted output."""

    id: str
    input: str
    outputs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PositiveExample:
    """A demonstration that may stand in the instruction."""

    input: str
    output: str


@dataclass(frozen=True, slots=True)
class Task:
    """A task without its instances; `definitions` are paraphrases, at least one."""

    name: str
    category: str
    definitions: tuple[str, ...]
    positive_examples: tuple[PositiveExample, ...] = ()


def check_name(name: str, where: str) -> str:
    """Return `name` if it can safely be a file name, else raise a `DataError` that says where."""
    if not SAFE_NAME.fullmatch(name) or ".." in name:
        raise DataError(
            f"{where}: task name {name!r} can't be a file name: use letters, digits, '.', '_', '+'"
            " and '-', at most 200, letter or digit first"
        )
    return name


def instance_hash(task_input: str, outputs: Iterable[str]) -> str:
    """Sha256 of an instance, blind to white space, Unicode form and the order of the outputs."""
    content = [_normalised(task_input), sorted(_normalised(output) for output in outputs)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _normalised(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


def read_names(path: str) -> list[str]:
    """Task names of a split file, one per line; empty lines are skipped."""
    try:
        lines = read_bytes(path).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 (byte {error.start}); convert the file") from error
    names = [
        check_name(line.strip(), f"{path}:{number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not names:
        raise DataError(f"{path}: lists no task; write one task name per line")
    return names


def listed_names(settings: DataSettings) -> set[str] | None:
    """Names that the settings list one by one, if they list both sides; None if any task counts."""
    if settings.train_tasks_file is None or settings.test_categories:
        return None
    held_out = set(settings.test_tasks)
    if settings.test_tasks_file is not None:
        held_out.update(read_names(settings.test_tasks_file))
    return held_out | set(read_names(settings.train_tasks_file))


def split_tasks(tasks: Sequence[Task], settings: DataSettings, seed: int) -> dict[str, SplitName]:
    """Assign each task to train, valid or test; a task in neither list of names is left out, and so
    is one of a category that is not trained on.

    Validation tasks are drawn from the training tasks by `seed`, in proportion over the categories.
    Raises DataError for names that match nothing, and where no training task is left.
    """
    by_name = {task.name: task for task in tasks}
    test = _held_out(by_name, settings)
    if settings.train_tasks_file is None:
        train = by_name.keys() - test
    else:
        listed = set(read_names(settings.train_tasks_file))
        _refuse_absent(listed - by_name.keys(), settings.train_tasks_file, by_name)
        both = sorted(listed & test)
        if both:
            raise DataError(
                f"{settings.train_tasks_file}: {_some(both)} held out as well;"
                " take them out of one of the two lists"
            )
        train = by_name.keys() & listed
    left_out = len(by_name) - len(train) - len(test)
    if left_out:
        logger.info("%d tasks are in neither list of tasks and are left out", left_out)
    if not train:
        raise DataError(
            f"no training task is left of {len(by_name)} tasks in {settings.path};"
            " hold out fewer tasks or name others"
        )
    train = _of_categories([by_name[name] for name in train], settings)
    valid = _carve([by_name[name] for name in train], settings.valid_fraction, seed)
    split: dict[str, SplitName] = dict.fromkeys(sorted(train - valid), "train")
    split.update(dict.fromkeys(sorted(valid), "valid"))
    split.update(dict.fromkeys(sorted(test), "test"))
    return split


def _held_out(by_name: dict[str, Task], settings: DataSettings) -> set[str]:
    if settings.test_categories:
        categories = {task.category for task in by_name.values()}
        for category in settings.test_categories:
            if category not in categories:
                raise DataError(
                    f"data.test_categories: {category!r} is no category of {settings.path}"
                    + _nearest(category, categories)
                )
        return {task.name for task in by_name.values() if task.category in settings.test_categories}
    if settings.test_tasks:
        for name in settings.test_tasks:
            if name not in by_name:
                raise DataError(
                    f"data.test_tasks: {name!r} is no task of {settings.path}"
                    + _nearest(name, by_name)
                )
        return set(settings.test_tasks)
    if settings.test_tasks_file is None:
        raise DataError("no held-out tasks are named; set data.test_tasks_file")
    names = read_names(settings.test_tasks_file)
    _refuse_absent(set(names) - by_name.keys(), settings.test_tasks_file, by_name)
    return set(names)


def _of_categories(train: list[Task], settings: DataSettings) -> set[str]:
    """Return the training tasks of the categories that `data.train_categories` asks for."""
    wanted = settings.train_categories
    if wanted == "all":
        return {task.name for task in train}
    sizes = Counter(task.category for task in train)
    if isinstance(wanted, int):
        if wanted > len(sizes):
            raise DataError(
                f"data.train_categories={wanted}, and the training tasks of {settings.path} have"
                f" {len(sizes)} categories: ask for at most {len(sizes)}, or all"
            )
        chosen = set(sorted(sizes, key=lambda category: (-sizes[category], category))[:wanted])
    else:
        for category in wanted:
            if category not in sizes:
                raise DataError(
                    f"data.train_categories: {category!r} is no category of the training tasks of"
                    f" {settings.path}" + _nearest(category, sizes)
                )
        chosen = set(wanted)
    kept = {task.name for task in train if task.category in chosen}
    logger.info(
        "%d of %d training tasks are of the %d categories of data.train_categories",
        len(kept), len(train), len(chosen),
    )  # fmt: skip
    return kept


def _carve(train: list[Task], fraction: float, seed: int) -> set[str]:
    """Draw validation tasks in proportion over the categories, never the last one of a category.

    Every 1/fraction-th task of a list that is sorted by category, and by a seeded hash within it.
    """
    count = round(fraction * len(train))
    if fraction > 0 and len(train) > 1:
        count = max(count, 1)
    if count == 0:
        return set()

    def draw(text: str) -> str:
        return hashlib.sha256(f"{seed}/{text}".encode()).hexdigest()

    ordered = sorted(train, key=lambda task: (draw(task.category), draw(task.name)))
    drawn = [ordered[(2 * i + 1) * len(ordered) // (2 * count)] for i in range(count)]
    left = Counter(task.category for task in train)
    valid: set[str] = set()
    for task in drawn:
        if left[task.category] > 1:
            left[task.category] -= 1
            valid.add(task.name)
    return valid


def _refuse_absent(absent: set[str], path: str, known: Iterable[str]) -> None:
    if absent:
        names = sorted(absent)
        raise DataError(
            f"{path}: {_some(names)} not in the data: add the task files, or take the names out"
            + _nearest(names[0], known)
        )


def _some(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:3])
    return (
        f"{shown} and {len(names) - 3} more are"
        if len(names) > 3
        else (f"{shown} {'is' if len(names) == 1 else 'are'}")
    )


def _nearest(name: str, candidates: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(candidates), n=3)
    return f". Did you mean {' or '.join(repr(one) for one in near)}?" if near else ""
