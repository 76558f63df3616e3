"""The losses of the method: pure functions of tensors, one value per task.

Sums over tokens are returned together with nothing else: what they are divided by (valid tokens
or tasks of the whole optimiser step, over ranks and accumulation) is the caller's to know.

Axes: K tasks, N instances, T target tokens, V vocabulary, P valid positions, R rank, D features.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from tagi_ray.batches import IGNORED
from tagi_ray.lora import LoraBank

CHUNK = 2048
"""Target tokens whose [P, V] log-probabilities exist in fp32 at a time."""


def valid_tokens(target_ids_KNT: Tensor) -> Tensor:
    """Return the number of target tokens of each task, [K]."""
    return (target_ids_KNT != IGNORED).sum((1, 2))


def cross_entropy(logits_KNTV: Tensor, target_ids_KNT: Tensor) -> Tensor:
    """Return the summed negative log-likelihood of each task's target tokens, [K] (Eq. 3)."""
    valid = target_ids_KNT != IGNORED
    losses = functional.cross_entropy(
        logits_KNTV[valid].float(), target_ids_KNT[valid], reduction="none"
    )
    return _sum_by_task(losses, valid)


def distillation_kl(
    teacher_logits_KNTV: Tensor,
    student_logits_KNTV: Tensor,
    target_ids_KNT: Tensor,
    temperature: float,
) -> Tensor:
    """Return temperature² KL(teacher ‖ student), summed over each task's target tokens, [K] (Eq. 5).

    No gradient reaches the teacher. Computed in chunks of tokens, whose fp32 copies are made
    again in the backward rather than kept.
    """
    valid = target_ids_KNT != IGNORED
    teacher, student = teacher_logits_KNTV.detach()[valid], student_logits_KNTV[valid]
    chunks = [
        checkpoint(_kl_per_token, t, s, temperature, use_reentrant=False)
        for t, s in zip(teacher.split(CHUNK), student.split(CHUNK), strict=True)
    ]
    return _sum_by_task(torch.cat(chunks), valid)  # pyright: ignore[reportArgumentType]


def alignment(student: LoraBank, teacher: LoraBank, on: Literal["delta_w", "factors"]) -> Tensor:
    """Return the mean squared difference of two banks, per task, [K] (Eq. 4).

    The mean is over the elements of a site, then over sites. `delta_w` compares the updates
    scaling * b @ a through R x R Gram matrices, so that equal updates cost nothing whatever their
    factors; `factors` compares the factors, each times the square root of its scaling, and means
    something only for banks that share a start.
    """
    compare = _delta_w_difference if on == "delta_w" else _factor_difference
    per_site = [
        compare(
            student.a[name].float(), student.b[name].float(), student.scaling,
            teacher.a[name].float(), teacher.b[name].float(), teacher.scaling,
        )
        for name in student.a
    ]  # fmt: skip
    return torch.stack(per_site).mean(0)


def _kl_per_token(teacher_PV: Tensor, student_PV: Tensor, temperature: float) -> Tensor:
    teacher_log = functional.log_softmax(teacher_PV.float() / temperature, -1)
    student_log = functional.log_softmax(student_PV.float() / temperature, -1)
    divergence = functional.kl_div(student_log, teacher_log, reduction="none", log_target=True)
    return temperature**2 * divergence.sum(-1)


def _sum_by_task(values_P: Tensor, valid_KNT: Tensor) -> Tensor:
    task_P = valid_KNT.nonzero()[:, 0]
    return values_P.new_zeros(valid_KNT.shape[0]).index_add(0, task_P, values_P)


def _delta_w_difference(
    a: Tensor,
    b: Tensor,
    scaling: float,
    a_teacher: Tensor,
    b_teacher: Tensor,
    scaling_teacher: float,
) -> Tensor:
    """‖s b a - s' b' a'‖² / (D_out D_in): rank 2R factors [b, b'] and [s a; -s' a'] once each."""
    rows = torch.cat([scaling * a, -scaling_teacher * a_teacher], 1)
    columns = torch.cat([b, b_teacher], 2)
    gram_rows = torch.bmm(rows, rows.transpose(1, 2))
    gram_columns = torch.bmm(columns.transpose(1, 2), columns)
    squares = (gram_rows * gram_columns).sum((1, 2))
    return squares.clamp_min(0.0) / (a.shape[2] * b.shape[1])


def _factor_difference(
    a: Tensor,
    b: Tensor,
    scaling: float,
    a_teacher: Tensor,
    b_teacher: Tensor,
    scaling_teacher: float,
) -> Tensor:
    squares_a = (scaling**0.5 * a - scaling_teacher**0.5 * a_teacher).square().sum((1, 2))
    squares_b = (scaling**0.5 * b - scaling_teacher**0.5 * b_teacher).square().sum((1, 2))
    return (squares_a + squares_b) / (a[0].numel() + b[0].numel())
