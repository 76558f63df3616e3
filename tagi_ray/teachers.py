"""The store of teacher adapters: PEFT directories, and an index of what they are.

A store has one role. Teachers of training tasks (`train`) are what finetuning learns from; oracle
teachers of held-out tasks (`oracle`) bound what can be scored, and nothing that trains may read
them: `read_teachers` refuses the role, the folder's name, and every teacher that was trained on a
held-out task.

Axes: K teachers.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from tagi_ray.adapter_files import file_hash
from tagi_ray.architecture import family_of
from tagi_ray.config import Experiment
from tagi_ray.errors import AdapterError, DataError
from tagi_ray.export import WEIGHTS_FILE, adapter_readme, stack_adapters, write_adapter
from tagi_ray.families import class_of
from tagi_ray.json_files import write_whole
from tagi_ray.lora import LoraBank, Site
from tagi_ray.shards import Manifest

INDEX = "index.json"
FORMAT_VERSION = 2
FOLDERS = {"train": "teachers", "oracle": "oracle_teachers"}
Role = Literal["train", "oracle"]
Per = Literal["task", "category"]


@dataclass(frozen=True, slots=True)
class TeacherRecord:
    """What the index says of one teacher."""

    per: Per
    steps: int
    final_loss: float
    """Cross-entropy of the last logging interval, mean over the teachers trained together."""
    sha256: str
    """Of its weights file."""
    tasks: tuple[str, ...]
    """Tasks whose instances it was trained on."""


def folder_name(category: str) -> str:
    """Return the name of a category's teacher, which is also its folder: `Question_Answering`.

    Characters that a folder name can't hold become '_'. Raises DataError if nothing is left.
    """
    name = re.sub(r"[^A-Za-z0-9.+-]+|\.{2,}", "_", category).lstrip("._+-").rstrip("_")[:200]
    if not name:
        raise DataError(
            f"category {category!r} can't be a folder name: rename it, with a letter or digit from"
            " a-z, A-Z, 0-9, or use teachers.per=task"
        )
    return name


def teacher_name(task: str, category: str, per: Per) -> str:
    """Return the teacher of a task, its own or its category's; also the name of its folder."""
    return task if per == "task" else folder_name(category)


def teacher_names(manifest: Manifest, role: Role, per: Per) -> tuple[str, ...]:
    """Return the teachers of this role, one for each task or category, sorted.

    Raises DataError for two categories whose teachers would share a folder.
    """
    return tuple(sorted(set(_teacher_of(manifest, role, per).values())))


def teacher_slots(manifest: Manifest, names: Sequence[str], role: Role, per: Per) -> dict[str, int]:
    """Return task -> slot of its teacher, for the tasks of this role that have one."""
    place = {name: slot for slot, name in enumerate(names)}
    teachers = _teacher_of(manifest, role, per)
    return {task: place[name] for task, name in teachers.items() if name in place}


def _teacher_of(manifest: Manifest, role: Role, per: Per) -> dict[str, str]:
    """Return task -> name of its teacher, for all tasks of a role."""
    tasks = manifest.names("oracle" if role == "oracle" else "train")
    if per == "task":
        return {task: task for task in tasks}
    categories: dict[str, str] = {}
    for category in sorted({manifest.tasks[task].category for task in tasks}):
        name = folder_name(category)
        if name in categories:
            raise DataError(
                f"teachers of the categories {categories[name]!r} and {category!r} would both be"
                f" in the folder {name}: rename one category, or use teachers.per=task"
            )
        categories[name] = category
    return {task: teacher_name(task, manifest.tasks[task].category, per) for task in tasks}


def finished(folder: Path) -> dict[str, TeacherRecord]:
    """Return the teachers that a store holds, by name; none where there is no store yet.

    Raises AdapterError for a damaged index.
    """
    if not (folder / INDEX).exists():
        return {}
    try:
        return {
            name: TeacherRecord(**{**entry, "tasks": tuple(entry["tasks"])})
            for name, entry in _read_index(folder)["teachers"].items()
        }
    except (AttributeError, KeyError, TypeError) as error:
        raise AdapterError(_damaged(folder, f"{type(error).__name__}: {error}")) from error


def store_hash(folder: Path) -> str:
    """Return a hash of all that a store holds; raises AdapterError where there is no store."""
    path = folder / INDEX
    if not path.exists():
        raise AdapterError(f"{path}: no such file; train the teachers first")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_teachers(
    folder: Path,
    bank: LoraBank,
    names: Sequence[str],
    experiment: Experiment,
    *,
    role: Role,
    steps: int,
    final_loss: float,
    manifest: Manifest,
) -> None:
    """Add the K teachers of a bank to a store; the index is written last.

    manifest: of the shards that they were trained on.
    """
    records = {name: asdict(record) for name, record in finished(folder).items()}
    settings = experiment.oracle if role == "oracle" else experiment.teachers
    base, family = experiment.backbone.path, family_of(experiment.backbone)
    slots = teacher_slots(manifest, names, role, settings.per)
    for slot, name in enumerate(names):
        readme = adapter_readme(name, base, origin="Trained on the task's instances.")
        write_adapter(
            folder / name,
            bank,
            slot,
            lora=experiment.lora,
            base_model=base,
            task_type=class_of(family).task_type,
            transposed=family == "gpt2",
            readme=readme,
        )
        digest = file_hash(folder / name / WEIGHTS_FILE)
        tasks = tuple(task for task, own in slots.items() if own == slot)
        records[name] = asdict(TeacherRecord(settings.per, steps, final_loss, digest, tasks))
    content = {
        "version": FORMAT_VERSION,
        "role": role,
        "backbone": base,
        "lora": experiment.lora.model_dump(mode="json"),
        "teachers": records,
    }
    write_whole(folder / INDEX, json.dumps(content, indent=1) + "\n")


def read_teachers(
    folder: Path, manifest: Manifest, sites: Sequence[Site], experiment: Experiment
) -> tuple[LoraBank, dict[str, int]]:
    """Return the bank of a training store and task -> slot, for use by a training stage.

    Raises DataError for a store of oracle teachers or one that holds a held-out task's teacher,
    AdapterError for one with another common start, or with files changed since they were written.
    """
    index = _read_index(folder)
    if index["role"] != "train" or folder.resolve().name == FOLDERS["oracle"]:
        raise DataError(
            f"{folder} holds oracle teachers, trained on held-out tasks: training may read"
            f" {FOLDERS['train']}/ alone"
        )
    records = finished(folder)
    for name, record in records.items():
        for task in record.tasks:
            if task in manifest.tasks and manifest.tasks[task].split == "test":
                raise DataError(
                    f"{folder}: the teacher {name!r} was trained on the held-out task {task!r}:"
                    " remove the store and train the teachers again"
                )
    start = index["lora"]["start_seed"]
    if start != experiment.lora.start_seed:
        raise AdapterError(
            f"{folder}: these teachers start from lora.start_seed={start}, this run from"
            f" {experiment.lora.start_seed}: factors of two starts don't compare; use one seed"
        )
    names = sorted(records)
    for name in names:
        weights = folder / name / WEIGHTS_FILE
        if not weights.is_file() or file_hash(weights) != records[name].sha256:
            raise AdapterError(
                f"{folder / name / WEIGHTS_FILE} is not what was trained: remove {folder} and"
                " train the teachers again"
            )
    bank = stack_adapters(
        [folder / name for name in names],
        sites,
        rank=experiment.lora.rank,
        alpha=experiment.lora.alpha,
        base_model=experiment.backbone.path,
    )
    return bank, teacher_slots(manifest, names, "train", experiment.teachers.per)


def _read_index(folder: Path) -> Mapping[str, Any]:
    path = folder / INDEX
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise AdapterError(f"{path}: no such file; train the teachers first") from error
    except ValueError as error:
        raise AdapterError(_damaged(folder, str(error))) from error
    if not isinstance(content, dict):
        raise AdapterError(_damaged(folder, "no JSON object"))
    if content.get("version") != FORMAT_VERSION:
        raise AdapterError(
            f"{path}: format {content.get('version')} is not {FORMAT_VERSION}: remove {folder} and"
            " train the teachers again"
        )
    return content


def _damaged(folder: Path, reason: str) -> str:
    return f"{folder / INDEX} is damaged ({reason}): remove {folder} and train the teachers again"
