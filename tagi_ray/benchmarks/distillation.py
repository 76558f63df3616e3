"""A finetune step with a teacher that reads each batch, with a cached one, and without any.

The cached teacher is measured beside the live one in what it costs and in what it says.

Axes: K tasks, N instances, T target tokens, V vocabulary, C kept entries of it.
"""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tagi_ray.benchmarks.measure import CLOCKS, WARM_UP, Row, row
from tagi_ray.benchmarks.shapes import SHAPES, Shape, random_batch, random_model
from tagi_ray.benchmarks.train_step import PADDED

if TYPE_CHECKING:  # torch would make `--help` slow
    from torch import Tensor

    from tagi_ray.batches import Batch
    from tagi_ray.config import Experiment
    from tagi_ray.lora import LoraBank
    from tagi_ray.model import TagiModel
    from tagi_ray.objectives import Objective
    from tagi_ray.stages import StageSpec

Kind = Literal["live", "cached", "none"]
KINDS: tuple[Kind, ...] = ("live", "cached", "none")
TASKS = INSTANCES = 4
KEPT = (8, 64, 256)
TOP_K = 64
"""Entries that a cache keeps by default."""
SMALL = Shape(64, 1, 2 * TOP_K)
MIB = 2**20

_STAGE: dict[str, Any] = {"log_every": 1, "save_every": 0}
DEMO: dict[str, Any] = {
    "name": "distillation",
    "data": {
        "train_instances": 16, "max_instruction_tokens": 64, "max_input_tokens": 48,
        "max_prompt_tokens": 96, "max_target_tokens": 16,
    },
    "lora": {"rank": 16, "alpha": 32, "targets": ["q", "k", "v", "o"]},
    "hypernetwork": {"width": 128},
    "distillation": {"logits": "cached", "top_k": TOP_K, "temperature": 3.0},
    "teachers": {
        **_STAGE, "steps": 4, "groups": 92, "micro_groups": 46, "instances": 2,
        "optimizer": {"learning_rate": 5e-4, "warmup_fraction": 0.1},
    },
    "finetune": {
        **_STAGE, "steps": 40, "groups": TASKS, "micro_groups": TASKS, "instances": INSTANCES,
        "valid_groups": 1, "optimizer": {"learning_rate": 1e-3, "warmup_fraction": 0.1},
    },
}  # fmt: skip
"""The demo's settings, a fraction of its steps, and the temperature of the released scripts."""


def rows(rounds: int) -> Iterator[Row]:
    """A finetune step with the teacher cached or left out, and what a cached one loses."""
    name = f"lengths {PADDED}, {TASKS} tasks x {INSTANCES} instances"
    yield from time_rows(f"M, {name}", SHAPES["M"], PADDED, rounds)
    yield from memory_rows(f"L, {name}", SHAPES["L"], PADDED, min(rounds, 3))
    with tempfile.TemporaryDirectory() as folder:
        yield from error_rows(Taught.of_demo(Path(folder)), rounds)


def step_of(kind: Kind, shape: Shape, tokens: tuple[int, int, int]) -> Callable[[], float]:
    """Return what runs a step, forward and backward, and returns the loss.

    tokens: of instruction, input and target, all filled; a prompt has the first two.
    """
    import torch

    from tagi_ray import objectives
    from tagi_ray.lora import LoraBank
    from tagi_ray.method_sections import DistillationSettings

    model, batch = random_model(shape), random_batch(shape, TASKS, INSTANCES, tokens)
    bank = model.generate_bank(
        model.encode_instruction(batch.instruction_ids_KI, batch.instruction_mask_KI)
    )
    assert isinstance(bank, LoraBank)
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randn(*batch.target_ids_KNT.shape, shape.vocabulary, generator=generator)
    top = torch.log_softmax(drawn, -1).topk(TOP_K)
    prompt = random_batch(shape, TASKS, INSTANCES, (1, tokens[0] + tokens[1], 1))
    batch = replace(
        batch,
        slots_K=torch.arange(TASKS),
        prompt_ids_KNS=prompt.input_ids_KNS,
        prompt_mask_KNS=prompt.input_mask_KNS,
        teacher_ids_KNTC=top.indices,
        teacher_logp_KNTC=top.values,
    )
    del drawn
    settings = DistillationSettings(
        lambda_kl=0.0 if kind == "none" else 5.0, logits="cached" if kind == "cached" else "live"
    )
    objective = objectives.finetune(settings, bank.detach(), "full")

    def step() -> float:
        model.zero_grad(set_to_none=True)
        return _run(objective, model, batch).item()

    return step


def _run(objective: Objective, model: TagiModel, batch: Batch) -> Tensor:
    with ExitStack() as scope:
        result = objective.loss(model, batch, objective.denominators(batch), scope)
        result.loss.backward()
    return result.loss.detach()


def time_rows(name: str, shape: Shape, tokens: tuple[int, int, int], rounds: int) -> Iterator[Row]:
    """Time the three steps in turns, so that a slow moment of the machine meets all of them."""
    steps = {kind: step_of(kind, shape, tokens) for kind in KINDS}
    spent = {(kind, unit): list[float]() for kind in KINDS for unit in CLOCKS}
    for turn in range(WARM_UP + rounds):
        for kind in sorted(KINDS, reverse=turn % 2 == 0):
            started = {unit: clock() for unit, clock in CLOCKS.items()}
            steps[kind]()
            for unit, clock in CLOCKS.items():
                if turn >= WARM_UP:
                    spent[kind, unit].append(clock() - started[unit])
    for unit in CLOCKS:
        live, cached, none = (spent[kind, unit] for kind in KINDS)
        yield row(f"{name}: step, cached; live as other", unit, cached, live)
        yield row(f"{name}: step, no KL; cached as other", unit, none, cached)


def memory_rows(
    name: str, shape: Shape, tokens: tuple[int, int, int], rounds: int
) -> Iterator[Row]:
    """Peak memory of each step in a fresh process, above what the process held before it."""
    spent: dict[Kind, list[float]] = {kind: [] for kind in KINDS}
    context = multiprocessing.get_context("spawn")
    for _ in range(rounds):
        for kind in KINDS:
            with ProcessPoolExecutor(1, mp_context=context) as fresh:
                spent[kind].append(fresh.submit(peak, kind, shape, tokens).result() / MIB)
    live, cached, none = (spent[kind] for kind in KINDS)
    yield row(f"{name}: peak of a step, cached; live as other", "MiB", cached, live)
    yield row(f"{name}: peak of a step, no KL; cached as other", "MiB", none, cached)


def peak(kind: Kind, shape: Shape, tokens: tuple[int, int, int]) -> int:
    """Return the bytes by which this process's memory grows in a step, at most. Linux tells it."""
    step_of(kind, SMALL, (2, 2, 2))()  # what libraries hold comes with the first step
    step = step_of(kind, shape, tokens)
    Path("/proc/self/clear_refs").write_text("5", "ascii")  # the peak starts from here
    before = _status("VmRSS")
    step()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    (line,) = (line for line in lines if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


@dataclass(frozen=True, slots=True, eq=False)
class Taught:
    """A student and its teachers, all of them trained a little, and the cache of what these say."""

    experiment: Experiment
    run_folder: Path
    model: TagiModel
    teachers: LoraBank
    slots: dict[str, int]

    @classmethod
    def of_demo(cls, storage: Path, **changes: Any) -> Taught:
        """Train teachers and a hypernetwork on the demo's backbone, in this process.

        changes: of sections of the settings.
        """
        from tagi_ray.checkpoint import latest
        from tagi_ray.config import Experiment
        from tagi_ray.evaluate import load_weights
        from tagi_ray.model import build_model
        from tagi_ray.shard_writer import write_shards
        from tagi_ray.stages import StageSpec, trained_state
        from tagi_ray.teacher_logits import write_teacher_logits
        from tagi_ray.teachers import FOLDERS, read_teachers, teacher_names
        from tagi_ray.train_loop import Worker, run_stage
        from tagi_ray.vocabulary import prepare_tokenizer

        experiment = Experiment.model_validate({**DEMO, "storage": str(storage), **changes})
        run = storage.absolute() / experiment.name
        run.mkdir(parents=True)
        manifest = write_shards(experiment.data, run / "shards", seed=0, parallel=False)
        prepare_tokenizer(experiment.backbone, run / "shards", run / "tokenizer")
        names = teacher_names(manifest, "train", experiment.teachers.per)
        teaching = StageSpec(experiment, "teachers", run, 0, slots=names)
        run_stage(teaching, Worker())
        _store(teaching)
        write_teacher_logits([experiment], run, parallel=False)
        live = experiment.distillation.model_copy(update={"logits": "live"})
        learning = StageSpec(
            experiment.model_copy(update={"distillation": live}), "finetune", run, 0
        )
        run_stage(learning, Worker())
        model = build_model(experiment, run / "tokenizer", "hypernetwork", 0)
        newest = latest(learning.checkpoints)
        assert newest is not None
        load_weights(model, trained_state(newest))
        bank, slots = read_teachers(
            run / FOLDERS["train"], manifest, model.backbone.sites, experiment
        )
        return cls(experiment, run, model, bank, slots)

    def batches(self, count: int) -> Iterator[Batch]:
        """Yield batches with what the teacher reads, and what the cache has of it."""
        from tagi_ray.batches import local_batches
        from tagi_ray.order import OrderPlan
        from tagi_ray.shards import read_manifest
        from tagi_ray.teacher_logits import folder_of

        settings = self.experiment.finetune
        splits = read_manifest(self.run_folder / "shards").splits
        plan = OrderPlan(splits["train"], 1, settings.instances, self.slots)
        yield from islice(
            local_batches(
                self.run_folder / "shards",
                plan,
                self.run_folder / "tokenizer",
                self.experiment.data,
                start_position=0,
                stop_position=count * settings.micro_groups,
                micro_groups=settings.micro_groups,
                parts=("instruction", "input", "prompt", "teacher"),
                teacher_folder=folder_of(self.experiment, self.run_folder),
            ),
            count,
        )

    def gradient(self, batch: Batch, kind: Literal["live", "cached"]) -> tuple[float, Tensor]:
        """Return the KL of each token, and the gradient that it alone gives the hypernetwork."""
        import torch

        from tagi_ray import objectives

        settings = self.experiment.distillation.model_copy(
            update={"logits": kind, "lambda_pred": 0.0, "lambda_ins": 0.0, "lambda_kl": 1.0}
        )
        self.model.zero_grad(set_to_none=True)
        objective = objectives.finetune(settings, self.teachers, self.experiment.teachers.prompt)
        kl = _run(objective, self.model, batch).item()
        parameters = self.model.trainable().values()
        return kl, torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])

    def keeping(self, batch: Batch, kept: int) -> Batch:
        """Return a batch as a cache of C entries has it whose teacher read the same prompts."""
        import torch

        from tagi_ray.batches import IGNORED
        from tagi_ray.losses import log_probabilities

        settings, backbone = self.experiment.distillation, self.model.backbone
        with torch.no_grad(), backbone.bound(self.teachers.take(batch.slots_K)):
            logits_KNTV = backbone.logits(
                batch.prompt_ids_KNS, batch.prompt_mask_KNS, batch.target_ids_KNT
            )
        logp_KNTV = log_probabilities(logits_KNTV, settings.temperature, settings.standardize)
        top = logp_KNTV.topk(min(kept, logp_KNTV.shape[-1]))
        valid_KNT1 = (batch.target_ids_KNT != IGNORED)[..., None]
        return replace(
            batch,
            teacher_ids_KNTC=top.indices * valid_KNT1,
            teacher_logp_KNTC=top.values * valid_KNT1,
        )


def _store(spec: StageSpec) -> None:
    """Put the teachers of a finished stage into the store of their run."""
    from tagi_ray import checkpoint
    from tagi_ray.shards import read_manifest
    from tagi_ray.stages import trained_bank
    from tagi_ray.teachers import FOLDERS, write_teachers

    newest = checkpoint.latest(spec.checkpoints)
    assert newest is not None
    write_teachers(
        spec.run_folder / FOLDERS["train"],
        trained_bank(checkpoint.load(newest)[0], spec.experiment),
        spec.slots,
        spec.experiment,
        role="train",
        steps=spec.settings.steps,
        final_loss=0.0,
        manifest=read_manifest(spec.run_folder / "shards"),
    )


def error_rows(taught: Taught, rounds: int) -> Iterator[Row]:
    """What a cached teacher says beside the live one: the KL, and the gradient's direction.

    A round is a batch. The last rows are of the cache as it is written, whose teacher reads another
    paraphrase of each instruction than the live one.
    """
    import torch

    entries = taught.model.backbone.model.config.vocab_size
    name = f"demo, trained, {entries} entries"
    cases: dict[str, Callable[[Batch], Batch]] = {
        f"{name}: {kept} kept": lambda batch, kept=kept: taught.keeping(batch, kept)
        for kept in KEPT
    }
    cases[f"{name}: {taught.experiment.distillation.top_k} kept, as cached"] = lambda batch: batch
    batches = list(taught.batches(rounds))
    live = [taught.gradient(batch, "live") for batch in batches]
    for case, read in cases.items():
        cached = [taught.gradient(read(batch), "cached") for batch in batches]
        cosines = [
            torch.cosine_similarity(ours[1].double(), other[1].double(), 0).item()
            for ours, other in zip(cached, live, strict=True)
        ]
        kls = [[kl for kl, _ in side] for side in (cached, live)]
        yield row(f"{case}: L_kl; live as other", "nats", *kls)
        yield row(f"{case}: cosine of the gradients", "1", cosines, [1.0] * len(cosines))
