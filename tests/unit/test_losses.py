"""Each loss against an independent float64 computation, gradients included."""

import math

import pytest
import torch

from tagi_ray.lora import LoraBank, Site
from tagi_ray.losses import alignment, cross_entropy, distillation_kl, valid_tokens
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


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_kl_and_its_gradient_equal_the_sum_written_out(temperature, monkeypatch):
    monkeypatch.setattr("tagi_ray.losses.CHUNK", 5)  # several chunks, the last one short
    student, targets = _logits()
    teacher, _ = _logits(seed=7)
    teacher.requires_grad_()
    student.requires_grad_()
    loss = distillation_kl(teacher, student, targets, temperature)
    loss.sum().backward()
    student64 = student.detach().double().requires_grad_()
    p = torch.softmax(teacher.detach().double() / temperature, -1)
    q = torch.softmax(student64 / temperature, -1)
    per_token = temperature**2 * (p * (p / q).log()).sum(-1)
    expected = (per_token * (targets != -100)).sum((1, 2))
    expected.sum().backward()
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(student.grad.double(), student64.grad, rtol=1e-4, atol=1e-6)
    assert teacher.grad is None
    # The released code compares the student with itself here, and gets zero.
    assert (loss > 0.1).all()
    assert student.grad.abs().max() > 1e-2


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
