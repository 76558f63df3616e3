"""What a training loop waits for data, and memory while a large corpus streams past.

Axes: K tasks, N instances.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tagi_ray.benchmarks.measure import Row, row
from tagi_ray.benchmarks.shapes import SHAPES, Shape, random_model

if TYPE_CHECKING:  # torch would make `--help` slow
    import pyarrow as pa

    from tagi_ray.batches import Batch
    from tagi_ray.order import OrderPlan
    from tagi_ray.tasks import Instance, Task

INSTANCES = 1_000_000
TASKS = 1_000
GROUPS, EACH = 8, 4
"""Tasks K of a batch, and instances N of each."""
STEPS = 12
"""Training steps of a round."""
PARTS = 10
"""Parts of the stream, each with a speed of its own."""
SAMPLES = 20
"""Looks at the memory in each part."""
INSTRUCTION_WORDS, INPUT_WORDS, TARGET_WORDS = 110, 16, 2
"""They come to about the token numbers of real tasks, `train_step.MEDIAN`."""


def rows(rounds: int) -> Iterator[Row]:
    """Batches from Ray Data tasks, or prepared in the training process; one million streamed."""
    with tempfile.TemporaryDirectory() as name:
        corpus = write_corpus(Path(name), TASKS, INSTANCES)
        with _ray():
            yield from waiting_rows(corpus, SHAPES["M"], rounds, STEPS)
            yield from stream_rows(corpus, PARTS)


@dataclass(frozen=True, slots=True)
class Corpus:
    """Shards and tokenizer of random words, and the order in which they are read."""

    folder: Path
    plan: OrderPlan
    instances: int

    def batches(self, source: Callable[..., Iterator[Batch]], start: int, count: int) -> Any:
        """Return an iterator over `count` batches from the given one on."""
        from tagi_ray.sections import DataSettings

        return source(
            self.folder / "shards", self.plan, self.folder / "tokenizer", DataSettings(),
            start_position=start * GROUPS, stop_position=(start + count) * GROUPS,
            micro_groups=GROUPS, parts=("instruction", "input"), rank=0, world=1,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class WordTask:
    """A task of random words."""

    task: Task
    number: int
    count: int
    words: list[str]

    def instances(self) -> Iterator[Instance]:
        """Yield `count` instances."""
        from tagi_ray.tasks import Instance

        draw = random.Random(self.number)
        for place in range(self.count):
            text = " ".join(draw.choices(self.words, k=INPUT_WORDS))
            target = " ".join(draw.choices(self.words, k=TARGET_WORDS))
            yield Instance(f"{self.task.name}-{place}", text, (target,))


def write_corpus(folder: Path, tasks: int, instances: int) -> Corpus:
    """Write shards of that many instances, and their tokenizer."""
    import pyarrow as pa

    from tagi_ray.order import OrderPlan
    from tagi_ray.sections import BackboneSettings, DataSettings
    from tagi_ray.shard_writer import BUCKETS, TaskSource, cut_buckets, write_stream
    from tagi_ray.tasks import SplitName, Task
    from tagi_ray.vocabulary import prepare_tokenizer

    each, draw, words = instances // tasks, random.Random(1), _words()
    settings = DataSettings(train_instances=each)
    sources: list[tuple[TaskSource, SplitName]] = []
    for number in range(tasks):
        instruction = " ".join(draw.choices(words, k=INSTRUCTION_WORDS))
        task = Task(f"words_{number:05d}", "words", (instruction,))
        sources.append((WordTask(task, number, each, words), "train"))

    def tables() -> Iterator[pa.Table]:
        for start in range(0, tasks, 64):  # never all of it in memory
            some = sources[start : start + 64]
            rows = [bucket for source in some for bucket in cut_buckets(*source, settings, 0)]
            yield pa.Table.from_pylist(sorted(rows, key=lambda one: one["order"]), schema=BUCKETS)

    shards = folder / "shards"
    shards.mkdir()
    index = write_stream(tables(), sources, shards).splits["train"]
    fitted = BackboneSettings(path="random", tokenizer="train", tokenizer_vocabulary=4096)
    prepare_tokenizer(fitted, shards, folder / "tokenizer")
    return Corpus(folder, OrderPlan(index, 0, EACH), each * tasks)


def _words() -> list[str]:
    draw, letters = random.Random(0), "abcdefghijklmnopqrstuvwxyz"
    return ["".join(draw.choices(letters, k=draw.randint(2, 8))) for _ in range(3000)]


def waiting_rows(corpus: Corpus, shape: Shape, rounds: int, steps: int) -> Iterator[Row]:
    """Train on both streams in turns: the share of the time that a step waits for its batch."""
    from tagi_ray.batches import iterate_batches, local_batches

    step = train_step(shape)
    count = 1 + rounds * steps
    streams = {
        "ours": corpus.batches(iterate_batches, 0, count),
        "other": corpus.batches(local_batches, 0, count),
    }
    firsts, shares, times = ({side: list[float]() for side in streams} for _ in range(3))
    for side, stream in streams.items():
        started = time.perf_counter()
        step(next(stream))
        firsts[side].append(time.perf_counter() - started)
    for turn in range(rounds):
        for side in sorted(streams, reverse=turn % 2 == 0):
            waited, started = 0.0, time.perf_counter()
            for _ in range(steps):
                asked = time.perf_counter()
                batch = next(streams[side])
                waited += time.perf_counter() - asked
                step(batch)
            times[side].append((time.perf_counter() - started) / steps)
            shares[side].append(100 * waited / steps / times[side][-1])
    for unit, taken in {"% of it waiting": shares, "wall s": times}.items():
        yield row(f"step on {GROUPS} x {EACH} instances", unit, taken["ours"], taken["other"])
    yield row("first batch and step", "wall s", firsts["ours"], firsts["other"])


def train_step(shape: Shape) -> Callable[[Batch], None]:
    """Return a finetune step: forward and backward of the cross-entropy."""
    from tagi_ray import objectives
    from tagi_ray.method_sections import DistillationSettings

    model = random_model(shape)
    objective = objectives.finetune(DistillationSettings(), None, "full")

    def step(batch: Batch) -> None:
        model.zero_grad(set_to_none=True)
        with ExitStack() as scope:
            objective.loss(model, batch, objective.denominators(batch), scope).loss.backward()

    return step


def stream_rows(corpus: Corpus, parts: int) -> Iterator[Row]:
    """Read the whole corpus without training: its speed in parts, and memory from end to end."""
    from tagi_ray.batches import iterate_batches, local_batches

    each = corpus.instances // (GROUPS * EACH) // parts
    name = f"{each * parts * GROUPS * EACH} instances streamed"
    ours, memory = _read(corpus.batches(iterate_batches, 0, each * parts), each, parts)
    # A tenth as much: the speed of one process does not change on the way.
    other, _ = _read(corpus.batches(local_batches, 0, each // 10 * parts), each // 10, parts)
    yield row(f"{name}: an instance", "wall ms", ours, other)
    quarter = len(memory) // 4
    for what in memory[0]:
        series = [sample[what] for sample in memory]
        growth, _ = statistics.linear_regression(range(len(series)), series)
        growth *= len(series) / (corpus.instances / 100_000)
        first, last = (statistics.median(some) for some in (series[:quarter], series[-quarter:]))
        label = f"{what}, last quarter beside first ({growth:+.2f} MB per 100 000 instances)"
        yield Row(f"{name}: {label}", "MB", last, first, first / last, 0.0)


def _read(
    stream: Iterator[Batch], each: int, parts: int
) -> tuple[list[float], list[dict[str, float]]]:
    """Return milliseconds per instance of each part of a stream, and samples of memory in MB."""
    taken: list[float] = []
    memory: list[dict[str, float]] = []
    for _ in range(parts):
        started = time.perf_counter()
        for place in range(each):
            next(stream)
            if place % max(1, each // SAMPLES) == 0:
                memory.append(_memory())
        taken.append(1000 * (time.perf_counter() - started) / (each * GROUPS * EACH))
    return taken, memory


def _memory() -> dict[str, float]:
    """Return the resident memory of this process and what Ray's object store holds, in MB."""
    import psutil
    import ray
    from ray._private.internal_api import node_stats  # no public name tells the store's use

    node = ray.nodes()[0]
    stats = node_stats(node["NodeManagerAddress"], node["NodeManagerPort"], False).store_stats
    return {
        "training process": psutil.Process().memory_info().rss / 2**20,
        "object store": stats.object_store_bytes_used / 2**20,
    }


@contextmanager
def _ray() -> Iterator[None]:
    """Start what a training run on this machine has, where it does not run already."""
    import ray

    from tagi_ray.cluster import connect
    from tagi_ray.config import Experiment

    was_running = ray.is_initialized()
    connect(Experiment(name="ingest"))
    try:
        yield
    finally:
        if not was_running:
            ray.shutdown()
