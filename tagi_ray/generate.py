"""Adapters for instructions that nobody trained on: encode, generate, write PEFT directories.

Axes: K tasks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tagi_ray import telemetry
from tagi_ray.config import Experiment
from tagi_ray.errors import DataError
from tagi_ray.evaluate import Scorer, load_weights
from tagi_ray.export import adapter_readme, module_hash, write_adapter
from tagi_ray.json_files import read_json_lines
from tagi_ray.lora import LoraBank
from tagi_ray.model import build_model
from tagi_ray.shards import ShardTask
from tagi_ray.systems import SYSTEM, plan_of
from tagi_ray.tasks import PositiveExample, Task, check_name
from tagi_ray.vocabulary import TextTokenizer

ORIGIN = "Generated from the task's instruction; the prompt of an instance has none in it."


def instructed_task(instruction: str, name: str | None = None) -> Task:
    """Return a task that has an instruction and nothing else; unnamed, it is named by its hash."""
    if not instruction.strip():
        raise DataError("the instruction is empty: describe the task in a sentence or more")
    digest = hashlib.sha256(instruction.encode()).hexdigest()[:8]
    return Task(name or f"instruction_{digest}", "", (instruction,))


def read_instructions(path: Path) -> list[Task]:
    """Read a JSONL file of {"instruction", "task"?, "positive_examples"?: [{"input", "output"}]}.

    Raises DataError with file and line for a line that is no such record, or a repeated task.
    """
    tasks: dict[str, Task] = {}
    for number, record in read_json_lines(path):
        task = _record_task(record, f"{path}:{number}")
        if task.name in tasks:
            raise DataError(f"{path}:{number}: task {task.name!r} stands there twice; rename one")
        tasks[task.name] = task
    if not tasks:
        raise DataError(f"{path}: holds no instruction; write one JSON object per line")
    return list(tasks.values())


def _record_task(record: Mapping[str, Any], where: str) -> Task:
    known = {"instruction", "task", "positive_examples"}
    if not record.keys() <= known or "instruction" not in record:
        raise DataError(f'{where}: write {{"instruction": "...", "task": "..."}} on each line')
    name, instruction = record.get("task"), record["instruction"]
    if not isinstance(instruction, str) or not isinstance(name, str | None):
        raise DataError(f"{where}: instruction and task must be strings")
    if not instruction.strip():
        raise DataError(
            f"{where}: the instruction is empty: describe the task in a sentence or more"
        )
    task = instructed_task(instruction, None if name is None else check_name(name, where))
    examples = record.get("positive_examples", [])
    if not isinstance(examples, list) or not all(_is_example(one) for one in examples):
        raise DataError(f'{where}: positive_examples must be a list of {{"input", "output"}} texts')
    pairs = tuple(PositiveExample(one["input"], one["output"]) for one in examples)
    return Task(task.name, "", task.definitions, pairs)


def _is_example(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(value.get(name), str) for name in ("input", "output")
    )


def generate_adapters(
    experiment: Experiment,
    run_folder: Path,
    weights: Path,
    tasks: Sequence[Task],
    output: Path,
    alone: Mapping[str, float] | None = None,
) -> list[Path]:
    """Write the adapter of each task's instruction to `output/<task>/`, in this process.

    weights: `state.safetensors` of the finetuned hypernetwork. alone: scores in percent of the
    adapters without fusion, for their README.
    """
    return list(_generate(experiment, run_folder, weights, tasks, output, alone))


def _generate(
    experiment: Experiment,
    run_folder: Path,
    weights: Path,
    tasks: Sequence[Task],
    output: Path,
    alone: Mapping[str, float] | None,
) -> Iterator[Path]:
    tokenizer = run_folder / "tokenizer"
    experiment = experiment.varied(SYSTEM)
    model = build_model(experiment, tokenizer, "hypernetwork", experiment.seeds[0])
    load_weights(model, weights)
    on_gpu = experiment.resources.gpus_per_worker and torch.cuda.is_available()
    model = model.to("cuda" if on_gpu else "cpu").eval()
    scorer = Scorer(model, TextTokenizer(tokenizer), experiment, run_folder)
    base, kind = model.backbone.identity, experiment.fusion.kind
    fusion: dict[str, Any] = {"fusion": kind, "fusion_weights_hash": module_hash(model.fusion)}
    size = experiment.evaluation.tasks_per_batch
    for start in range(0, len(tasks), size):
        chunk = tasks[start : start + size]
        bank, memory = scorer.condition(
            plan_of(SYSTEM, experiment),
            [ShardTask(task, ()) for task in chunk],
            {t.name: t for t in chunk},
        )
        assert isinstance(bank, LoraBank), "no other generator's adapters are written"
        for slot, task in enumerate(chunk):
            readme = adapter_readme(task.name, base, origin=ORIGIN, fusion=kind, alone=alone)
            write_adapter(
                output / task.name,
                bank,
                slot,
                lora=experiment.lora,
                base_model=base,
                task_type=model.backbone.task_type,
                transposed=model.backbone.sites[0].transposed,
                readme=readme,
                instruction=memory,
                **(fusion if memory is not None else {}),
            )
            telemetry.count("adapters_generated", run=experiment.name)
            yield output / task.name
