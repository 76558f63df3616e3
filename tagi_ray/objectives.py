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

from tagi_ray.batches import Batch
from tagi_ray.groups import Part
from tagi_ray.lora import LoraBank
from tagi_ray.losses import alignment, cross_entropy, distillation_kl, valid_tokens
from tagi_ray.model import TagiModel
from tagi_ray.sections import DistillationSettings

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


def metatrain() -> Objective:
    """Instruction tuning: cross-entropy of the backbone on instruction and input together."""

    def loss(model: TagiModel, batch: Batch, totals: Totals, scope: ExitStack) -> LossParts:
        logits = model.backbone.logits(
            batch.prompt_ids_KNS, batch.prompt_mask_KNS, batch.target_ids_KNT
        )
        value = cross_entropy(logits, batch.target_ids_KNT).sum() / totals["target_tokens"]
        return LossParts(value, {"cross_entropy": value.detach()})

    return Objective(("prompt",), _target_tokens, loss)


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
        ids, mask = _prompt(batch, prompt)
        logits = model.backbone.logits(ids, mask, batch.target_ids_KNT)
        sums = cross_entropy(logits, batch.target_ids_KNT)
        means = sums / totals["target_tokens"][batch.slots_K]
        trained = (totals["target_tokens"] > 0).sum()
        value = means.sum()
        return LossParts(value, {"cross_entropy": value.detach() / trained})

    return Objective(("prompt" if prompt == "full" else "input",), denominators, loss)


def finetune(
    settings: DistillationSettings,
    teachers: LoraBank | None,
    teacher_prompt: Literal["full", "input"],
) -> Objective:
    """Train the hypernetwork: L_pred + lambda_kl L_kl + lambda_ins L_ins (Eq. 6).

    The student reads the input alone, with the adapter generated from the instruction. Its
    teacher is the same backbone with the task's teacher adapter (Eq. 5). Tasks without a teacher
    contribute L_pred alone.
    """
    use_kl = teachers is not None and settings.lambda_kl > 0
    reads: tuple[Part, ...] = ("instruction", "input")
    if use_kl and teacher_prompt == "full":
        reads = (*reads, "prompt")

    def loss(model: TagiModel, batch: Batch, totals: Totals, scope: ExitStack) -> LossParts:
        taught = batch.slots_K >= 0
        # In training also where no task of the batch has one: on sharded weights all ranks must run
        # the same forwards. Such tasks are masked below. Validation tasks never have teachers.
        taught_bank = None
        if teachers is not None and (torch.is_grad_enabled() or taught.any()):
            taught_bank = teachers.take(batch.slots_K.clamp_min(0))
        encoded = model.encode_instruction(batch.instruction_ids_KI, batch.instruction_mask_KI)
        teacher_logits = None
        if use_kl and taught_bank is not None:
            with torch.no_grad(), model.backbone.bound(taught_bank):
                ids, mask = _prompt(batch, teacher_prompt)
                teacher_logits = model.backbone.logits(ids, mask, batch.target_ids_KNT)
        bank = model.generate_bank(encoded)
        scope.enter_context(model.backbone.bound(bank))
        logits = model.backbone.logits(
            batch.input_ids_KNS, batch.input_mask_KNS, batch.target_ids_KNT, model.fused(encoded)
        )
        predicted = cross_entropy(logits, batch.target_ids_KNT).sum() / totals["target_tokens"]
        value, parts = predicted, {"cross_entropy": predicted}
        if teacher_logits is not None:
            kl = distillation_kl(teacher_logits, logits, batch.target_ids_KNT, settings.temperature)
            parts["kl"] = (kl * taught).sum() / totals["taught_tokens"].clamp_min(1)
            value = value + settings.lambda_kl * parts["kl"]
        if taught_bank is not None and bank is not None:
            difference = alignment(bank, taught_bank, settings.alignment) * taught
            tasks = totals["taught_tasks"].clamp_min(1)
            parts["alignment"] = difference.sum() / tasks
            value = value + (_lambda_ins(difference, settings) * difference).sum() / tasks
        return LossParts(value, {name: part.detach() for name, part in parts.items()})

    return Objective(reads, _finetune_denominators, loss)


def pretrain() -> Objective:
    """Pretrain the hypernetwork on raw text: cross-entropy of the target (Eq. 3)."""
    return replace(finetune(DistillationSettings(), None, "input"), reads=("text",))


def _finetune_denominators(batch: Batch) -> Totals:
    tokens, taught = valid_tokens(batch.target_ids_KNT), batch.slots_K >= 0
    return {
        "target_tokens": tokens.sum().float(),
        "taught_tokens": (tokens * taught).sum().float(),
        "taught_tasks": taught.sum().float(),
    }


def _target_tokens(batch: Batch) -> Totals:
    return {"target_tokens": valid_tokens(batch.target_ids_KNT).sum().float()}


def _lambda_ins(difference_K: Tensor, settings: DistillationSettings) -> Tensor:
    """Weight of each task's L_ins: the paper's sigmoid(L_ins), or a fixed value."""
    if settings.lambda_ins != "sigmoid":
        return torch.full_like(difference_K, settings.lambda_ins)
    weight = torch.sigmoid(difference_K)
    return weight if settings.sigmoid_gradient else weight.detach()


def _prompt(batch: Batch, kind: Literal["full", "input"]) -> tuple[Tensor, Tensor]:
    if kind == "full":
        return batch.prompt_ids_KNS, batch.prompt_mask_KNS
    return batch.input_ids_KNS, batch.input_mask_KNS
