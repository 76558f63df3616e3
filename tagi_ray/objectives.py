"""What each training stage minimises: functions of a model and a batch.

An objective reports the denominators it needs (target tokens, aligned tasks) before it is asked
for its loss, so that the loop can sum them over the micro-batches and ranks of an optimiser step:
the loss is then the same however the step is cut.

Axes: K tasks, N instances, T target tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from tagi_ray.batches import READ, Batch
from tagi_ray.groups import Part
from tagi_ray.lora import LoraBank
from tagi_ray.losses import (
    alignment,
    coarse_kl,
    cross_entropy,
    distillation_kl,
    valid_tokens,
)
from tagi_ray.method_sections import DistillationSettings
from tagi_ray.model import TagiModel

Totals = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class LossParts:
    """A micro-batch's share of the optimiser step's loss: shares add up to it."""

    loss: Tensor
    """Scalar, with gradient."""
    parts: dict[str, Tensor] = field(default_factory=dict)
    """Named scalars without gradient."""


@dataclass(frozen=True, slots=True)
class Objective:
    """A stage's loss, the batch parts that it reads, and what it is divided by."""

    reads: tuple[Part, ...]
    denominators: Callable[[Batch], Totals]
    """This micro-batch's counts."""
    loss: Callable[[TagiModel, Batch, Totals, ExitStack], LossParts]
    """Loss under the counts of the whole step. Banks are bound on the ExitStack, which the
    caller closes after backward."""
    validated: tuple[Part, ...] = ()
    """The batch parts that it reads under no_grad, for the loss in validation."""


def metatrain() -> Objective:
    """Instruction tuning: cross-entropy of the backbone on instruction and input together."""

    def loss(model: TagiModel, batch: Batch, totals: Totals, scope: ExitStack) -> LossParts:
        logits = model.backbone.logits(
            batch.prompt_ids_KNS, batch.prompt_mask_KNS, batch.target_ids_KNT
        )
        value = cross_entropy(logits, batch.target_ids_KNT).sum() / totals["target_tokens"]
        return LossParts(value, {"cross_entropy": value.detach()})

    return Objective(("prompt",), _target_tokens, loss, ("prompt",))


def teacher(bank: LoraBank, prompt: Literal["full", "input"]) -> Objective:
    """Several teachers at once: each slot of the bank is trained on its own task's rows.

    A slot's loss is the mean over its own target tokens, so that it learns as if alone.
    """

    def denominators(batch: Batch) -> Totals:
        tokens = valid_tokens(batch.target_ids_KNT)
        counts = tokens.new_zeros(bank.slots).index_add(0, batch.slots_K, tokens)
        return {"target_tokens": counts.float()}

    def loss(model: TagiModel, batch: Batch, totals: Totals, scope: ExitStack) -> LossParts:
        scope.enter_context(model.backbone.bound(bank.take(batch.slots_K)))
        ids, mask = batch.texts(READ[prompt])
        logits = model.backbone.logits(ids, mask, batch.target_ids_KNT)
        sums = cross_entropy(logits, batch.target_ids_KNT)
        means = sums / totals["target_tokens"][batch.slots_K]
        trained = (totals["target_tokens"] > 0).sum()
        value = means.sum()
        return LossParts(value, {"cross_entropy": value.detach() / trained})

    return Objective((READ[prompt],), denominators, loss)


def finetune(
    settings: DistillationSettings,
    teachers: LoraBank | None,
    teacher_prompt: Literal["full", "input"],
    cached_entries: int | None = None,
) -> Objective:
    """Train the hypernetwork: lambda_pred L_pred + lambda_kl L_kl + lambda_ins L_ins (Eq. 6).

    The student has the adapter generated from the instruction, and as a rule reads the input
    alone. Its teacher is the same backbone with the task's teacher adapter (Eq. 5), or the model's
    `teacher`, which knows all tasks. Tasks without a teacher contribute L_pred alone, and so does
    validation, whose tasks have none. cached_entries: those of the vocabulary that the cached
    teacher's distributions are over (None: all).
    """
    tuned, student = settings.checkpoint is not None, READ[settings.student_prompt]
    use_kl = settings.lambda_kl > 0 and (tuned or teachers is not None)
    reads: list[Part] = ["instruction", student]
    if use_kl:
        live = READ["full" if tuned else teacher_prompt]
        reads.append("teacher" if settings.logits == "cached" else live)

    def denominators(batch: Batch) -> Totals:
        tokens, taught = valid_tokens(batch.target_ids_KNT), batch.slots_K >= 0
        return {
            "target_tokens": tokens.sum().float(),
            "taught_tokens": (tokens if tuned else tokens * taught).sum().float(),
            "taught_tasks": taught.sum().float(),
        }

    def loss(model: TagiModel, batch: Batch, totals: Totals, scope: ExitStack) -> LossParts:
        training, taught = torch.is_grad_enabled(), batch.slots_K >= 0
        # Also where no task of the batch has a teacher: on sharded weights all ranks must run the
        # same forwards. Such tasks are masked below.
        taught_bank = None
        if training and teachers is not None:
            taught_bank = teachers.take(batch.slots_K.clamp_min(0))
        encoded = model.encode_instruction(batch.instruction_ids_KI, batch.instruction_mask_KI)
        kl_from = None
        if training and use_kl:
            kl_from = _teacher(settings, model, batch, taught_bank, teacher_prompt, cached_entries)
        bank = model.generate_bank(encoded)
        scope.enter_context(model.backbone.bound(bank, model.fused(encoded)))
        ids, mask = batch.texts(student)
        logits = model.backbone.logits(ids, mask, batch.target_ids_KNT)
        predicted = cross_entropy(logits, batch.target_ids_KNT).sum() / totals["target_tokens"]
        value, parts = predicted, {"cross_entropy": predicted}
        if training:
            value = settings.lambda_pred * predicted
        if kl_from is not None:
            kl = kl_from(logits) if tuned else kl_from(logits) * taught
            parts["kl"] = kl.sum() / totals["taught_tokens"].clamp_min(1)
            value = value + settings.lambda_kl * parts["kl"]
        if taught_bank is not None and isinstance(bank, LoraBank):
            difference = alignment(bank, taught_bank, settings.alignment) * taught
            tasks = totals["taught_tasks"].clamp_min(1)
            parts["alignment"] = difference.sum() / tasks
            value = value + (_lambda_ins(difference, settings) * difference).sum() / tasks
        return LossParts(value, {name: part.detach() for name, part in parts.items()})

    return Objective(tuple(dict.fromkeys(reads)), denominators, loss, ("instruction", student))


def pretrain() -> Objective:
    """Pretrain the hypernetwork on raw text: cross-entropy of the target (Eq. 3)."""
    finetuned = finetune(DistillationSettings(), None, "input")
    return replace(finetuned, reads=("text",), validated=("text",))


def _teacher(
    settings: DistillationSettings,
    model: TagiModel,
    batch: Batch,
    bank: LoraBank | None,
    prompt: Literal["full", "input"],
    cached_entries: int | None,
) -> Callable[[Tensor], Tensor]:
    """Let the teacher read a batch, unless it is cached; return what gives [K] KL of logits."""
    targets_KNT = batch.target_ids_KNT
    scale = settings.temperature, settings.standardize
    if settings.logits == "cached":
        known = batch.teacher_ids_KNTC, batch.teacher_logp_KNTC
        return lambda logits: coarse_kl(*known, logits[..., :cached_entries], targets_KNT, *scale)
    with torch.no_grad(), ExitStack() as bound:
        reader = model.teacher if settings.checkpoint else model.backbone
        assert reader is not None
        if reader is model.backbone:
            bound.enter_context(reader.bound(bank))
        ids, mask = batch.texts(READ["full" if settings.checkpoint else prompt])
        teacher_logits = reader.logits(ids, mask, targets_KNT)
    return lambda logits: distillation_kl(teacher_logits, logits, targets_KNT, *scale)


def _target_tokens(batch: Batch) -> Totals:
    return {"target_tokens": valid_tokens(batch.target_ids_KNT).sum().float()}


def _lambda_ins(difference_K: Tensor, settings: DistillationSettings) -> Tensor:
    """Weight of each task's L_ins: the paper's sigmoid(L_ins), or a fixed value."""
    if settings.lambda_ins != "sigmoid":
        return torch.full_like(difference_K, settings.lambda_ins)
    weight = torch.sigmoid(difference_K)
    return weight if settings.sigmoid_gradient else weight.detach()
