"""Writing shards: Ray Data reads the tasks in parallel, this process writes one ordered stream.

Workers cut tasks into buckets; a seeded hash of (task, bucket) puts the buckets of each split into
random order; the files are then written front to back. Nobody holds more than the instances that
are kept of one task, besides what Ray's object store holds, and spills, for the sort. The files
depend on the data, the settings and the seed, never on how many workers read.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tagi_ray.errors import DataError
from tagi_ray.sections import DataSettings
from tagi_ray.shards import (
    BUCKET,
    BUCKETS_PER_ROW_GROUP,
    COLUMNS,
    FORMAT_VERSION,
    SCHEMA,
    SPLITS,
    Manifest,
    Split,
    SplitIndex,
    TaskRecord,
    bucket_row,
    write_manifest,
)
from tagi_ray.synthetic import world
from tagi_ray.task_files import read_tasks
from tagi_ray.tasks import Instance, SplitName, Task, instance_hash, split_tasks

logger = logging.getLogger(__name__)

BUCKETS_PER_FILE = 4096
TASKS_PER_BLOCK = 32
# Test instances come first in the stream, so that those met again in training can be counted.
STREAM: tuple[Split, ...] = ("test", "oracle", "train", "valid")

_EXTRA = [
    ("order", pa.int64()),
    ("number", pa.int32()),
    ("digest", pa.string()),
    ("hashes", pa.list_(pa.string())),
]
BUCKETS = pa.schema([*SCHEMA, *(pa.field(*extra) for extra in _EXTRA)])
"""A shard row on its way to its file, with its place in the stream and its hashes."""


class TaskSource(Protocol):
    """A task whose instances can be read, again and again, from the first one on."""

    @property
    def task(self) -> Task:
        """Return the task."""
        ...

    def instances(self) -> Iterator[Instance]:
        """Yield its instances, always in the same order."""
        ...


@dataclass(frozen=True, slots=True)
class SyntheticTask:
    """A task of the embedded world."""

    task: Task
    count: int

    def instances(self) -> Iterator[Instance]:
        """Yield `count` instances."""
        return iter(world().instances(self.task.name, self.count))


def write_shards(
    settings: DataSettings,
    folder: Path,
    seed: int,
    parallel: bool = True,
    sources: list[tuple[TaskSource, SplitName]] | None = None,
) -> Manifest:
    """Write the shards and the manifest of a run; the folder appears when all of it is there.

    Whatever stood at `folder` is replaced. Not `parallel`, this process reads every task into its
    memory and needs no Ray: the same files, for data that is small. `sources` are those of
    `list_sources`, where they are known.
    """
    sources = sources or list_sources(settings, seed)
    stream = _sorted_by_ray if parallel else _sorted_here
    partial = folder.with_name(folder.name + ".partial")
    for leftover in (partial, folder):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    manifest = write_stream(stream(sources, settings, seed), sources, partial)
    if settings.oracle_instances:
        _refuse_tasks_without_oracle(manifest)
    partial.replace(folder)
    if manifest.leaked_instances:
        logger.warning(
            "%d scored test instances also occur in training tasks", manifest.leaked_instances
        )
    return manifest


def _refuse_tasks_without_oracle(manifest: Manifest) -> None:
    bare = [
        name
        for name, record in sorted(manifest.tasks.items())
        if record.split == "test" and not record.oracle_instances
    ]
    if bare:
        more = f" and {len(bare) - 3} more" if len(bare) > 3 else ""
        raise DataError(
            f"held-out tasks {', '.join(bare[:3])}{more}: all instances have one text, so that none"
            " is left to train an oracle teacher on; take them out, or set data.oracle_instances=0"
            " and leave teacher out of evaluation.systems"
        )


def list_sources(settings: DataSettings, seed: int) -> list[tuple[TaskSource, SplitName]]:
    """Return the tasks that take part, in the order of their names, each with its split."""
    sources: Sequence[TaskSource]
    if settings.source == "synthetic":
        embedded = world()
        count = max(settings.train_instances, settings.test_instances + settings.oracle_instances)
        sources = [SyntheticTask(task, count) for task in embedded.tasks]
        split: dict[str, SplitName] = dict(embedded.split)
    else:
        sources = list(read_tasks(settings))
        split = split_tasks([source.task for source in sources], settings, seed)
    chosen: list[tuple[TaskSource, SplitName]] = [
        (source, split[source.task.name]) for source in sources if source.task.name in split
    ]
    return sorted(chosen, key=lambda pair: pair[0].task.name)


def cut_buckets(
    source: TaskSource, split: SplitName, settings: DataSettings, seed: int
) -> Iterator[dict[str, Any]]:
    """Yield the buckets of one task, rows of `BUCKETS`.

    A held-out task gives its first instances to be scored. The oracle's are the next ones,
    without any whose text was met before. Where fewer of these are left than the oracle asks for
    and than a third of the task, fewer are scored; a task of one text alone has no oracle.
    """
    stream = source.instances()
    if split != "test":
        kept = list(islice(stream, settings.train_instances))
        yield from _bucket_rows(source.task, kept, split, seed)
        return
    scored, oracle = _held_out(stream, settings)
    yield from _bucket_rows(source.task, scored, "test", seed)
    yield from _bucket_rows(source.task, oracle, "oracle", seed)


def _held_out(
    stream: Iterator[Instance], settings: DataSettings
) -> tuple[list[Instance], list[Instance]]:
    """Return the scored and the oracle's instances of a held-out task; no text is in both."""
    scored = list(islice(stream, settings.test_instances))
    first: dict[str, int] = {}  # where in `scored` each text stands first
    for place, instance in enumerate(scored):
        first.setdefault(instance_hash(instance.input, instance.outputs), place)
    met, spare = set(first), list[Instance]()
    while len(spare) < settings.oracle_instances and (instance := next(stream, None)):
        content = instance_hash(instance.input, instance.outputs)
        if content not in met:
            met.add(content)
            spare.append(instance)
    wanted = min(settings.oracle_instances, max(1, len(met) // 3))
    taken = min(wanted - len(spare), len(first) - 1)
    if taken <= 0:
        return scored, spare
    places = list(first.values())[-taken:]
    return scored[: places[0]], [*(scored[place] for place in places), *spare]


def _bucket_rows(
    task: Task, instances: Sequence[Instance], split: Split, seed: int
) -> Iterator[dict[str, Any]]:
    for number, start in enumerate(range(0, len(instances), BUCKET)):
        members = list(instances[start : start + BUCKET])
        row = bucket_row(task, members)
        drawn = hashlib.sha256(f"{seed}/{split}/{task.name}/{number}".encode()).digest()
        yield {
            **row,
            # The split decides first, then chance: 60 bits leave room for the split in an int64.
            "order": (STREAM.index(split) << 60) | (int.from_bytes(drawn[:8]) >> 4),
            "number": number,
            "digest": hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest(),
            "hashes": [instance_hash(one.input, one.outputs) for one in members],
        }


def _sorted_here(
    sources: list[tuple[TaskSource, SplitName]], settings: DataSettings, seed: int
) -> Iterator[pa.Table]:
    rows = [row for pair in sources for row in cut_buckets(*pair, settings, seed)]
    yield pa.Table.from_pylist(sorted(rows, key=lambda row: row["order"]), schema=BUCKETS)


def _sorted_by_ray(
    sources: list[tuple[TaskSource, SplitName]], settings: DataSettings, seed: int
) -> Iterator[pa.Table]:
    import ray
    import ray.data

    listed = ray.put(sources)

    def buckets(batch: Any) -> Iterator[pa.Table]:
        known = ray.get(listed)
        for number in batch["id"].tolist():
            source, split = known[number]
            rows = list(cut_buckets(source, split, settings, seed))
            yield pa.Table.from_pylist(rows, schema=BUCKETS)

    # One sort partition per read block: few blocks for few tasks, or the sort is all overhead.
    blocks = min(64, -(-len(sources) // TASKS_PER_BLOCK))
    dataset = ray.data.range(len(sources), override_num_blocks=blocks)
    dataset = dataset.map_batches(buckets, batch_size=None).sort("order")
    dataset.context.enable_progress_bars = False
    dataset.context.execution_options.preserve_order = True
    yield from dataset.iter_batches(batch_size=BUCKETS_PER_ROW_GROUP, batch_format="pyarrow")


def write_stream(
    stream: Iterable[pa.Table], sources: list[tuple[TaskSource, SplitName]], folder: Path
) -> Manifest:
    """Write buckets that come in the order of their `order` column; return the manifest."""
    records = {
        source.task.name: TaskRecord(source.task.category, split) for source, split in sources
    }
    writers: dict[Split, _SplitWriter] = {s: _SplitWriter(folder, s) for s in SPLITS}
    scored: set[str] = set()
    leaked: set[str] = set()
    for table in stream:
        for row in range(table.num_rows):
            bucket = table.slice(row, 1)
            split = STREAM[bucket["order"][0].as_py() >> 60]
            hashes = bucket["hashes"][0].as_py()
            if split == "test":
                scored.update(hashes)
            elif split != "oracle":
                leaked.update(scored.intersection(hashes))
            writers[split].add(bucket, len(hashes))
            name = bucket["task"][0].as_py()
            counted = "oracle_instances" if split == "oracle" else "instances"
            total = getattr(records[name], counted) + len(hashes)
            records[name] = replace(records[name], **{counted: total})
    indexes: dict[Split, SplitIndex] = {split: writer.close() for split, writer in writers.items()}
    for name, record in records.items():
        if record.instances == 0:
            raise DataError(f"task {name} has no instances; take it out of the data")
    content = {"version": FORMAT_VERSION, **{s: w.digest.hexdigest() for s, w in writers.items()}}
    fingerprint = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    manifest = Manifest(fingerprint, indexes, records, leaked_instances=len(leaked))
    write_manifest(manifest, folder)
    return manifest


class _SplitWriter:
    """Files of one split, written row group by row group, and the index that grows with them."""

    def __init__(self, folder: Path, split: Split) -> None:
        self._folder, self._split = folder, split
        self.digest = hashlib.sha256()
        self._files: list[str] = []
        self._writer: pq.ParquetWriter | None = None
        self._waiting: list[pa.Table] = []
        self._tasks: list[str] = []
        self._columns: dict[str, list[int]] = {name: [] for name in COLUMNS if name != "task"}

    def add(self, bucket: pa.Table, count: int) -> None:
        place = len(self._tasks) % BUCKETS_PER_FILE
        if place == 0:
            self._next_file()
        group, row = divmod(place, BUCKETS_PER_ROW_GROUP)
        number = bucket["number"][0].as_py()
        values = {"file": len(self._files) - 1, "row_group": group, "row": row}
        for name, value in {**values, "number": number, "count": count}.items():
            self._columns[name].append(value)
        self._tasks.append(bucket["task"][0].as_py())
        self.digest.update(bucket["digest"][0].as_py().encode())
        self._waiting.append(bucket.select(SCHEMA.names))
        if row == BUCKETS_PER_ROW_GROUP - 1:
            self._flush()

    def close(self) -> SplitIndex:
        self._close_file()
        names = tuple(sorted(set(self._tasks)))
        numbers = {name: number for number, name in enumerate(names)}
        task = np.asarray([numbers[name] for name in self._tasks], np.int32)
        columns = {name: np.asarray(values, np.int32) for name, values in self._columns.items()}
        return SplitIndex(files=tuple(self._files), tasks=names, task=task, **columns)

    def _next_file(self) -> None:
        self._close_file()
        name = f"{self._split}/part-{len(self._files):05d}.parquet"
        (self._folder / self._split).mkdir(exist_ok=True)
        self._writer = pq.ParquetWriter(self._folder / name, SCHEMA, compression="zstd")
        self._files.append(name)

    def _flush(self) -> None:
        if self._writer is not None and self._waiting:
            table = pa.concat_tables(self._waiting).cast(SCHEMA)
            self._writer.write_table(table, row_group_size=BUCKETS_PER_ROW_GROUP)
            self._waiting.clear()

    def _close_file(self) -> None:
        self._flush()
        if self._writer is not None:
            self._writer.close()
            self._writer = None
