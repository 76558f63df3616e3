"""The losses of the method: pure functions of tensors, one value per task.

Sums over tokens are returned together with nothing else: what they are divided by (valid tokens
or tasks of the whole optimiser step, over ranks and accumulation) is the caller's to know.

Axes: K tasks, N instances, T target tokens, V vocabulary, C kept entries of it, P valid positions,
R rank, D features.
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
EPSILON = 1e-7
"""What keeps constant logits from a division by zero (`logit_stand` of the released code)."""


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
    standardize: bool = False,
) -> Tensor:
    """Return temperature² KL(teacher ‖ student), summed over each task's target tokens, [K] (Eq. 5).

    Of vocabularies of two sizes, the entries that both have are compared. No gradient reaches the
    teacher. Computed in chunks of tokens, whose fp32 copies are made again in the backward rather
    than kept.
    """
    shared = min(teacher_logits_KNTV.shape[-1], student_logits_KNTV.shape[-1])
    valid = target_ids_KNT != IGNORED
    teacher = teacher_logits_KNTV.detach()[..., :shared][valid]
    student = student_logits_KNTV[..., :shared][valid]
    chunks = [
        checkpoint(_kl_per_token, t, s, temperature, standardize, use_reentrant=False)
        for t, s in zip(teacher.split(CHUNK), student.split(CHUNK), strict=True)
    ]
    return _sum_by_task(torch.cat(chunks), valid)  # pyright: ignore[reportArgumentType]


def log_probabilities(logits_PV: Tensor, temperature: float, standardize: bool) -> Tensor:
    """Return the log-probabilities that distillation compares, [P, V] in fp32.

    With `standardize` the logits of each token first lose their mean over the vocabulary, and are
    divided by their deviation.
    """
    return functional.log_softmax(_prepared(logits_PV, temperature, standardize), -1)


def coarse_kl(
    teacher_ids_KNTC: Tensor,
    teacher_logp_KNTC: Tensor,
    student_logits_KNTV: Tensor,
    target_ids_KNT: Tensor,
    temperature: float,
    standardize: bool = False,
) -> Tensor:
    """Return what `distillation_kl` returns, of a teacher of whom C entries are known, [K].

    All other entries are one event, of what probability is left: a lower bound of the full KL, and
    equal to it where C is all of the student's V. The teacher's log-probabilities are those of
    `log_probabilities`, at the same temperature.
    """
    valid = target_ids_KNT != IGNORED
    parts = (teacher_ids_KNTC[valid], teacher_logp_KNTC[valid], student_logits_KNTV[valid])
    chunks = [
        checkpoint(_coarse_kl_per_token, *chunk, temperature, standardize, use_reentrant=False)
        for chunk in zip(*(part.split(CHUNK) for part in parts), strict=True)
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


def _kl_per_token(
    teacher_PV: Tensor, student_PV: Tensor, temperature: float, standardize: bool
) -> Tensor:
    teacher_log = log_probabilities(teacher_PV, temperature, standardize)
    student_log = log_probabilities(student_PV, temperature, standardize)
    divergence = functional.kl_div(student_log, teacher_log, reduction="none", log_target=True)
    return temperature**2 * divergence.sum(-1)


def _coarse_kl_per_token(
    teacher_ids_PC: Tensor,
    teacher_logp_PC: Tensor,
    student_PV: Tensor,
    temperature: float,
    standardize: bool,
) -> Tensor:
    scores_PV = _prepared(student_PV, temperature, standardize)
    total_P = scores_PV.logsumexp(-1)
    kept_PC = scores_PV.gather(1, teacher_ids_PC) - total_P[:, None]
    teacher_logp_PC = teacher_logp_PC.float()
    divergence = functional.kl_div(kept_PC, teacher_logp_PC, reduction="none", log_target=True)
    divergence = divergence.sum(-1)
    if teacher_ids_PC.shape[1] < scores_PV.shape[1]:
        rest_P = (1 - teacher_logp_PC.exp().sum(-1)).clamp_min(0)
        # Summed over the rest itself: 1 less the kept ones has no digits left where these are all.
        others_PV = scores_PV.scatter(1, teacher_ids_PC, float("-inf"))
        student_rest_P = others_PV.logsumexp(-1) - total_P
        divergence = divergence + torch.xlogy(rest_P, rest_P) - rest_P * student_rest_P
    return temperature**2 * divergence


def _prepared(logits_PV: Tensor, temperature: float, standardize: bool) -> Tensor:
    logits_PV = logits_PV.float()
    if standardize:
        deviation, mean = torch.std_mean(logits_PV, -1, keepdim=True)
        logits_PV = (logits_PV - mean) / (EPSILON + deviation)
    return logits_PV / temperature


def _sum_by_task(values_P: Tensor, valid_KNT: Tensor) -> Tensor:
    task_P = valid_KNT.nonzero()[:, 0]
    return values_P.new_zeros(valid_KNT.shape[0]).index_add(0, task_P, values_P)


def _delta_w_difference(
    a: Tensor,
    b: Tensor,
    scaling: float | Tensor,
    a_teacher: Tensor,
    b_teacher: Tensor,
    scaling_teacher: float | Tensor,
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
    scaling: float | Tensor,
    a_teacher: Tensor,
    b_teacher: Tensor,
    scaling_teacher: float | Tensor,
) -> Tensor:
    squares_a = (scaling**0.5 * a - scaling_teacher**0.5 * a_teacher).square().sum((1, 2))
    squares_b = (scaling**0.5 * b - scaling_teacher**0.5 * b_teacher).square().sum((1, 2))
    return (squares_a + squares_b) / (a[0].numel() + b[0].numel())
