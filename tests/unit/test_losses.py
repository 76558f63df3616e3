"""Each loss against an independent float64 computation, gradients included."""

import math
from itertools import pairwise

import pytest
import torch

from tagi_ray.lora import LoraBank, Site
from tagi_ray.losses import (
    alignment,
    coarse_kl,
    cross_entropy,
    distillation_kl,
    log_probabilities,
    valid_tokens,
)
from tests.models import fill

SITES = (Site("q", 6, 10), Site("wide.o", 14, 6))


def _logits(seed: int = 0, tasks: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    logits = torch.randn(tasks, 3, 4, 11) * 3
    targets = torch.randint(0, 11, (tasks, 3, 4))
    targets[0, 1, 2:] = -100
    targets[1, 2, :] = -100
    return logits, targets


def test_cross_entropy_equals_the_sum_written_out():
    logits, targets = _logits()
    expected = torch.zeros(2, dtype=torch.float64)
    for task, row, place in (targets != -100).nonzero().tolist():
        scores = [float(v) for v in logits[task, row, place]]
        total = math.log(sum(math.exp(v) for v in scores))
        expected[task] += total - scores[int(targets[task, row, place])]
    torch.testing.assert_close(cross_entropy(logits, targets).double(), expected, rtol=1e-5, atol=0)
    assert valid_tokens(targets).tolist() == [10, 8]


def _scores64(logits, temperature, standardize):
    """What is compared, in float64."""
    if standardize:
        mean = logits.mean(-1, keepdim=True)
        variance = (logits - mean).square().sum(-1, keepdim=True) / (logits.shape[-1] - 1)
        logits = (logits - mean) / (1e-7 + variance.sqrt())
    return torch.softmax(logits / temperature, -1)


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_kl_and_its_gradient_equal_the_sum_written_out(temperature, standardize, monkeypatch):
    monkeypatch.setattr("tagi_ray.losses.CHUNK", 5)  # several chunks, the last one short
    student, targets = _logits()
    teacher, _ = _logits(seed=7)
    teacher.requires_grad_()
    student.requires_grad_()
    loss = distillation_kl(teacher, student, targets, temperature, standardize)
    loss.sum().backward()
    student64 = student.detach().double().requires_grad_()
    p = _scores64(teacher.detach().double(), temperature, standardize)
    q = _scores64(student64, temperature, standardize)
    per_token = temperature**2 * (p * (p / q).log()).sum(-1)
    expected = (per_token * (targets != -100)).sum((1, 2))
    expected.sum().backward()
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(student.grad.double(), student64.grad, rtol=1e-4, atol=1e-6)
    assert teacher.grad is None
    # The released code compares the student with itself here, unless it standardises.
    assert (loss > 0.1).all()
    assert student.grad.abs().max() > 1e-2


def test_standardised_logits_are_compared_whatever_their_place_and_size():
    logits, targets = _logits()
    for standardize, same in ((True, True), (False, False)):
        kl = distillation_kl(logits, 3 * logits + 2, targets, 1.0, standardize)
        assert torch.equal(kl.abs() < 1e-5, torch.tensor([same] * 2))
    constant = torch.zeros_like(logits).requires_grad_()  # has no deviation to be divided by
    loss = distillation_kl(logits, constant, targets, 1.0, True).sum()
    loss.backward()
    assert loss.isfinite()
    assert constant.grad.isfinite().all()


def test_vocabularies_of_two_sizes_are_compared_over_what_both_have():
    """T5's files embed 32128 entries, a checkpoint of the released code 32100."""
    student, targets = _logits()
    teacher, _ = _logits(seed=7)
    for wide, narrow in ((student, teacher[..., :8]), (student[..., :8], teacher)):
        kl = distillation_kl(narrow, wide, targets, 2.0, True)
        expected = distillation_kl(narrow[..., :8], wide[..., :8], targets, 2.0, True)
        assert torch.equal(kl, expected)
    assert (kl > 0.1).all()


def _kept(teacher, kept, temperature, standardize):
    top = log_probabilities(teacher, temperature, standardize).topk(kept, -1)
    return top.indices, top.values


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("kept", [1, 4, 10, 11])
def test_coarse_kl_and_its_gradient_equal_the_sum_over_merged_events(
    kept, standardize, monkeypatch
):
    monkeypatch.setattr("tagi_ray.losses.CHUNK", 5)
    student, targets = _logits()
    teacher, _ = _logits(seed=7)
    student.requires_grad_()
    loss = coarse_kl(*_kept(teacher, kept, 2.0, standardize), student, targets, 2.0, standardize)
    loss.sum().backward()
    student64 = student.detach().double().requires_grad_()
    p = _scores64(teacher.double(), 2.0, standardize)
    q = _scores64(student64, 2.0, standardize)
    ids = p.topk(kept, -1).indices
    events = []
    for chances in (p, q):
        known = chances.gather(-1, ids)
        rest = chances.scatter(-1, ids, 0.0).sum(-1, keepdim=True)
        events.append(torch.cat([known, rest], -1) if kept < 11 else known)
    per_token = 4.0 * (events[0] * (events[0] / events[1]).log()).sum(-1)
    expected = (per_token * (targets != -100)).sum((1, 2))
    expected.sum().backward()
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(student.grad.double(), student64.grad, rtol=1e-4, atol=1e-6)


def test_coarse_kl_grows_with_what_is_kept_to_the_full_kl():
    student, targets = _logits()
    teacher, _ = _logits(seed=7)
    full = distillation_kl(teacher, student, targets, 1.0)
    values = [
        coarse_kl(*_kept(teacher, kept, 1.0, False), student, targets, 1.0)
        for kept in (1, 2, 4, 8, 11)
    ]
    for less, more in pairwise(values):
        assert (less <= more + 1e-5).all()
    assert (values[0] < 0.9 * full).all()
    torch.testing.assert_close(values[-1], full)


def test_coarse_kl_of_sure_teachers_and_students_is_finite_with_its_gradient():
    """The rest of either is less than a float32 can tell from nothing."""
    _, targets = _logits()
    sure, other = torch.zeros(2, 3, 4, 11), torch.zeros(2, 3, 4, 11)
    sure[..., 0], other[..., 9] = 200.0, 200.0
    for student in (sure, other):
        student = student.clone().requires_grad_()
        loss = coarse_kl(*_kept(sure, 3, 1.0, False), student, targets, 1.0)
        loss.sum().backward()
        assert loss.isfinite().all()
        assert student.grad.isfinite().all()
    torch.testing.assert_close(loss, 200.0 * valid_tokens(targets))


def test_kl_of_equal_logits_is_zero_and_padding_counts_nothing():
    logits, targets = _logits()
    changed = logits.clone()
    changed[targets == -100] += 5
    torch.testing.assert_close(distillation_kl(logits, changed, targets, 1.0), torch.zeros(2))


def test_delta_w_alignment_and_its_gradient_equal_full_matrices():
    student, teacher = (
        fill(SITES, 2, rank=3, scaling=2.0),
        fill(SITES, 2, rank=5, scaling=0.5, seed=9),
    )
    student = student.map(lambda f: f.requires_grad_())
    loss = alignment(student, teacher, "delta_w")
    loss.sum().backward()
    student64 = student.map(lambda f: f.detach().double().requires_grad_())
    expected = torch.stack([
        (2.0 * student64.b[s.name] @ student64.a[s.name]
         - 0.5 * teacher.b[s.name].double() @ teacher.a[s.name].double()).square().mean((1, 2))
        for s in SITES
    ]).mean(0)  # fmt: skip
    expected.sum().backward()
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-5, atol=1e-7)
    for name in ("q", "wide.o"):
        for ours, theirs in ((student.a, student64.a), (student.b, student64.b)):
            torch.testing.assert_close(
                ours[name].grad.double(), theirs[name].grad, rtol=1e-4, atol=1e-6
            )


def test_delta_w_alignment_does_not_see_a_change_of_basis_and_factors_do():
    bank = fill(SITES, 2, rank=3)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0))).Q
    turned = LoraBank(
        {name: turn @ a for name, a in bank.a.items()},
        {name: b @ turn.T for name, b in bank.b.items()},
        bank.scaling,
    )
    assert alignment(bank, turned, "delta_w").max() < 1e-6
    assert alignment(bank, turned, "factors").min() > 1e-2


def test_factor_alignment_weighs_factors_by_the_root_of_the_scaling():
    student, teacher = fill(SITES, 2, scaling=2.0), fill(SITES, 2, scaling=0.5, seed=9)
    expected = torch.zeros(2, dtype=torch.float64)
    for site in SITES:
        flat = [
            torch.cat([
                math.sqrt(bank.scaling) * bank.a[site.name].double().flatten(1),
                math.sqrt(bank.scaling) * bank.b[site.name].double().flatten(1),
            ], 1)
            for bank in (student, teacher)
        ]  # fmt: skip
        expected += (flat[0] - flat[1]).square().mean(1) / len(SITES)
    torch.testing.assert_close(
        alignment(student, teacher, "factors").double(), expected, rtol=1e-5, atol=1e-7
    )


def test_alignment_compares_a_with_a_where_the_shapes_would_also_fit_crosswise():
    """The released code matches A with B; its optimum applies the transposed update."""
    site = (Site("q", 8, 8),)
    teacher = fill(site, 1, rank=2)
    transposed = LoraBank(
        {"q": teacher.b["q"].transpose(1, 2)},
        {"q": teacher.a["q"].transpose(1, 2)},
        teacher.scaling,
    )
    for kind in ("delta_w", "factors"):
        assert alignment(teacher, teacher, kind).abs().max() < 1e-6
        assert alignment(transposed, teacher, kind).min() > 1e-3
