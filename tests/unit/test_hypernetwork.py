"""What the hypernetwork generates, and that it depends on its own instruction alone."""

import pytest
import torch

from tagi_ray.backbone import EncodedInstruction
from tagi_ray.hypernetwork import Hypernetwork
from tagi_ray.lora import common_start
from tagi_ray.method_sections import FusionSettings, HypernetworkSettings
from tagi_ray.sections import LoraSettings
from tests.models import random_backbone, random_batch, random_model


def test_step_zero_is_the_backbone_with_the_common_start():
    backbone = random_backbone()
    lora = LoraSettings(rank=4, alpha=8.0, targets=("q", "v"), start_seed=3)
    network = Hypernetwork(backbone.sites, 32, HypernetworkSettings(width=16, heads=2), lora)
    bank = network(EncodedInstruction(torch.randn(2, 5, 32), torch.ones(2, 5, dtype=torch.bool)))
    start = common_start(backbone.sites, 4, 3)
    assert bank.scaling == 2.0
    for site in backbone.sites:
        assert bank.a[site.name].shape == (2, 4, site.d_in)
        assert bank.b[site.name].shape == (2, site.d_out, 4)
        assert torch.equal(bank.a[site.name], start[site.name].expand(2, -1, -1))
        assert not bank.b[site.name].any()


def test_gradients_reach_every_weight():
    model, batch = random_model(), random_batch()
    encoded = model.encode_instruction(batch.instruction_ids_KI, batch.instruction_mask_KI)
    with model.backbone.bound(model.generate_bank(encoded), model.fused(encoded)):
        logits = model.backbone.logits(
            batch.input_ids_KNS, batch.input_mask_KNS, batch.target_ids_KNT
        )
        logits.square().sum().backward()
    for name, parameter in model.hypernetwork.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    assert all(p.grad is None for p in model.backbone.parameters())


def test_an_adapter_does_not_depend_on_its_batch_mates_or_their_padding():
    model, batch = random_model(), random_batch(tasks=3)
    ids, mask = batch.instruction_ids_KI, batch.instruction_mask_KI
    together = model.generate_bank(model.encode_instruction(ids, mask))
    for task in range(3):
        length = int(mask[task].sum())
        alone = model.generate_bank(
            model.encode_instruction(ids[task : task + 1, :length], mask[task : task + 1, :length])
        )
        for name in together.a:
            torch.testing.assert_close(
                together.a[name][task], alone.a[name][0], atol=1e-5, rtol=1e-5
            )
            torch.testing.assert_close(
                together.b[name][task], alone.b[name][0], atol=1e-5, rtol=1e-5
            )
    assert model.generated_tasks == 6


def test_sites_of_one_module_get_different_adapters():
    model, batch = random_model(), random_batch()
    bank = model.generate_bank(
        model.encode_instruction(batch.instruction_ids_KI, batch.instruction_mask_KI)
    )
    names = list(bank.b)
    assert all(
        not torch.allclose(bank.b[first], bank.b[second])
        for first in names for second in names if first < second
    )  # fmt: skip


def test_concatenated_memory_equals_each_row_built_by_hand():
    model, batch = random_model(FusionSettings(kind="concat")), random_batch()
    encoded = model.encode_instruction(batch.instruction_ids_KI, batch.instruction_mask_KI)
    with model.backbone.bound(None, model.fused(encoded)):
        logits = model.backbone.logits(
            batch.input_ids_KNS, batch.input_mask_KNS, batch.target_ids_KNT
        )
    hf = model.backbone.model
    for task in range(2):
        keep = batch.instruction_mask_KI[task]
        for row in range(3):
            ids = batch.input_ids_KNS[task, row][batch.input_mask_KNS[task, row]]
            states = hf.encoder(input_ids=ids[None]).last_hidden_state
            joint = torch.cat([encoded.states_KID[task][keep][None], states], 1)
            target = batch.target_ids_KNT[task, row]
            target = target[target != -100]
            alone = hf(encoder_outputs=(joint,), labels=target[None]).logits[0]
            torch.testing.assert_close(
                logits[task, row, : len(target)], alone, atol=1e-5, rtol=1e-5
            )


def test_without_fusion_the_decoder_sees_no_instruction():
    model, batch = random_model(FusionSettings(kind="none")), random_batch()
    encoded = model.encode_instruction(batch.instruction_ids_KI, batch.instruction_mask_KI)
    assert model.fused(encoded) is None


def test_instructions_are_not_encoded_under_a_bank():
    model, batch = random_model(), random_batch()
    ids, mask = batch.instruction_ids_KI, batch.instruction_mask_KI
    bank = model.generate_bank(model.encode_instruction(ids, mask))
    with model.backbone.bound(bank), pytest.raises(RuntimeError, match="without a bank"):
        model.encode_instruction(ids, mask)
