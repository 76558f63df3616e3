"""The stages' losses: composed as Eq. 6 says, and independent of how a step is cut."""

from contextlib import ExitStack
from dataclasses import fields, replace

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from tagi_ray import objectives
from tagi_ray.encoder_decoder import EncoderDecoder
from tagi_ray.losses import alignment, cross_entropy, distillation_kl, log_probabilities
from tagi_ray.method_sections import DistillationSettings
from tests.models import VOCABULARY, fill, random_batch, random_model


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


def _tuned() -> EncoderDecoder:
    """A teacher with more rows in its vocabulary than the student has, and other weights."""
    torch.manual_seed(5)
    config = T5Config(
        vocab_size=VOCABULARY + 8, d_model=16, d_ff=16, d_kv=8, num_heads=2, num_layers=1,
        dropout_rate=0.0, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config)
    torch.nn.init.normal_(model.lm_head.weight)  # logits far from even
    return EncoderDecoder(model, (), "tuned")


def _read(backbone, ids_KNS, mask_KNS, batch, bank=None, fused=None):
    with torch.no_grad(), backbone.bound(bank, fused):
        return backbone.logits(ids_KNS, mask_KNS, batch.target_ids_KNT)


def _student(model, batch):
    """The student's logits, written out, and its bank."""
    with torch.no_grad():
        encoded = model.encode_instruction(batch.instruction_ids_KI, batch.instruction_mask_KI)
        bank, fused = model.generate_bank(encoded), model.fused(encoded)
        return _read(
            model.backbone, batch.input_ids_KNS, batch.input_mask_KNS, batch, bank, fused
        ), bank


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("lambda_pred", [1.0, 0.0])
def test_finetune_is_the_weighted_sum_of_its_three_losses(lambda_pred, standardize):
    model, objective, teachers = _finetune(
        lambda_pred=lambda_pred, lambda_kl=5.0, temperature=2.0, standardize=standardize
    )
    batch = random_batch(tasks=3)
    loss, parts = _step(objective, model, [batch])
    teacher_logits = _read(
        model.backbone, batch.prompt_ids_KNS, batch.prompt_mask_KNS, batch, teachers
    )
    logits, bank = _student(model, batch)
    targets = batch.target_ids_KNT
    tokens = (targets != -100).sum()
    predicted = cross_entropy(logits, targets).sum() / tokens
    kl = distillation_kl(teacher_logits, logits, targets, 2.0, standardize).sum() / tokens
    difference = alignment(bank, teachers, "delta_w")
    expected = lambda_pred * predicted + 5.0 * kl + (torch.sigmoid(difference) * difference).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(parts["cross_entropy"], predicted)
    torch.testing.assert_close(parts["kl"], kl)
    torch.testing.assert_close(parts["alignment"], difference.mean())
    assert kl > 1e-3
    assert difference.mean() > 1e-3
    assert any(p.grad.any() for p in model.trainable().values())


@pytest.mark.parametrize("adapters", [True, False])
def test_a_tuned_teacher_reads_the_full_prompt_without_a_bank_for_every_task(adapters):
    """Its vocabulary has more rows than the student's, and one task has no adapter to align to."""
    model = random_model()
    model.teacher = _tuned()
    bank = fill(model.backbone.sites, 3, seed=4) if adapters else None
    settings = DistillationSettings(checkpoint="somewhere", temperature=2.0)
    # What an adapter's teacher reads is not what a tuned one does.
    objective = objectives.finetune(settings, bank, "input")
    assert set(objective.reads) == {"instruction", "input", "prompt"}
    batch = replace(random_batch(tasks=3), slots_K=torch.tensor([2, -1, 0]))
    loss, parts = _step(objective, model, [batch])
    teacher_logits = _read(model.teacher, batch.prompt_ids_KNS, batch.prompt_mask_KNS, batch)
    logits, _ = _student(model, batch)
    targets = batch.target_ids_KNT
    kl = distillation_kl(teacher_logits[..., :VOCABULARY], logits, targets, 2.0)
    kl = kl.sum() / (targets != -100).sum()
    torch.testing.assert_close(parts["kl"], kl)
    assert kl > 1e-3
    assert ("alignment" in parts) == adapters
    if not adapters:
        torch.testing.assert_close(loss, parts["cross_entropy"] + 5.0 * kl)


def test_a_tuned_teacher_is_neither_trained_nor_changed():
    model = random_model()
    names = set(model.trainable())
    model.teacher = _tuned()
    before = {name: value.clone() for name, value in model.teacher.state_dict().items()}
    assert set(model.trainable()) == names
    model.train()
    assert not model.teacher.model.training
    objective = objectives.finetune(DistillationSettings(checkpoint="somewhere"), None, "full")
    _step(objective, model, [random_batch(tasks=2, slots=False)])
    assert all(p.grad is None for p in model.teacher.parameters())
    assert all(torch.equal(v, before[name]) for name, v in model.teacher.state_dict().items())


def _cached(model, bank, batch, kept, settings):
    """The batch with what its teachers would have been cached to say."""
    teacher_logits = _read(
        model.backbone, batch.prompt_ids_KNS, batch.prompt_mask_KNS, batch,
        bank.take(batch.slots_K.clamp_min(0)),
    )  # fmt: skip
    top = log_probabilities(teacher_logits, settings.temperature, settings.standardize).topk(kept)
    taught = ((batch.slots_K >= 0)[:, None, None] & (batch.target_ids_KNT != -100))[..., None]
    return replace(
        batch, teacher_ids_KNTC=top.indices * taught, teacher_logp_KNTC=top.values * taught
    )


def test_cached_teachers_are_not_run_and_teach_what_live_ones_do(monkeypatch):
    shared = {"temperature": 2.0, "standardize": True}
    batch = replace(random_batch(tasks=3), slots_K=torch.tensor([2, -1, 0]))
    results = []
    for kind in ("live", "cached"):
        settings = DistillationSettings(logits=kind, **shared)
        model = random_model()
        bank = fill(model.backbone.sites, 3, seed=4)
        objective = objectives.finetune(settings, bank, "full", VOCABULARY)
        read, calls = batch, []
        if kind == "cached":
            read = _cached(model, bank, batch, VOCABULARY, settings)  # all entries: no rest
            assert objective.reads == ("instruction", "input", "teacher")
        original = type(model.backbone).logits
        with monkeypatch.context() as patch:
            patch.setattr(
                type(model.backbone),
                "logits",
                lambda *given, calls=calls, run=original: calls.append(1) or run(*given),
            )
            loss, parts = _step(objective, model, [read])
        assert len(calls) == (1 if kind == "cached" else 2)
        results.append((loss, parts, [p.grad for p in model.trainable().values()]))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
    assert results[0][1]["kl"] > 1e-4


def test_a_cached_batch_without_any_teacher_has_no_kl():
    settings = DistillationSettings(logits="cached")
    model = random_model()
    objective = objectives.finetune(settings, fill(model.backbone.sites, 3), "full", VOCABULARY)
    batch = random_batch(tasks=2, slots=False)
    tasks, instances, length = batch.target_ids_KNT.shape
    empty = torch.zeros(tasks, instances, length, 0)
    batch = replace(batch, teacher_ids_KNTC=empty.long(), teacher_logp_KNTC=empty)
    loss, parts = _step(objective, model, [batch])
    assert parts["kl"] == 0
    torch.testing.assert_close(loss, parts["cross_entropy"])


def test_rows_with_and_without_teachers_share_a_batch():
    """The released collator has fewer factors than rows then, and its loss fails to broadcast."""
    batch = replace(random_batch(tasks=3), slots_K=torch.tensor([-1, 1, -1]))
    model, objective, _ = _finetune()
    _, parts = _step(objective, model, [batch])
    _, alone = _step(objective, random_model(), [_row(batch, 1)])
    torch.testing.assert_close(parts["kl"], alone["kl"])
    torch.testing.assert_close(parts["alignment"], alone["alignment"])


def test_in_validation_the_loss_is_the_prediction_loss_whatever_its_weight():
    """Its tasks have no teachers, and checkpoints must be compared by something."""
    batch = random_batch(tasks=2)
    losses = []
    for settings in ({}, {"lambda_pred": 0.0}, {"checkpoint": "somewhere", "logits": "cached"}):
        model = random_model()
        bank = fill(model.backbone.sites, 3, seed=4)
        objective = objectives.finetune(DistillationSettings(**settings), bank, "full")
        assert objective.validated == ("instruction", "input")
        with torch.no_grad():
            loss, parts = _step(objective, model, [batch])
        assert set(parts) == {"cross_entropy"}
        assert loss == parts["cross_entropy"]
        losses.append(loss)
    assert losses[0] == losses[1] == losses[2] > 0


def test_a_student_that_reads_its_instruction_reads_the_prompt_alone():
    settings = DistillationSettings(student_prompt="full", lambda_kl=0.0)
    objective = objectives.finetune(settings, None, "full")
    assert objective.reads == objective.validated == ("instruction", "prompt")
    model, batch = random_model(), random_batch()
    loss, _ = _step(objective, model, [batch])
    full = replace(batch, input_ids_KNS=batch.prompt_ids_KNS, input_mask_KNS=batch.prompt_mask_KNS)
    logits, _ = _student(model, full)
    tokens = (batch.target_ids_KNT != -100).sum()
    torch.testing.assert_close(loss, cross_entropy(logits, batch.target_ids_KNT).sum() / tokens)


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
