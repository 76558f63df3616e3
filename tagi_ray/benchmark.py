"""What the project's own ways cost beside the best straightforward alternative.

A benchmark is a function in `BENCHMARKS` that yields cases; everything else is shared. Both sides
of a case do the same work and say what came out of it: they are timed only after these agree.

Axes: K tasks, N instances, I instruction, S source and T target tokens.
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # torch would make `--help` slow
    from tagi_ray.batches import Batch
    from tagi_ray.model import TagiModel

ROUNDS = 15
WARM_UP = 2
TOLERANCE = 1e-4
"""Relative difference up to which the results of the two sides are the same."""
CLOCKS: dict[str, Callable[[], float]] = {"CPU s": time.process_time, "wall s": time.perf_counter}
"""Unit -> clock. CPU seconds are those of this process, over all its threads."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Size of a random T5."""

    d_model: int
    layers: int
    """Blocks in the encoder and again in the decoder."""
    vocabulary: int
    d_kv: int = 64


SHAPES = {"S": Shape(128, 2, 4096), "M": Shape(256, 4, 4096), "L": Shape(512, 6, 32128)}


@dataclass(frozen=True, slots=True)
class Case:
    """The same work done in our way and in another."""

    name: str
    ours: Callable[[], float]
    """Does the work once, and returns a number that tells whether it was the same work."""
    other: Callable[[], float]


@dataclass(frozen=True, slots=True)
class Row:
    """What one case cost by one clock."""

    case: str
    unit: str
    ours: float
    """Median over the rounds."""
    other: float
    ratio: float
    """Median of the rounds' other / ours: how many times faster ours is."""
    iqr: float
    """Interquartile range of the rounds' ratios."""


def run(name: str, storage: Path = Path("runs"), rounds: int = ROUNDS) -> tuple[list[Row], Path]:
    """Run a benchmark, and return its rows and the JSON file that holds them."""
    rows = [row for case in BENCHMARKS[name]() for row in measure(case, rounds)]
    path = storage / "benchmark" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {"name": name, "machine": machine(), "rows": [asdict(row) for row in rows]}
    path.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    return rows, path


def measure(case: Case, rounds: int = ROUNDS) -> list[Row]:
    """Time both sides of a case in turns, so that a slow moment of the machine meets both.

    Raises RuntimeError when the two sides do not come to the same result.
    """
    for _ in range(WARM_UP):
        ours, other = case.ours(), case.other()
        if not math.isclose(ours, other, rel_tol=TOLERANCE):
            raise RuntimeError(f"{case.name}: ours came to {ours}, the other side to {other}")
    sides = {"ours": case.ours, "other": case.other}
    spent = {(side, unit): list[float]() for side in sides for unit in CLOCKS}
    for turn in range(rounds):
        for side in sorted(sides, reverse=turn % 2 == 0):
            started = {unit: clock() for unit, clock in CLOCKS.items()}
            sides[side]()
            for unit, clock in CLOCKS.items():
                spent[side, unit].append(clock() - started[unit])
    return [_row(case.name, unit, spent["ours", unit], spent["other", unit]) for unit in CLOCKS]


def table(rows: list[Row]) -> str:
    """Return the rows as text, a line each."""
    width = max(len(row.case) for row in rows)
    lines = [f"{'case':<{width}}  unit       ours     other  other/ours    iqr"]
    lines += [
        f"{row.case:<{width}}  {row.unit:<6}  {row.ours:>7.4g}  {row.other:>8.4g}"
        f"  {row.ratio:>10.3f}  {row.iqr:>5.3f}"
        for row in rows
    ]
    return "\n".join(lines)


def summaries() -> str:
    """Return the benchmarks' names, each with what it compares, a line each."""
    width = max(map(len, BENCHMARKS))
    firsts = {name: (made.__doc__ or "").splitlines()[0] for name, made in BENCHMARKS.items()}
    return "\n".join(f"  {name:<{width}}  {first}" for name, first in firsts.items())


def machine() -> str:
    """Return the processor, the cores and threads at hand, and the versions that matter."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return (
        f"{_processor()}, {cores} cores, {torch.get_num_threads()} threads, {platform.system()},"
        f" Python {platform.python_version()}, torch {torch.__version__}"
    )


def train_step() -> Iterator[Case]:
    """A finetune step: an adapter generated for each task, or for each row."""
    yield train_step_case("M", SHAPES["M"], tasks=4, instances=4)


def train_step_case(
    size: str,
    shape: Shape,
    tasks: int,
    instances: int,
    tokens: tuple[int, int, int] = (128, 128, 16),
) -> Case:
    """Forward and backward of the cross-entropy on K tasks x N instances.

    Ours runs the hypernetwork once for each task and routes the rows to K slots. The other side
    gives every row its own copy of the instruction, as a row-wise data set has it: K*N tasks of
    one instance through the same code. tokens: I, S and T, all filled.
    """
    from tagi_ray import objectives
    from tagi_ray.sections import DistillationSettings

    model = random_model(shape)
    grouped = _random_batch(shape, tasks, instances, tokens)
    single = row_wise(grouped)
    objective = objectives.finetune(DistillationSettings(), None, "full")

    def step(batch: Batch) -> float:
        model.zero_grad(set_to_none=True)
        with ExitStack() as scope:
            result = objective.loss(model, batch, objective.denominators(batch), scope)
            result.loss.backward()
        return result.loss.item()

    name = f"{size}, {tasks} tasks x {instances} instances"
    return Case(name, lambda: step(grouped), lambda: step(single))


def random_model(shape: Shape) -> TagiModel:
    """Return a frozen random T5 with a hypernetwork of the default size whose bank is not zero."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    from tagi_ray.backbone import Backbone
    from tagi_ray.fusion import Fusion
    from tagi_ray.hypernetwork import Hypernetwork
    from tagi_ray.model import TagiModel
    from tagi_ray.sections import FusionSettings, HypernetworkSettings, LoraSettings

    lora = LoraSettings()
    config = T5Config(
        vocab_size=shape.vocabulary, d_model=shape.d_model, d_ff=4 * shape.d_model,
        d_kv=shape.d_kv, num_heads=shape.d_model // shape.d_kv, num_layers=shape.layers,
        dropout_rate=0.0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    config.decoder_start_token_id = 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = Backbone(T5ForConditionalGeneration(config), lora.targets, "random")
        hypernetwork = Hypernetwork(backbone.sites, backbone.width, HypernetworkSettings(), lora)
        for head in (*hypernetwork.heads_a, *hypernetwork.heads_b):
            # Zero at the start of training, where a wrongly routed row would change no loss.
            torch.nn.init.normal_(head.get_parameter("mix.weight"), std=0.1)
        fusion = Fusion(FusionSettings(), backbone.width)
    return TagiModel(backbone, hypernetwork, fusion)


def row_wise(batch: Batch) -> Batch:
    """Return the same rows as K*N tasks of one instance, each with a copy of its instruction."""
    instances = batch.input_ids_KNS.shape[1]
    rows = {
        field: getattr(batch, field).flatten(0, 1).unsqueeze(1)
        for field in (
            "input_ids_KNS", "input_mask_KNS", "prompt_ids_KNS", "prompt_mask_KNS", "target_ids_KNT"
        )
    }  # fmt: skip
    copies = {
        field: getattr(batch, field).repeat_interleave(instances, 0)
        for field in ("instruction_ids_KI", "instruction_mask_KI", "slots_K")
    }
    names = {
        field: tuple(name for name in getattr(batch, field) for _ in range(instances))
        for field in ("tasks", "categories")
    }
    return replace(batch, **rows, **copies, **names)


def _random_batch(shape: Shape, tasks: int, instances: int, tokens: tuple[int, int, int]) -> Batch:
    """Return K x N rows of random tokens without padding and without prompts."""
    import torch

    from tagi_ray.batches import Batch

    generator = torch.Generator().manual_seed(0)
    instruction, source, target = tokens

    def ids(*size: int) -> torch.Tensor:
        return torch.randint(3, shape.vocabulary, size, generator=generator)

    instruction_ids, input_ids = ids(tasks, instruction), ids(tasks, instances, source)
    prompt_ids = ids(tasks, instances, 0)
    return Batch(
        instruction_ids_KI=instruction_ids,
        instruction_mask_KI=torch.ones_like(instruction_ids, dtype=torch.bool),
        input_ids_KNS=input_ids,
        input_mask_KNS=torch.ones_like(input_ids, dtype=torch.bool),
        prompt_ids_KNS=prompt_ids,
        prompt_mask_KNS=prompt_ids.bool(),
        target_ids_KNT=ids(tasks, instances, target),
        slots_K=torch.full((tasks,), -1),
        tasks=tuple(f"task_{number}" for number in range(tasks)),
        categories=("random",) * tasks,
        position=0,
        cut_texts=0,
    )


def _row(case: str, unit: str, ours: list[float], other: list[float]) -> Row:
    ratios = [theirs / mine for mine, theirs in zip(ours, other, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Row(
        case=case,
        unit=unit,
        ours=statistics.median(ours),
        other=statistics.median(other),
        ratio=statistics.median(ratios),
        iqr=high - low,
    )


def _processor() -> str:
    """Return the processor's name, which Linux tells in a file alone."""
    lines = Path("/proc/cpuinfo")
    if lines.exists():
        for line in lines.read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


BENCHMARKS: dict[str, Callable[[], Iterator[Case]]] = {"train_step": train_step}
"""By the name that `jobs/benchmark.py` takes; the docstring's first line is its summary."""
