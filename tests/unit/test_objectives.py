"""The stages' losses: composed as Eq. 6 says, and independent of how a step is cut."""

from contextlib import ExitStack
from dataclasses import fields, replace

import pytest
import torch

from tagi_ray import objectives
from tagi_ray.losses import alignment, cross_entropy, distillation_kl
from tagi_ray.sections import DistillationSettings
from tests.models import fill, random_batch, random_model


def _row(batch, task):
    cut = {
        f.name: getattr(batch, f.name)[task : task + 1]
        for f in fields(batch)
        if f.name.endswith(("_K", "_KI", "_KNS", "_KNT")) or f.name in ("tasks", "categories")
    }
    return replace(batch, **cut)


def _step(objective, model, micro_batches):
    """One optimiser step's loss, parts and gradients."""
    counts = [objective.denominators(batch) for batch in micro_batches]
    totals = {name: sum(count[name] for count in counts) for name in counts[0]}
    loss, parts = 0.0, {}
    for batch in micro_batches:
        with ExitStack() as scope:
            result = objective.loss(model, batch, totals, scope)
            if result.loss.requires_grad:
                result.loss.backward()
        loss += result.loss.detach()
        for name, value in result.parts.items():
            parts[name] = parts.get(name, 0) + value
    return loss, parts


def _finetune(**settings):
    model = random_model()
    bank = fill(model.backbone.sites, 3, seed=4)
    return model, objectives.finetune(DistillationSettings(**settings), bank, "full"), bank


def test_finetune_is_the_weighted_sum_of_its_three_losses():
    model, objective, teachers = _finetune(lambda_kl=5.0, temperature=2.0)
    batch = random_batch(tasks=3)
    loss, parts = _step(objective, model, [batch])
    backbone = model.backbone
    with torch.no_grad():
        with backbone.bound(teachers):
            teacher_logits = backbone.logits(
                batch.prompt_ids_KNS, batch.prompt_mask_KNS, batch.target_ids_KNT
            )
        encoded = model.encode_instruction(batch.instruction_ids_KI, batch.instruction_mask_KI)
        bank = model.generate_bank(encoded)
        with backbone.bound(bank):
            logits = backbone.logits(
                batch.input_ids_KNS,
                batch.input_mask_KNS,
                batch.target_ids_KNT,
                model.fused(encoded),
            )
    targets = batch.target_ids_KNT
    tokens = (targets != -100).sum()
    predicted = cross_entropy(logits, targets).sum() / tokens
    kl = distillation_kl(teacher_logits, logits, targets, 2.0).sum() / tokens
    difference = alignment(bank, teachers, "delta_w")
    expected = predicted + 5.0 * kl + (torch.sigmoid(difference) * difference).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(parts["kl"], kl)
    torch.testing.assert_close(parts["alignment"], difference.mean())
    assert kl > 1e-3
    assert difference.mean() > 1e-3


def test_the_loss_and_its_gradient_do_not_depend_on_how_the_step_is_cut():
    batch = random_batch(tasks=3)
    batch = replace(batch, slots_K=torch.tensor([2, -1, 0]))
    gradients = []
    for cut in ([batch], [_row(batch, task) for task in range(3)]):
        model, objective, _ = _finetune()
        loss, parts = _step(objective, model, cut)
        gradients.append((loss, parts, [p.grad for p in model.trainable().values()]))
    (loss, parts, whole), (loss_cut, parts_cut, pieces) = gradients
    torch.testing.assert_close(loss, loss_cut)
    torch.testing.assert_close(parts, parts_cut)
    torch.testing.assert_close(whole, pieces, atol=1e-5, rtol=1e-4)


def test_a_task_without_teacher_contributes_its_prediction_loss_alone():
    model, objective, _ = _finetune()
    batch = random_batch(tasks=2, slots=False)
    loss, parts = _step(objective, model, [batch])
    torch.testing.assert_close(loss, parts["cross_entropy"])
    # Ranks add up their parts: one with a taught batch has no others than this one.
    taught = _step(objective, model, [random_batch(tasks=2)])[1]
    assert list(parts) == list(taught)
    assert parts["kl"] == 0
    assert parts["alignment"] == 0


def test_every_batch_runs_the_same_forwards(monkeypatch):
    # On sharded weights a rank that left one out would leave the others waiting.
    model, objective, _ = _finetune()
    calls = []
    original = type(model.backbone).logits
    monkeypatch.setattr(
        type(model.backbone), "logits", lambda *given: calls.append(1) or original(*given)
    )
    _step(objective, model, [random_batch(tasks=2)])
    _step(objective, model, [random_batch(tasks=2, slots=False)])
    assert len(calls) == 4


@pytest.mark.parametrize("through", [False, True])
def test_sigmoid_weight_passes_a_gradient_only_when_asked(through):
    settings = DistillationSettings(sigmoid_gradient=through)
    difference = torch.tensor([0.5], requires_grad=True)
    weight = objectives._lambda_ins(difference, settings)
    (weight * difference).sum().backward()
    sigmoid = torch.sigmoid(torch.tensor(0.5))
    slope = sigmoid + (0.5 * sigmoid * (1 - sigmoid) if through else 0)
    torch.testing.assert_close(difference.grad[0], slope)


def test_each_teacher_learns_as_if_alone():
    batch = random_batch(tasks=3)
    banks = []
    for cut in ([batch], [_row(batch, task) for task in range(3)]):
        model = random_model()
        bank = fill(model.backbone.sites, 3, seed=4).map(lambda f: f.requires_grad_())
        if len(cut) == 1:
            _step(objectives.teacher(bank, "full"), model, cut)
        else:
            for row in cut:
                _step(objectives.teacher(bank, "full"), model, [row])
        banks.append(bank)
    for name in banks[0].a:
        torch.testing.assert_close(
            banks[0].a[name].grad, banks[1].a[name].grad, atol=1e-5, rtol=1e-4
        )
        torch.testing.assert_close(
            banks[0].b[name].grad, banks[1].b[name].grad, atol=1e-5, rtol=1e-4
        )


def test_metatrain_is_the_backbones_own_loss_on_the_full_prompt():
    model, batch = random_model(), random_batch()
    model.backbone.requires_grad_(True)
    loss, _ = _step(objectives.metatrain(), model, [batch])
    expected = model.backbone.model(
        input_ids=batch.prompt_ids_KNS.flatten(0, 1),
        attention_mask=batch.prompt_mask_KNS.flatten(0, 1).long(),
        labels=batch.target_ids_KNT.flatten(0, 1),
    ).loss
    torch.testing.assert_close(loss, expected)


def test_the_hypernetwork_runs_once_for_each_task_of_a_step():
    model, objective, _ = _finetune()
    batch = random_batch(tasks=3, instances=5)
    _step(objective, model, [batch])
    assert model.generated_tasks == 3


def test_evaluating_in_between_does_not_change_the_next_step():
    """The released code keeps generating from its evaluation's features after one."""
    batch = random_batch(tasks=3)
    losses = []
    for evaluate in (False, True):
        model, objective, _ = _finetune()
        if evaluate:
            other = random_batch(tasks=2, seed=9)
            with torch.no_grad():
                _step(objective, model, [other])
        losses.append(_step(objective, model, [batch])[0])
    assert torch.equal(losses[0], losses[1])
