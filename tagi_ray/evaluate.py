"""Score systems on the held-out tasks.

Actors hold the whole backbone each, outside any training engine. For a chunk of tasks the
instructions are encoded once and one bank is made; every instance then runs without instruction.

Axes: K tasks, N instances, T target tokens.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import safe_open

from tagi_ray.batches import READ, text_batch
from tagi_ray.config import Experiment
from tagi_ray.errors import CheckpointError, DataError
from tagi_ray.export import stack_adapters
from tagi_ray.groups import TextGroup
from tagi_ray.instruction import FusedInstruction, VirtualTokens
from tagi_ray.json_files import write_whole
from tagi_ray.lora import LoraBank
from tagi_ray.metrics import METRICS, Prediction, aggregate, exact_match, rouge_l
from tagi_ray.model import ModelKind, TagiModel, build_model
from tagi_ray.shards import ShardTask, read_manifest, read_tasks_of
from tagi_ray.systems import SystemPlan, instruction_sources, plan_of
from tagi_ray.tasks import Task
from tagi_ray.teachers import teacher_name
from tagi_ray.vocabulary import TextTokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Scorer:
    """Answers and scores instances with one model, in this process."""

    model: TagiModel
    tokenizer: TextTokenizer
    experiment: Experiment
    oracle_folder: Path
    """Where the adapters trained on the held-out tasks are; read by systems that use them."""

    @torch.no_grad()
    def predict(
        self, plan: SystemPlan, tasks: Sequence[ShardTask], sources: Mapping[str, Task]
    ) -> list[Prediction]:
        """Answer and score every instance of some tasks, in their order.

        sources: task name -> the task whose instruction is given (see `instruction_sources`).
        """
        chunks = _chunks(tasks, self.experiment.evaluation.tasks_per_batch)
        return [one for chunk in chunks for one in self._predict_chunk(plan, chunk, sources)]

    def _predict_chunk(
        self, plan: SystemPlan, tasks: Sequence[ShardTask], sources: Mapping[str, Task]
    ) -> Iterator[Prediction]:
        bank, fused = self.condition(plan, tasks, sources)
        size = self.experiment.evaluation.instances_per_batch
        answers: dict[str, list[str]] = {task.task.name: [] for task in tasks}
        for start in range(0, max(len(task.instances) for task in tasks), size):
            groups = [_group(task, sources[task.task.name], start, size) for task in tasks]
            for task, rows in zip(tasks, self._decode(plan, groups, bank, fused), strict=True):
                real = max(len(task.instances) - start, 0)  # the rows after these fill the batch up
                answers[task.task.name] += self.tokenizer.decode_batch(rows[:real])
        for task in tasks:
            yield from _scored(task, answers[task.task.name])

    def condition(
        self, plan: SystemPlan, tasks: Sequence[ShardTask], sources: Mapping[str, Task]
    ) -> tuple[LoraBank | VirtualTokens | None, FusedInstruction | None]:
        """Return the bank of K tasks and what else the student gets of their instructions.

        The hypernetwork runs once, on the instructions of `sources` (see `predict`).
        """
        if plan.bank == "oracle":
            return self._oracle_bank(tasks), None
        if plan.bank == "none" and not plan.fusion:
            return None, None
        groups = [_group(task, sources[task.task.name], 0, 1) for task in tasks]
        batch = text_batch(groups, self.tokenizer, self.experiment.data, ("instruction",))
        batch = batch.to(self._device)
        encoded = self.model.encode_instruction(batch.instruction_ids_KI, batch.instruction_mask_KI)
        bank = self.model.generate_bank(encoded) if plan.bank == "generated" else None
        return bank, self.model.fused(encoded) if plan.fusion else None

    def _oracle_bank(self, tasks: Sequence[ShardTask]) -> LoraBank:
        per = self.experiment.oracle.per
        names = [teacher_name(one.task.name, one.task.category, per) for one in tasks]
        bank = stack_adapters(
            [self.oracle_folder / name for name in names],
            self.model.backbone.sites,
            rank=self.experiment.lora.rank,
            alpha=self.experiment.lora.alpha,
            base_model=self.model.backbone.identity,
        )
        return bank.to(self._device)

    def _decode(
        self,
        plan: SystemPlan,
        groups: Sequence[TextGroup],
        bank: LoraBank | VirtualTokens | None,
        fused: FusedInstruction | None,
    ) -> list[list[list[int]]]:
        """Return the ids that follow each prompt: K lists of N lists."""
        kind = self.experiment.oracle.prompt if plan.prompt == "oracle" else plan.prompt
        part = READ[kind]
        settings = self.experiment.data
        batch = text_batch(groups, self.tokenizer, settings, (part,)).to(self._device)
        ids_KNS, mask_KNS = batch.texts(part)
        backbone = self.model.backbone
        with backbone.bound(bank, fused):
            return backbone.decode_greedy(ids_KNS, mask_KNS, settings.max_target_tokens).tolist()

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device


def _chunks(items: Sequence[ShardTask], size: int) -> Iterator[Sequence[ShardTask]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _group(task: ShardTask, source: Task, start: int, size: int) -> TextGroup:
    """Return `size` instances of a task from `start` on, empty ones after its last."""
    inputs = [instance.input for instance in task.instances[start : start + size]]
    inputs += [""] * (size - len(inputs))
    return TextGroup(
        task=task.task.name,
        category=task.task.category,
        definition=source.definitions[0],
        examples=source.positive_examples,
        inputs=tuple(inputs),
        targets=("",) * size,
    )


def _scored(task: ShardTask, answers: Sequence[str]) -> Iterator[Prediction]:
    for instance, answer in zip(task.instances, answers, strict=True):
        yield Prediction(
            task=task.task.name,
            category=task.task.category,
            id=instance.id,
            input=instance.input,
            prediction=answer,
            references=instance.outputs,
            exact_match=exact_match(answer, instance.outputs),
            rouge_l=rouge_l(answer, instance.outputs),
        )


def load_weights(model: TagiModel, path: Path) -> None:
    """Load the trained weights of a stage's `state.safetensors` ("model.<name>") into a model.

    Raises CheckpointError unless they are exactly the model's trainable parameters.
    """
    trainable = model.trainable()
    with safe_open(path, framework="pt") as file:
        names = {key.removeprefix("model.") for key in file.keys() if key.startswith("model.")}  # noqa: SIM118
        if names != trainable.keys():
            odd = sorted(names ^ trainable.keys())
            raise CheckpointError(
                f"{path} and the model differ in {len(odd)} weights, {odd[0]!r} among them:"
                " score a run with the settings it was trained with"
            )
        for name, parameter in trainable.items():
            value = file.get_tensor(f"model.{name}")
            if value.shape != parameter.shape:
                raise CheckpointError(
                    f"{path}: {name} has shape {list(value.shape)}, the model's has"
                    f" {list(parameter.shape)}: score a run with the settings it was trained with"
                )
            parameter.data.copy_(value)


class Evaluator:
    """Holds one model at a time and answers chunks of tasks with it; runs as a Ray actor."""

    def __init__(self, experiment: Experiment, run_folder: Path) -> None:
        self._experiment = experiment
        self._run_folder = run_folder
        self._loaded: tuple[str | None, Path | None] | None = None
        self._scorer: Scorer
        torch.set_num_threads(experiment.resources.cpus_per_worker)

    def score(self, job: Job) -> list[Prediction]:
        """Answer and score a job's tasks."""
        plan = plan_of(job.system, self._experiment)
        self._load(plan.weights, job.weights)
        return self._scorer.predict(plan, job.tasks, job.sources)

    def _load(self, weights: str | None, path: Path | None) -> None:
        if self._loaded == (weights, path):
            return
        experiment, tokenizer = self._experiment, self._run_folder / "tokenizer"
        kind: ModelKind = "teacher"
        if weights == "metatrain":
            kind = "metatrain"
        elif weights is not None:
            experiment, kind = experiment.varied(weights), "hypernetwork"
        model = build_model(experiment, tokenizer, kind, experiment.seeds[0])
        if path is not None:
            load_weights(model, path)
        device = "cuda" if experiment.resources.gpus_per_worker else "cpu"
        self._scorer = Scorer(
            model.to(device).eval(),
            TextTokenizer(tokenizer),
            experiment,
            self._run_folder / "oracle_teachers",
        )
        self._loaded = (weights, path)


@dataclass(frozen=True, slots=True)
class Job:
    """A chunk of tasks for one system of one seed."""

    seed: int
    system: str
    weights: Path | None
    tasks: tuple[ShardTask, ...]
    sources: Mapping[str, Task]


def evaluate(
    experiment: Experiment,
    run_folder: Path,
    weights: Mapping[int, Mapping[str, Path]],
    progress: Callable[[str], None] = logger.info,
) -> dict[str, Any]:
    """Score the experiment's systems on a connected Ray cluster, and write what was found.

    weights: seed -> stage -> its `state.safetensors`. Systems without trained weights are scored
    once, under the first seed. Writes `predictions/<seed>/<system>.parquet` and `scores.json`,
    where other systems' scores on the same data stay; returns the latter's content.
    """
    # Actors start in another folder.
    run_folder = run_folder.absolute()
    weights = {
        seed: {stage: path.absolute() for stage, path in paths.items()}
        for seed, paths in weights.items()
    }
    tasks = [task for task in read_tasks_of(run_folder / "shards", "test") if task.instances]
    if not tasks:
        raise DataError(f"{run_folder / 'shards'} holds no test instances: prepare the data again")
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for (seed, system), predictions in _answers(experiment, run_folder, tasks, weights):
        path = run_folder / "predictions" / str(seed) / f"{system}.parquet"
        write_predictions(path, predictions)
        scores = aggregate(predictions)
        found.setdefault(system, {})[seed] = scores
        progress(
            f"{system}, seed {seed}: exact match {scores['exact_match']:.1f} %,"
            f" ROUGE-L {scores['rouge_l']:.1f} %"
        )
    systems = {name: over_seeds(found[name]) for name in experiment.evaluation.systems}
    return write_scores(run_folder, systems, _run_fields(experiment, run_folder))


def plan_jobs(
    experiment: Experiment,
    tasks: Sequence[ShardTask],
    weights: Mapping[int, Mapping[str, Path]],
) -> Iterator[Job]:
    """Yield the work in an order in which actors seldom change weights, and systems are complete.

    Raises CheckpointError where the weights of a system are missing.
    """
    plans = {name: plan_of(name, experiment) for name in experiment.evaluation.systems}
    ordered = sorted(plans, key=lambda system: plans[system].weights or "")
    for seed in experiment.seeds:
        for system in ordered:
            plan, path = plans[system], None
            if plan.weights is not None:
                path = weights.get(seed, {}).get(plan.weights)
                if path is None:
                    raise CheckpointError(
                        f"evaluation.systems asks for {system!r}, but {plan.weights} of seed {seed}"
                        " is not trained: run that stage first"
                    )
            elif seed != experiment.seeds[0]:
                continue
            sources = instruction_sources([task.task for task in tasks], plan.instruction)
            for chunk in _chunks(tasks, experiment.evaluation.tasks_per_batch):
                names = [task.task.name for task in chunk]
                yield Job(seed, system, path, tuple(chunk), {name: sources[name] for name in names})


def _answers(
    experiment: Experiment,
    run_folder: Path,
    tasks: Sequence[ShardTask],
    weights: Mapping[int, Mapping[str, Path]],
) -> Iterator[tuple[tuple[int, str], list[Prediction]]]:
    """Yield (seed, system) and its predictions, each as soon as its last chunk is done."""
    import ray
    from ray.util import ActorPool

    resources = experiment.resources
    jobs = list(plan_jobs(experiment, tasks, weights))
    actor = ray.remote(Evaluator).options(
        num_cpus=resources.cpus_per_worker,
        num_gpus=resources.gpus_per_worker,
        max_restarts=resources.max_failures,
        max_task_retries=resources.max_failures,
    )
    count = min(experiment.evaluation.actors, len(jobs))
    actors = [actor.remote(experiment, run_folder) for _ in range(count)]
    try:
        collected: list[Prediction] = []
        results = ActorPool(actors).map(lambda one, job: one.score.remote(job), jobs)
        for place, (job, predictions) in enumerate(zip(jobs, results, strict=True)):
            collected += predictions
            following = jobs[place + 1] if place + 1 < len(jobs) else None
            if following is None or (following.seed, following.system) != (job.seed, job.system):
                yield (job.seed, job.system), collected
                collected = []
    finally:
        for one in actors:
            ray.kill(one)  # pyright: ignore[reportArgumentType]


def write_predictions(path: Path, predictions: Sequence[Prediction]) -> None:
    """Write one row for each prediction; the file appears complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fields = Prediction.__dataclass_fields__
    table = pa.table({name: [getattr(one, name) for one in predictions] for name in fields})
    draft = path.with_name(f".{path.name}.tmp")
    pq.write_table(table, draft)
    draft.replace(path)


def write_scores(
    run_folder: Path, systems: Mapping[str, Any], run: Mapping[str, Any]
) -> dict[str, Any]:
    """Write `scores.json` and return it; other systems' scores of an equal `run` stay in it."""
    path = run_folder / "scores.json"
    before = json.loads(path.read_text("utf-8")) if path.exists() else {}
    kept = before["systems"] if before.get("run") == run else {}
    scores = {"systems": {**kept, **systems}, "run": dict(run)}
    write_whole(path, json.dumps(scores, indent=1, ensure_ascii=False) + "\n")
    return scores


def over_seeds(by_seed: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """Means over the seeds of a system's aggregates, and the scores of each seed."""
    first = next(iter(by_seed.values()))

    def merged(groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        means = {metric: mean(group[metric] for group in groups) for metric in METRICS}
        return {**groups[0], **means}

    combined = merged(list(by_seed.values()))
    for group in ("per_task", "per_category"):
        combined[group] = {
            name: merged([scores[group][name] for scores in by_seed.values()])
            for name in first[group]
        }
    combined["seeds"] = [
        {"seed": seed, **{metric: scores[metric] for metric in METRICS}}
        for seed, scores in by_seed.items()
    ]
    return combined


def _run_fields(experiment: Experiment, run_folder: Path) -> dict[str, Any]:
    return {
        "name": experiment.name,
        "seeds": list(experiment.seeds),
        "backbone": experiment.backbone.path,
        "lora": experiment.lora.model_dump(mode="json"),
        "fusion": experiment.fusion.kind,
        "prompt": experiment.data.prompt,
        "data_fingerprint": read_manifest(run_folder / "shards").fingerprint,
    }
