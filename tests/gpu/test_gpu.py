"""What a GPU computes beside what the CPU does: precision, attention kernels, the bank, ZeRO."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch

from tagi_ray import objectives
from tagi_ray.batches import Batch
from tagi_ray.instruction import FusedInstruction
from tagi_ray.losses import cross_entropy
from tagi_ray.method_sections import DistillationSettings
from tagi_ray.model import TagiModel
from tagi_ray.sections import Family, ResourceSettings, StageSettings
from tagi_ray.zero import ZeroEngine
from tests.decoders import FAMILIES, random_decoder
from tests.models import fill, random_batch, random_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]

DEVICE = torch.device("cuda")
BFLOAT16_LOSS = 5e-3
"""Relative: a bfloat16 keeps 8 bits (0.4%), and the errors of many operations partly cancel."""
FLOAT32_LOGITS = 1e-4
"""Absolute and relative, between two orders of the same sums in float32."""
FLOAT32_LOSS = 1e-4
"""Relative, after updates by AdamW, which amplifies the smallest gradients' differences."""

FINETUNE = objectives.finetune(DistillationSettings(), None, "full")


def finetune_loss(model: TagiModel, batch: Batch) -> float:
    """Run one forward and backward."""
    with ExitStack() as scope:
        result = FINETUNE.loss(model, batch, FINETUNE.denominators(batch), scope)
        result.loss.backward()
    return result.loss.item()


def logits(model: TagiModel, batch: Batch) -> torch.Tensor:
    return model.backbone.logits(batch.input_ids_KNS, batch.input_mask_KNS, batch.target_ids_KNT)


def test_finetune_step_with_bfloat16_backbone_and_float32_hypernetwork():
    batch = random_batch(tasks=3, slots=False)
    expected = finetune_loss(random_model(), batch)
    model = random_model().to(DEVICE)
    model.backbone.to(torch.bfloat16)
    assert finetune_loss(model, batch.to(DEVICE)) == pytest.approx(expected, rel=BFLOAT16_LOSS)
    gradients = {name: p.grad for name, p in model.trainable().items()}
    assert {p.dtype for p in model.trainable().values()} == {torch.float32}
    for name, gradient in gradients.items():
        assert gradient is not None, name
        assert gradient.isfinite().all(), name
    for side in ("heads_a", "heads_b"):
        assert any(side in name and g is not None and g.any() for name, g in gradients.items())


@torch.no_grad()
def test_fused_attention_gives_the_logits_of_plain_attention():
    batch = random_batch(tasks=3).to(DEVICE)
    model = random_model().to(DEVICE)
    found = {}
    for attention in ("sdpa", "eager"):
        model.backbone.model.set_attn_implementation(attention)
        assert model.backbone.model.encoder.config._attn_implementation == attention
        with model.backbone.bound(fill(model.backbone.sites, 3).to(DEVICE)):
            found[attention] = logits(model, batch)
    torch.testing.assert_close(
        found["sdpa"], found["eager"], rtol=FLOAT32_LOGITS, atol=FLOAT32_LOGITS
    )


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bank_with_zero_b_is_the_backbone_bit_for_bit(dtype: torch.dtype):
    batch = random_batch(tasks=3).to(DEVICE)
    model = random_model().to(DEVICE)
    model.backbone.to(dtype)
    bank = fill(model.backbone.sites, 3).to(DEVICE)
    bare = logits(model, batch)
    with model.backbone.bound(bank.zeroed()):
        assert torch.equal(logits(model, batch), bare)
    with model.backbone.bound(bank):
        assert not torch.equal(logits(model, batch), bare)


def zero_losses(resources: ResourceSettings, dtype: torch.dtype = torch.float32) -> list[float]:
    """Return the losses of three steps on one batch, above a frozen backbone of a dtype."""
    settings = StageSettings.model_validate(
        {
            "steps": 3, "groups": 3, "micro_groups": 3, "instances": 3,
            "optimizer": {"learning_rate": 3e-3, "schedule": "constant", "warmup_fraction": 0},
        }
    )  # fmt: skip
    rate = settings.optimizer.learning_rate
    model = random_model()
    model.backbone.to(dtype)
    engine = ZeroEngine(model, FINETUNE, settings, resources, rate, DEVICE)
    batch = random_batch(tasks=3, slots=False).to(DEVICE)
    totals = FINETUNE.denominators(batch)
    losses = []
    for _ in range(settings.steps):
        with ExitStack() as scope:
            result = engine.forward(batch, totals, scope)
            engine.backward(result.loss)
        engine.step()
        losses.append(result.loss.item())
    engine.close()
    return losses


SHARDINGS = [
    *(ResourceSettings(zero_stage=stage) for stage in (1, 2, 3)),
    ResourceSettings(zero_stage=2, offload_optimizer=True),
    ResourceSettings(zero_stage=3, offload_optimizer=True, offload_parameters=True),
]


@pytest.mark.parametrize("resources", SHARDINGS, ids=lambda r: f"stage {r.zero_stage}")
def test_zero_stages_take_the_same_steps(resources: ResourceSettings):
    plain, sharded = zero_losses(ResourceSettings()), zero_losses(resources)
    assert plain[2] < plain[1] < plain[0]
    assert sharded == pytest.approx(plain, rel=FLOAT32_LOSS)


@pytest.mark.parametrize("stage", [0, 3])
def test_steps_above_a_bfloat16_backbone_are_those_above_a_float32_one(stage: int):
    resources = ResourceSettings.model_validate({"zero_stage": stage})
    exact, rounded = zero_losses(resources), zero_losses(resources, torch.bfloat16)
    assert rounded == pytest.approx(exact, rel=4 * BFLOAT16_LOSS)
    assert rounded != exact


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_decoder_continues_its_prefix_as_on_the_cpu(family: Family, dtype: torch.dtype):
    batch, backbone = random_batch(tasks=3), random_decoder(family, torch.float32)
    bank = fill(backbone.sites, 3).map(lambda factor: factor.requires_grad_())
    found = []
    for device, kind in ((torch.device("cpu"), torch.float32), (DEVICE, dtype)):
        backbone.to(device, kind)
        given = batch.to(device)
        encoded = backbone.encode(given.instruction_ids_KI, given.instruction_mask_KI)
        fused = FusedInstruction(encoded.mask_KI, prefix=encoded.prefix)
        with backbone.bound(bank.to(device), fused):
            logits = backbone.logits(
                given.input_ids_KNS, given.input_mask_KNS, given.target_ids_KNT
            )
            loss = cross_entropy(logits, given.target_ids_KNT).sum()
            loss.backward()
        found.append(loss.item())
    assert found[1] == pytest.approx(found[0], rel=20 * BFLOAT16_LOSS)
    if dtype == torch.float32:
        assert found[1] == pytest.approx(found[0], rel=FLOAT32_LOGITS)
    assert all(
        factor.grad is not None and factor.grad.isfinite().all() for factor in bank.a.values()
    )
