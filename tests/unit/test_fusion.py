"""What reaches the student besides its adapter, on a small random T5.

Axes: K tasks, N instances, S source tokens, I instruction tokens, D features.
"""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError
from transformers import T5Config, T5ForConditionalGeneration

from tagi_ray.batches import Batch
from tagi_ray.encoder_decoder import EncoderDecoder
from tagi_ray.errors import ConfigError
from tagi_ray.fusion import CrossAttention, Fusion
from tagi_ray.instruction import EncodedInstruction, FusedInstruction
from tagi_ray.lora import LoraBank
from tagi_ray.method_sections import FusionSettings
from tagi_ray.model import TagiModel
from tests.models import random_backbone, random_bank, random_batch, random_model

ATTENDED = FusionSettings(kind="cross_attention")
BOTH = FusionSettings(kind="cross_attention+concat")
SHARED = FusionSettings(kind="cross_attention+concat", shared=True)
LOW_RANK = FusionSettings(kind="cross_attention", low_rank=6)
HEADS, BLOCKS, WIDTH, INNER = 2, 2, 32, 24


def trained(settings: FusionSettings) -> TagiModel:
    """A model in float64 whose fusion has left its start."""
    model = random_model(settings).double()
    torch.manual_seed(7)
    for name, weight in model.fusion.named_parameters():
        scale = 0.3 if weight.dim() > 1 else 0.1
        shift = 0.0 if weight.dim() > 1 else 1.0
        nn.init.normal_(weight, shift, scale)
        assert weight.requires_grad, name
    return model


def encoded(model: TagiModel, batch: Batch) -> EncodedInstruction:
    return model.encode_instruction(batch.instruction_ids_KI, batch.instruction_mask_KI)


def logits(model: TagiModel, batch: Batch) -> Tensor:
    return model.backbone.logits(batch.input_ids_KNS, batch.input_mask_KNS, batch.target_ids_KNT)


def student(model: TagiModel, batch: Batch, bank: LoraBank | None = None) -> Tensor:
    with model.backbone.bound(bank, model.fused(encoded(model, batch))):
        return logits(model, batch)


def gradients(loss: Tensor, fusion: nn.Module) -> dict[str, Tensor]:
    names, weights = zip(*fusion.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, weights), strict=True))


def normed(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def taken_by_hand(weights: dict[str, Tensor], s_SD: Tensor, i_ID: Tensor, heads: int) -> Tensor:
    """What one row takes of one instruction, both without padding: the sums of Eq. 1."""
    s = normed(s_SD, weights["norm.weight"])
    i = normed(i_ID, weights["instruction_norm.weight"])
    outputs = []
    for rows in weights["q.weight"].shape[0] // heads * torch.arange(heads + 1).unfold(0, 2, 1):
        head = slice(*rows.tolist())
        q, k, v = (
            x @ weights[f"{name}.weight"][head].T for name, x in (("q", s), ("k", i), ("v", i))
        )
        scores = (q[:, None] * k[None]).sum(-1) / q.shape[-1] ** 0.5
        shares = scores.exp() / scores.exp().sum(1, keepdim=True)
        outputs.append(shares @ v)
    return torch.cat(outputs, 1) @ weights["o.weight"].T


def row_by_hand(model: TagiModel, batch: Batch, task: int, row: int, i_ID: Tensor) -> Tensor:
    """Logits [T, V] of one row alone, the encoder run block by block with Eq. 1 in between."""
    hf, settings = model.backbone.model, model.fusion.settings
    ids = batch.input_ids_KNS[task, row][batch.input_mask_KNS[task, row]]
    target = batch.target_ids_KNT[task, row]
    x, bias = hf.encoder.embed_tokens(ids[None]), None
    for number, block in enumerate(hf.encoder.block):
        s, bias, _ = block.layer[0](x, position_bias=bias)
        weights = dict(model.fusion.layers[0 if settings.shared else number].named_parameters())
        taken = taken_by_hand(weights, s[0], i_ID, HEADS)
        if settings.shared:
            taken = taken * model.fusion.gates[number].weight
        x = block.layer[1](s + taken[None])
    states = hf.encoder.final_layer_norm(x)
    if settings.concat:
        states = torch.cat([i_ID[None], states], 1)
    return hf(encoder_outputs=(states,), labels=target[target != -100][None]).logits[0]


def test_a_cross_attention_is_equation_1_with_its_gradients():
    torch.manual_seed(0)
    layer = CrossAttention(8, 12, 3).double()
    for weight in layer.parameters():
        nn.init.normal_(weight, 0.5)
    states, instruction = torch.randn(6, 4, 8).double(), torch.randn(2, 5, 8).double()
    states.requires_grad_()
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]).bool()
    output = layer(states, instruction, mask)
    weights = dict(layer.named_parameters())
    expected = torch.stack(
        [
            taken_by_hand(weights, states[row], instruction[row // 3][mask[row // 3]], 3)
            for row in range(6)
        ]
    )
    torch.testing.assert_close(output, expected, atol=1e-10, rtol=1e-10)
    found, right = (
        torch.autograd.grad(value.cos().sum(), [states, *weights.values()])
        for value in (output, expected)
    )
    for name, one, other in zip(["states", *weights], found, right, strict=True):
        assert one.abs().max() > 1e-3, name
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-9, msg=name)


@pytest.mark.parametrize("settings", [ATTENDED, BOTH, SHARED, LOW_RANK], ids=str)
def test_a_batch_is_each_row_alone_with_equation_1_in_every_block(settings: FusionSettings):
    model, batch = trained(settings), random_batch(tasks=3)
    found = student(model, batch)
    instructions = encoded(model, batch)
    bare, loss, loss_by_hand = logits(model, batch), 0.0, 0.0
    for task in range(3):
        i_ID = instructions.states_KID[task][instructions.mask_KI[task]]
        for row in range(3):
            expected = row_by_hand(model, batch, task, row, i_ID)
            mine = found[task, row, : len(expected)]
            torch.testing.assert_close(mine, expected, atol=1e-5, rtol=1e-5)  # T5's norm is float32
            assert not torch.allclose(mine, bare[task, row, : len(expected)], atol=1e-2)
            loss, loss_by_hand = loss + mine.cos().sum(), loss_by_hand + expected.cos().sum()
    right = gradients(loss_by_hand, model.fusion)
    for name, gradient in gradients(loss, model.fusion).items():
        assert gradient.abs().max() > 1e-3, name
        torch.testing.assert_close(gradient, right[name], atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize("bank", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("settings", "without"),
    [(ATTENDED, "none"), (BOTH, "concat"), (SHARED, "concat"), (LOW_RANK, "none")],
    ids=str,
)
def test_step_zero_is_the_model_without_it_bit_for_bit(
    settings: FusionSettings, without: str, dtype: torch.dtype, bank: bool
):
    batch, outputs = random_batch(), []
    for chosen in (settings, FusionSettings(kind=without)):
        model = random_model(chosen)
        model.backbone.to(dtype)
        adapters = random_bank(model.backbone) if bank else None
        outputs.append(student(model, batch, adapters))
        if chosen.kind == "none":
            with model.backbone.bound(adapters):
                outputs.append(logits(model, batch))
    assert outputs[0].dtype == dtype
    assert all(torch.equal(output, outputs[0]) for output in outputs)


@torch.no_grad()
def test_nothing_depends_on_what_stands_in_padding():
    model, batch = trained(BOTH), random_batch(tasks=3)
    expected = student(model, batch)
    padding = ~batch.instruction_mask_KI
    assert padding.any()
    instructions = encoded(model, batch)
    states = instructions.states_KID.masked_fill(padding[..., None], 1e3)
    with model.backbone.bound(None, model.fused(instructions._replace(states_KID=states))):
        assert torch.equal(logits(model, batch), expected)
        ids = batch.input_ids_KNS.masked_fill(~batch.input_mask_KNS, 11)
        other = model.backbone.logits(ids, batch.input_mask_KNS, batch.target_ids_KNT)
    assert torch.equal(other, expected)


def test_the_instruction_is_read_once_for_all_instances_of_its_task():
    model, shapes = trained(ATTENDED), {}
    for name in ("q", "k", "v"):
        model.fusion.layers[1].get_submodule(name).register_forward_hook(
            lambda module, given, output, name=name: shapes.update({name: tuple(given[0].shape)})
        )
    student(model, random_batch(tasks=2, instances=5))
    assert shapes == {"q": (2, 5 * 7, WIDTH), "k": (2, 9, WIDTH), "v": (2, 9, WIDTH)}


def test_without_a_bound_instruction_the_backbone_is_bare():
    model, batch = trained(BOTH), random_batch()
    bare = logits(random_model(FusionSettings(kind="none")).double(), batch)
    fused = model.fused(encoded(model, batch))
    assert torch.equal(logits(model, batch), bare)
    with model.backbone.bound(None, fused._replace(attended_KID=None, memory_KID=None)):
        assert torch.equal(logits(model, batch), bare)


def test_the_backbone_keeps_its_keys_and_site_names():
    with_fusion, without = random_model(BOTH), random_backbone()
    assert list(with_fusion.backbone.state_dict()) == list(without.state_dict())
    assert with_fusion.backbone.sites == without.sites
    names = ("norm", "instruction_norm", "q", "k", "v", "o")
    keys = {f"fusion.layers.{block}.{name}.weight" for block in range(BLOCKS) for name in names}
    assert {key for key in with_fusion.state_dict() if key.startswith("fusion.")} == keys
    gates = {f"fusion.gates.{block}.weight" for block in range(BLOCKS)}
    shared = {f"fusion.layers.0.{name}.weight" for name in names}
    found = {key for key in random_model(SHARED).state_dict() if key.startswith("fusion.")}
    assert found == shared | gates


XL = T5Config(d_model=2048, d_kv=64, d_ff=5120, num_heads=32, num_layers=24, vocab_size=32128)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (BOTH, 24 * (2 * 2048 + 4 * 2048 * 2048)),
        (
            FusionSettings(kind="cross_attention", low_rank=256),
            24 * (2 * 2048 + 4 * 2048 * 256),
        ),
        (SHARED, 2 * 2048 + 4 * 2048 * 2048 + 24 * 2048),
        (
            FusionSettings(kind="cross_attention", low_rank=256, shared=True),
            2 * 2048 + 4 * 2048 * 256 + 24 * 2048,
        ),
        (FusionSettings(kind="concat"), 0),
    ],
)
def test_parameters_of_t5_xl(settings: FusionSettings, expected: int):
    with torch.device("meta"):
        fusion = Fusion(settings, EncoderDecoder(T5ForConditionalGeneration(XL), ("q",), "xl"))
    assert sum(weight.numel() for weight in fusion.parameters()) == expected


def test_a_cross_attention_runs_on_the_meta_device():
    with torch.device("meta"):
        layer = CrossAttention(8, 12, 3)
        states = torch.empty(6, 4, 8, dtype=torch.bfloat16)
        output = layer(states, torch.empty(2, 5, 8), torch.ones(2, 5, dtype=torch.bool))
    assert (output.shape, output.dtype) == ((6, 4, 8), torch.float32)
    output.sum().backward()
    assert all(weight.grad is not None for weight in layer.parameters())


@pytest.mark.parametrize("settings", [ATTENDED, BOTH, SHARED, LOW_RANK], ids=str)
def test_every_weight_learns_once_the_output_projections_do(settings: FusionSettings):
    model, batch = random_model(settings), random_batch()
    optimizer = torch.optim.SGD(model.fusion.parameters(), lr=1.0)
    moved: list[set[str]] = []
    for _ in range(3):
        loss = student(model, batch).square().mean()
        found = gradients(loss, model.fusion)
        moved.append({name for name, gradient in found.items() if gradient.any()})
        for name, weight in model.fusion.named_parameters():
            weight.grad = found[name]
        optimizer.step()
    projections = {name for name, _ in model.fusion.named_parameters() if ".o." in name}
    assert moved[0] == projections
    assert moved[1] == {name for name, _ in model.fusion.named_parameters()}


def checkpointed(settings: FusionSettings) -> TagiModel:
    model = trained(settings)
    model.backbone.checkpoint_activations()
    return model


@pytest.mark.parametrize("bank", [False, True])
@pytest.mark.parametrize("settings", [ATTENDED, BOTH, SHARED], ids=str)
def test_gradients_with_and_without_activation_checkpointing_agree(
    settings: FusionSettings, bank: bool
):
    batch, found = random_batch(), []
    for model in (trained(settings), checkpointed(settings)):
        fused = model.fused(encoded(model, batch))
        adapters = random_bank(model.backbone, requires_grad=True) if bank else None
        with model.backbone.bound(adapters, fused):
            loss = logits(model, batch).square().sum()
            found.append(gradients(loss, model.fusion))
    for name, gradient in found[0].items():
        assert gradient.any(), name
        torch.testing.assert_close(found[1][name], gradient, atol=1e-6, rtol=1e-6, msg=name)


@pytest.mark.parametrize("bank", [False, True])
def test_an_instruction_that_is_gone_at_the_recomputing_backward_raises(bank: bool):
    model, batch = checkpointed(ATTENDED), random_batch()
    adapters = random_bank(model.backbone, requires_grad=True) if bank else None
    loss = student(model, batch, adapters).square().sum()
    with pytest.raises(CheckpointError):
        loss.backward()


def test_another_instruction_is_not_bound_before_the_backward_of_the_first():
    model, batch = checkpointed(ATTENDED), random_batch()
    loss = student(model, batch).square().sum()
    other = model.fused(encoded(model, random_batch(seed=1)))
    with (
        pytest.raises(RuntimeError, match="awaits its backward"),
        model.backbone.bound(None, other),
    ):
        pass
    del loss


def test_above_a_bfloat16_backbone_float32_weights_learn_from_bfloat16_products():
    batch, found = random_batch(), []
    for dtype in (torch.float32, torch.bfloat16):
        model = trained(BOTH).float()
        model.backbone.to(dtype)
        with model.backbone.bound(None, model.fused(encoded(model, batch))):
            output = logits(model, batch)
        assert output.dtype == dtype
        found.append((output.float(), gradients(output.float().square().mean(), model.fusion)))
    (exact, exact_gradients), (rounded, rounded_gradients) = found
    assert not torch.equal(exact, rounded)
    assert distance(rounded, exact) < 0.03
    for name, gradient in rounded_gradients.items():
        assert gradient.dtype == torch.float32
        assert distance(gradient, exact_gradients[name]) < 0.1, name


def distance(found: Tensor, expected: Tensor) -> float:
    return float(((found - expected).norm() / expected.norm()).detach())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("settings", [ATTENDED, BOTH], ids=str)
def test_greedy_decoding_is_the_argmax_of_the_logits(settings: FusionSettings, checkpointing: bool):
    model, batch = (checkpointed if checkpointing else trained)(settings), random_batch()
    fused: FusedInstruction = model.fused(encoded(model, batch))
    with torch.no_grad(), model.backbone.bound(None, fused):
        ids = model.backbone.decode_greedy(batch.input_ids_KNS, batch.input_mask_KNS, 6)
        found = model.backbone.logits(batch.input_ids_KNS, batch.input_mask_KNS, ids).argmax(-1)
    for given, argmax in zip(rows(ids), rows(found), strict=True):
        end = given.index(1) + 1 if 1 in given else len(given)
        assert argmax[:end] == given[:end]


def rows(ids_KNT: Tensor) -> Iterable[list[int]]:
    return ids_KNT.flatten(0, 1).tolist()


def test_features_that_do_not_divide_among_the_heads_are_refused():
    with pytest.raises(ConfigError, match=r"fusion\.low_rank=5 is not a multiple of the 2 heads"):
        Fusion(FusionSettings(kind="cross_attention", low_rank=5), random_backbone())


def test_a_kind_of_another_family_is_refused():
    with pytest.raises(ConfigError, match=r"fusion\.kind=kv_prefix .* cross_attention"):
        Fusion(FusionSettings(kind="kv_prefix"), random_backbone())
