"""The store of teacher adapters: PEFT directories, and an index of what they are.

A store has one role. Teachers of training tasks (`train`) are what finetuning learns from; oracle
teachers of held-out tasks (`oracle`) bound what can be scored, and nothing that trains may read
them: `read_teachers` refuses the role, the folder's name, and every held-out task.

Axes: K teachers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from tagi_ray.config import Experiment
from tagi_ray.errors import AdapterError, DataError
from tagi_ray.export import WEIGHTS_FILE, adapter_readme, file_hash, stack_adapters, write_adapter
from tagi_ray.lora import LoraBank, Site
from tagi_ray.shards import Manifest

INDEX = "index.json"
FORMAT_VERSION = 1
FOLDERS = {"train": "teachers", "oracle": "oracle_teachers"}
Role = Literal["train", "oracle"]


@dataclass(frozen=True, slots=True)
class TeacherRecord:
    """What the index says of one teacher."""

    per: Literal["task", "category"]
    steps: int
    final_loss: float
    """Cross-entropy of the last logging interval, mean over the teachers trained together."""
    sha256: str
    """Of its weights file."""


def teacher_names(
    manifest: Manifest, role: Role, per: Literal["task", "category"]
) -> tuple[str, ...]:
    """Return the tasks, or their categories, that get a teacher of this role, sorted."""
    tasks = manifest.names("oracle" if role == "oracle" else "train")
    return tuple(
        sorted({task if per == "task" else manifest.tasks[task].category for task in tasks})
    )


def teacher_slots(
    manifest: Manifest, names: Sequence[str], role: Role, per: Literal["task", "category"]
) -> dict[str, int]:
    """Return task -> slot of its teacher, for the tasks of this role that have one."""
    place = {name: slot for slot, name in enumerate(names)}
    tasks = manifest.names("oracle" if role == "oracle" else "train")
    keys = {task: task if per == "task" else manifest.tasks[task].category for task in tasks}
    return {task: place[key] for task, key in keys.items() if key in place}


def finished(folder: Path) -> dict[str, TeacherRecord]:
    """Return the teachers that a store holds, by name; none where there is no store yet."""
    if not (folder / INDEX).exists():
        return {}
    return {name: TeacherRecord(**entry) for name, entry in _read_index(folder)["teachers"].items()}


def write_teachers(
    folder: Path,
    bank: LoraBank,
    names: Sequence[str],
    experiment: Experiment,
    *,
    role: Role,
    steps: int,
    final_loss: float,
) -> None:
    """Add the K teachers of a bank to a store; the index is written last."""
    records = {name: asdict(record) for name, record in finished(folder).items()}
    settings = experiment.oracle if role == "oracle" else experiment.teachers
    base = experiment.backbone.path
    for slot, name in enumerate(names):
        readme = adapter_readme(name, base, origin="Trained on the task's instances.")
        write_adapter(
            folder / name, bank, slot, lora=experiment.lora, base_model=base, readme=readme
        )
        digest = file_hash(folder / name / WEIGHTS_FILE)
        records[name] = asdict(TeacherRecord(settings.per, steps, final_loss, digest))
    content = {
        "version": FORMAT_VERSION,
        "role": role,
        "backbone": base,
        "lora": experiment.lora.model_dump(mode="json"),
        "teachers": records,
    }
    draft = folder / f".{INDEX}.tmp"
    draft.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    draft.replace(folder / INDEX)


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
    held_out = sorted(
        n for n in records if n in manifest.tasks and manifest.tasks[n].split == "test"
    )
    if held_out:
        raise DataError(
            f"{folder} holds a teacher of the held-out task {held_out[0]!r}: remove the store and"
            " train the teachers again"
        )
    start = index["lora"]["start_seed"]
    if start != experiment.lora.start_seed:
        raise AdapterError(
            f"{folder}: these teachers start from lora.start_seed={start}, this run from"
            f" {experiment.lora.start_seed}: factors of two starts don't compare; use one seed"
        )
    names = sorted(records)
    for name in names:
        if file_hash(folder / name / WEIGHTS_FILE) != records[name].sha256:
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
    if content.get("version") != FORMAT_VERSION:
        raise AdapterError(
            f"{path}: format {content.get('version')} is not {FORMAT_VERSION}: remove {folder} and"
            " train the teachers again"
        )
    return content
