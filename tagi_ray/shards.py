"""Shards: Parquet files of task buckets, and the manifest that says where each bucket lies.

A row is one bucket: at most 64 instances of one task as text, with the task's definitions and
demonstrations beside them, so that every prompt can be rendered from one row without a join.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tagi_ray.errors import DataError
from tagi_ray.json_files import write_whole
from tagi_ray.tasks import Instance, PositiveExample, SplitName, Task

FORMAT_VERSION = 1
BUCKET = 64
"""Instances in a bucket, at most."""
BUCKETS_PER_ROW_GROUP = 16
MANIFEST = "manifest.json"

Split = Literal["train", "valid", "test", "oracle"]
SPLITS: tuple[Split, ...] = ("train", "valid", "test", "oracle")

_texts = pa.list_(pa.string())
SCHEMA = pa.schema(
    [
        ("task", pa.string()),
        ("category", pa.string()),
        ("definitions", _texts),
        ("positive_inputs", _texts),
        ("positive_outputs", _texts),
        ("ids", _texts),
        ("inputs", _texts),
        ("outputs", pa.list_(_texts)),
    ]
)


@dataclass(frozen=True, slots=True, eq=False)
class SplitIndex:
    """Buckets of one split, column by column; position b of every array is bucket b."""

    files: tuple[str, ...]
    """Parquet files, relative to the shards folder."""
    tasks: tuple[str, ...]
    """Names of the tasks, sorted."""
    file: np.ndarray
    """Index into `files`."""
    row_group: np.ndarray
    row: np.ndarray
    """Row inside the row group."""
    task: np.ndarray
    """Index into `tasks`."""
    number: np.ndarray
    """Place of the bucket among those of its task."""
    count: np.ndarray
    """Instances in the bucket."""

    def of_task(self, name: str) -> np.ndarray:
        """Return the buckets of one task, in the order of its instances."""
        if name not in self.tasks:
            return np.empty(0, np.int64)
        buckets = np.flatnonzero(self.task == self.tasks.index(name))
        return buckets[np.argsort(self.number[buckets])]


@dataclass(frozen=True, slots=True)
class TaskRecord:
    """What the manifest says of a task."""

    category: str
    split: SplitName
    instances: int = 0
    oracle_instances: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Manifest:
    """Contents of a shards folder."""

    fingerprint: str
    """Sha256 over the contents and the order of every bucket."""
    splits: Mapping[Split, SplitIndex]
    tasks: Mapping[str, TaskRecord]
    leaked_instances: int = 0
    """Scored test instances that also occur among the training or validation instances."""

    def names(self, split: Split) -> tuple[str, ...]:
        """Return the names of a split's tasks, sorted."""
        return self.splits[split].tasks


@dataclass(frozen=True, slots=True)
class ShardTask:
    """A task of a split with all its instances there."""

    task: Task
    instances: tuple[Instance, ...]


COLUMNS = ("file", "row_group", "row", "task", "number", "count")


def read_manifest(folder: Path) -> Manifest:
    """Read `manifest.json` of a shards folder."""
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file; prepare the data first") from error
    if content.get("version") != FORMAT_VERSION:
        raise DataError(
            f"{path}: format {content.get('version')} is not {FORMAT_VERSION};"
            " remove the folder and prepare the data again"
        )
    splits: dict[Split, SplitIndex] = {}
    for name in SPLITS:
        part = content["splits"][name]
        columns = {key: np.asarray(part["buckets"][key], np.int32) for key in COLUMNS}
        splits[name] = SplitIndex(tuple(part["files"]), tuple(part["tasks"]), **columns)
    return Manifest(
        fingerprint=content["fingerprint"],
        splits=splits,
        tasks={name: TaskRecord(**record) for name, record in content["tasks"].items()},
        leaked_instances=content["leaked_instances"],
    )


def write_manifest(manifest: Manifest, folder: Path) -> None:
    """Write `manifest.json`, the last file of a shards folder."""
    content = {
        "version": FORMAT_VERSION,
        "fingerprint": manifest.fingerprint,
        "splits": {
            name: {
                "files": list(index.files),
                "tasks": list(index.tasks),
                "buckets": {key: getattr(index, key).tolist() for key in COLUMNS},
            }
            for name, index in manifest.splits.items()
        },
        "tasks": {
            name: {
                "category": record.category,
                "split": record.split,
                "instances": record.instances,
                "oracle_instances": record.oracle_instances,
            }
            for name, record in sorted(manifest.tasks.items())
        },
        "leaked_instances": manifest.leaked_instances,
    }
    write_whole(folder / MANIFEST, json.dumps(content))


def bucket_row(task: Task, instances: list[Instance]) -> dict[str, Any]:
    """Return the shard row of one bucket, see `SCHEMA`."""
    return {
        "task": task.name,
        "category": task.category,
        "definitions": list(task.definitions),
        "positive_inputs": [example.input for example in task.positive_examples],
        "positive_outputs": [example.output for example in task.positive_examples],
        "ids": [instance.id for instance in instances],
        "inputs": [instance.input for instance in instances],
        "outputs": [list(instance.outputs) for instance in instances],
    }


def row_bucket(row: Mapping[str, Any]) -> ShardTask:
    """Return the task and the instances of one shard row; the inverse of `bucket_row`."""
    examples = zip(row["positive_inputs"], row["positive_outputs"], strict=True)
    task = Task(
        name=row["task"],
        category=row["category"],
        definitions=tuple(row["definitions"]),
        positive_examples=tuple(PositiveExample(*example) for example in examples),
    )
    instances = zip(row["ids"], row["inputs"], row["outputs"], strict=True)
    return ShardTask(task, tuple(Instance(i, text, tuple(outs)) for i, text, outs in instances))


def read_tasks_of(folder: Path, split: Split) -> Iterator[ShardTask]:
    """Yield each task of a split with its instances, in the order of the names."""
    index = read_manifest(folder).splits[split]
    for name in index.tasks:
        yield read_task(folder, index, name)


def read_task(folder: Path, index: SplitIndex, name: str) -> ShardTask:
    """Return a task of a split with all its instances there, in their order."""
    buckets: list[ShardTask] = []
    for bucket in index.of_task(name):
        file = pq.ParquetFile(folder / index.files[index.file[bucket]])
        group = file.read_row_group(int(index.row_group[bucket]))
        buckets.append(row_bucket(group.slice(int(index.row[bucket]), 1).to_pylist()[0]))
    return ShardTask(buckets[0].task, tuple(i for b in buckets for i in b.instances))
