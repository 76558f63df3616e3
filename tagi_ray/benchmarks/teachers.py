"""Teachers trained in a pack, beside stock PEFT that trains one task at a time.

Axes: K teachers, N instances of each in a step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from tagi_ray.benchmarks.measure import Case, Row, measure
from tagi_ray.benchmarks.shapes import SHAPES, Shape
from tagi_ray.sections import ArchitectureSettings, LoraSettings, OptimizerSettings

if TYPE_CHECKING:  # torch would make `--help` slow
    from tagi_ray.backbone import Backbone
    from tagi_ray.teacher_rows import Row as Tokens

Kind = Literal["t5", "llama"]
TARGETS: dict[Kind, tuple[str, ...]] = {"t5": ("q", "v"), "llama": ("q_proj", "v_proj")}
RANK, ALPHA = LoraSettings().rank, LoraSettings().alpha
OPTIMIZER = OptimizerSettings(learning_rate=1e-3, schedule="constant", warmup_fraction=0.0)
TARGET = 4
"""Tokens of a target, the median of Super-NaturalInstructions."""
STEPS = 2
"""Of each teacher in a round."""
CASES = ((16, 1, 32), (16, 2, 64), (2, 16, 128))
"""Teachers K, instances N, and tokens of a row; in the last one task fills the machine."""


def rows(rounds: int) -> Iterator[Row]:
    """Training steps of several teachers: packed on one backbone, or one task at a time in PEFT."""
    for kind in TARGETS:
        for teachers, instances, tokens in CASES:
            yield from measure(teacher_case(kind, SHAPES["M"], teachers, instances, tokens), rounds)


def teacher_case(kind: Kind, shape: Shape, teachers: int, instances: int, tokens: int) -> Case:
    """Steps of K teachers on N rows each, in a call `STEPS` of every one.

    The other side has for each teacher a stock model with a PEFT adapter, all on the same weights,
    and torch's fused AdamW: what a user who trains one task after another runs, without what it
    takes to go from one to the next. Rows are all filled.
    """
    import numpy as np

    from tagi_ray.teacher_rows import Row as Tokens

    drawn = np.random.default_rng(0)
    data = [
        [
            Tokens(*(drawn.integers(3, shape.vocabulary, n) for n in (tokens - TARGET, TARGET)))
            for _ in range(instances)
        ]
        for _ in range(teachers)
    ]
    # Before the backbone is made, which puts its own layers into its model.
    other = _one_at_a_time(kind, stock_model(kind, shape), data)
    ours = _packed(wrapped_model(kind, shape), data)
    name = f"M {kind}, {teachers} teachers, {instances} x {tokens} tokens each: an instance"
    return Case(name, ours, other, pieces=STEPS * teachers * instances)


def stock_model(kind: Kind, shape: Shape) -> Any:
    """Return a random model as Transformers has it: a T5, or a Llama of as many blocks."""
    import torch

    from tagi_ray.architecture import model_config, new_model

    blocks = shape.layers if kind == "t5" else 2 * shape.layers
    settings = ArchitectureSettings(
        family=kind, d_model=shape.d_model, d_ff=4 * shape.d_model, d_kv=shape.d_kv,
        heads=shape.d_model // shape.d_kv, layers=blocks,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = model_config(settings, shape.vocabulary)
        config.pad_token_id = 0 if kind == "t5" else None
        return new_model(config, tied_embeddings=True)


def wrapped_model(kind: Kind, shape: Shape) -> Backbone:
    """Return `stock_model` with adapter sites."""
    from tagi_ray.families import wrapped

    model = stock_model(kind, shape)
    model.config.pad_token_id = 0
    return wrapped(model, TARGETS[kind], "random")


def _packed(backbone: Backbone, data: Sequence[Sequence[Tokens]]) -> Callable[[], float]:
    from tagi_ray.model import TagiModel
    from tagi_ray.pack_width import FixedRows
    from tagi_ray.teacher_pack import PackSettings, Teacher, TeacherPack

    losses: dict[str, float] = {}
    pack = TeacherPack(
        TagiModel(backbone, None, None),
        PackSettings(OPTIMIZER, log_every=1),
        len(data),
        RANK,
        report=lambda record: losses.update({record["teacher"]: record["loss"]}),
    )
    queue = [Teacher(str(k), FixedRows(rows), 10**9, RANK, ALPHA) for k, rows in enumerate(data)]
    pack.fill(lambda: queue.pop() if queue else None)

    def run() -> float:
        for _ in range(STEPS):
            pack.step()
        return sum(losses.values())

    return run


def _one_at_a_time(kind: Kind, model: Any, data: Sequence[Sequence[Tokens]]) -> Callable[[], float]:
    trained = [_Stock(kind, model, rows) for rows in data]
    return lambda: sum(one.step() for one in trained)


class _Stock:
    """A PEFT adapter on a copy of a model that has the model's own weights."""

    def __init__(self, kind: Kind, model: Any, rows: Sequence[Tokens]) -> None:
        import torch
        from peft import LoraConfig, get_peft_model

        from tagi_ray.families import class_of
        from tagi_ray.lora import common_start, inject

        shared = {id(parameter): parameter for parameter in model.parameters()}
        config = LoraConfig(
            r=RANK, lora_alpha=int(ALPHA), target_modules=list(TARGETS[kind]), lora_dropout=0.0
        )
        sites, _ = inject(copy.deepcopy(model, dict(shared)), TARGETS[kind])
        start = common_start(sites, RANK, 0)
        self._model: Any = get_peft_model(copy.deepcopy(model, dict(shared)), config)
        self._parameters = [p for p in self._model.parameters() if p.requires_grad]
        with torch.no_grad():
            for site in sites:
                layer = self._model.get_submodule(f"base_model.model.{site.name}")
                layer.lora_A["default"].weight.copy_(start[site.name])
        self._optimizer = torch.optim.AdamW(
            self._parameters, lr=OPTIMIZER.learning_rate, weight_decay=0.0, fused=True
        )
        sources = torch.tensor([row.source.tolist() for row in rows])
        targets = torch.tensor([row.target.tolist() for row in rows])
        if class_of(kind).task_type == "CAUSAL_LM":
            hidden = torch.full_like(sources, -100)
            sources, targets = torch.cat([sources, targets], 1), torch.cat([hidden, targets], 1)
        mask = torch.ones_like(sources)
        self._batch = {"input_ids": sources, "attention_mask": mask, "labels": targets}

    def step(self) -> float:
        """Train `STEPS` steps, and return the loss of the last."""
        from torch.nn.utils import clip_grad_norm_

        loss = None
        for _ in range(STEPS):
            loss = self._model(**self._batch).loss
            loss.backward()
            clip_grad_norm_(self._parameters, OPTIMIZER.clip_norm)
            self._optimizer.step()
            self._optimizer.zero_grad()
        assert loss is not None
        return loss.item()
