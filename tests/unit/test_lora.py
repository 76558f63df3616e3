"""The bank, its linears and its lifetime, on a small random T5."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSeq2SeqLM
from transformers.pytorch_utils import Conv1D

from tagi_ray.architecture import FAMILIES
from tagi_ray.encoder_decoder import EncoderDecoder
from tagi_ray.errors import ConfigError
from tagi_ray.instruction import FusedInstruction
from tagi_ray.lora import Binding, LoraBank, LoraLinear, bound, common_start, inject
from tests.models import fill, random_backbone, random_bank, random_batch

TYPES = [name for name, family in FAMILIES.items() if family == "t5"]


def test_a_bank_with_zero_b_gives_the_backbone_bit_for_bit():
    backbone, batch = random_backbone(), random_batch()
    bare = backbone.logits(batch.input_ids_KNS, batch.input_mask_KNS, batch.target_ids_KNT)
    with backbone.bound(random_bank(backbone).zeroed()):
        zero = backbone.logits(batch.input_ids_KNS, batch.input_mask_KNS, batch.target_ids_KNT)
    with backbone.bound(random_bank(backbone)):
        other = backbone.logits(batch.input_ids_KNS, batch.input_mask_KNS, batch.target_ids_KNT)
    assert torch.equal(bare, zero)
    assert not torch.allclose(bare, other, atol=1e-3)


def test_injection_changes_neither_state_dict_keys_nor_unbound_output():
    model = nn.ModuleDict({"q": nn.Linear(4, 6), "wo": nn.Linear(6, 4)})
    keys, x = list(model.state_dict()), torch.randn(2, 3, 4)
    before = model["q"](x)
    sites, _ = inject(model, ("q",))
    assert list(model.state_dict()) == keys
    assert [(site.name, site.d_in, site.d_out) for site in sites] == [("q", 4, 6)]
    assert isinstance(model["q"], LoraLinear)
    assert torch.equal(model["q"](x), before)


def test_a_target_that_no_linear_has_is_named_with_those_there_are():
    with pytest.raises(ConfigError, match=r"no linear named k;.*q, wo"):
        inject(nn.ModuleDict({"q": nn.Linear(4, 6), "wo": nn.Linear(6, 4)}), ("q", "k"))


def test_each_task_gets_its_own_update_as_computed_by_hand():
    linear = nn.Linear(5, 7)
    model = nn.ModuleDict({"q": linear})
    sites, binding = inject(model, ("q",))
    bank = fill(sites, slots=3, rank=2, scaling=0.5)
    x = torch.randn(6, 4, 5)
    with bound(binding, bank):
        output = model["q"](x)
    for row in range(6):
        slot = row // 2
        weight = linear.weight.double() + 0.5 * (
            bank.b["q"][slot].double() @ bank.a["q"][slot].double()
        )
        expected = x[row].double() @ weight.T + linear.bias.double()
        torch.testing.assert_close(output[row].double(), expected, atol=1e-5, rtol=1e-5)


def test_a_conv1d_gets_the_update_that_a_linear_of_its_weight_gets():
    """GPT-2's layer, whose weight is [in, out]."""
    conv = Conv1D(7, 5)
    torch.nn.init.normal_(conv.bias)
    linear = nn.Linear(5, 7)
    linear.weight.data, linear.bias.data = conv.weight.data.T.clone(), conv.bias.data.clone()
    model = nn.ModuleDict({"c_attn": conv})
    keys, x = list(model.state_dict()), torch.randn(6, 4, 5)
    before = conv(x)
    sites, binding = inject(model, ("c_attn",))
    assert list(model.state_dict()) == keys
    assert [(s.d_in, s.d_out, s.transposed) for s in sites] == [(5, 7, True)]
    assert torch.equal(model["c_attn"](x), before)
    other, other_binding = inject(plain := nn.ModuleDict({"c_attn": linear}), ("c_attn",))
    assert not other[0].transposed
    bank = fill(sites, slots=3, rank=2)
    with bound(binding, bank), bound(other_binding, bank):
        torch.testing.assert_close(model["c_attn"](x), plain["c_attn"](x))
        assert not torch.allclose(model["c_attn"](x), before, atol=1e-2)


def test_conv1d_layers_are_named_and_refused_together_with_linears():
    def model() -> nn.Module:
        return nn.ModuleDict({"c_attn": Conv1D(7, 5), "lm_head": nn.Linear(5, 7)})

    with pytest.raises(ConfigError, match=r"no linear named q; it has c_attn, lm_head"):
        inject(model(), ("q",))
    with pytest.raises(ConfigError, match=r"lm_head and GPT-2's Conv1D .* leave lm_head out"):
        inject(model(), ("c_attn", "lm_head"))


def test_rows_that_do_not_divide_among_the_tasks_are_refused():
    model = nn.ModuleDict({"q": nn.Linear(5, 7)})
    sites, binding = inject(model, ("q",))
    with (
        bound(binding, fill(sites, slots=3)),
        pytest.raises(ValueError, match=r"4 rows .* 3 tasks"),
    ):
        model["q"](torch.randn(4, 5))


def test_several_tasks_in_one_batch_equal_as_many_runs():
    backbone, batch = random_backbone(), random_batch(tasks=3)
    bank = random_bank(backbone, tasks=3)
    with backbone.bound(bank):
        together = backbone.logits(batch.input_ids_KNS, batch.input_mask_KNS, batch.target_ids_KNT)
    for slot in range(3):
        with backbone.bound(bank.take(torch.tensor([slot]))):
            alone = backbone.logits(
                batch.input_ids_KNS[slot : slot + 1],
                batch.input_mask_KNS[slot : slot + 1],
                batch.target_ids_KNT[slot : slot + 1],
            )
        torch.testing.assert_close(together[slot], alone[0], atol=1e-5, rtol=1e-5)


def test_binding_a_second_bank_before_the_first_backward_raises():
    backbone, batch = random_backbone(), random_batch()
    bank = random_bank(backbone, requires_grad=True)
    with backbone.bound(bank):
        loss = backbone.logits(
            batch.input_ids_KNS, batch.input_mask_KNS, batch.target_ids_KNT
        ).sum()
    with pytest.raises(RuntimeError, match="awaits its backward"), backbone.bound(bank):
        pass
    loss.backward()
    with backbone.bound(bank):
        pass


def test_a_forward_that_is_thrown_away_does_not_block_the_next_bank():
    backbone, batch = random_backbone(), random_batch()
    with backbone.bound(random_bank(backbone, requires_grad=True)):
        logits = backbone.logits(batch.input_ids_KNS, batch.input_mask_KNS, batch.target_ids_KNT)
    del logits
    with backbone.bound(random_bank(backbone)):
        pass


def test_two_banks_at_a_time_raise():
    binding, bank = Binding(), LoraBank({"q": torch.zeros(1, 1, 1)}, {"q": torch.zeros(1, 1, 1)}, 1)
    with bound(binding, bank), pytest.raises(RuntimeError, match="bound already"):
        binding.bind(bank)


def _gradients(checkpointing: bool, late: bool = False) -> list[torch.Tensor]:
    backbone, batch = random_backbone(checkpointing=checkpointing), random_batch()
    bank = random_bank(backbone, requires_grad=True)
    teacher = random_bank(backbone, seed=5)
    with torch.no_grad(), backbone.bound(teacher):
        target = backbone.logits(batch.input_ids_KNS, batch.input_mask_KNS, batch.target_ids_KNT)
    with backbone.bound(bank):
        logits = backbone.logits(batch.input_ids_KNS, batch.input_mask_KNS, batch.target_ids_KNT)
        loss = (logits - target).square().mean()
        if not late:
            loss.backward()
    if late:
        loss.backward()
    return [factor.grad for factor in (*bank.a.values(), *bank.b.values())]


def test_gradients_with_and_without_activation_checkpointing_agree():
    for plain, recomputed in zip(_gradients(False), _gradients(True), strict=True):
        assert plain.abs().max() > 0
        torch.testing.assert_close(plain, recomputed, atol=1e-6, rtol=1e-5)


def test_a_bank_that_is_gone_at_the_recomputing_backward_raises():
    with pytest.raises(torch.utils.checkpoint.CheckpointError):
        _gradients(True, late=True)


def test_the_common_start_depends_on_its_seed_alone():
    sites = random_backbone().sites
    torch.manual_seed(1)
    first = common_start(sites, 4, seed=3)
    torch.manual_seed(2)
    again, other = common_start(sites, 4, seed=3), common_start(sites, 4, seed=4)
    name = sites[0].name
    assert torch.equal(first[name], again[name])
    assert not torch.equal(first[name], other[name])
    assert first[name].abs().max() <= sites[0].d_in ** -0.5


def test_factors_are_cast_to_their_weights_dtype_when_they_are_bound():
    backbone, batch = random_backbone(), random_batch()
    bank = random_bank(backbone, requires_grad=True)
    backbone.to(torch.bfloat16)
    with backbone.bound(bank):
        cast = backbone.binding.bank
        assert {f.dtype for f in (*cast.a.values(), *cast.b.values())} == {torch.bfloat16}
        logits = backbone.logits(batch.input_ids_KNS, batch.input_mask_KNS, batch.target_ids_KNT)
        logits.float().square().mean().backward()
    assert all(f.grad.dtype == torch.float32 and f.grad.any() for f in bank.a.values())


@pytest.mark.parametrize("family", TYPES)
def test_greedy_decoding_is_the_argmax_of_the_logits_with_and_without_checkpointing(family):
    config = AutoConfig.for_model(
        family, vocab_size=96, d_model=32, d_ff=48, d_kv=12, num_heads=2, num_layers=2,
        dropout_rate=0.0, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)  # so that earlier tokens matter
    backbone, batch = EncoderDecoder(model, ("q", "v"), family), random_batch()
    texts = batch.input_ids_KNS, batch.input_mask_KNS
    with backbone.bound(random_bank(backbone)):
        plain = backbone.decode_greedy(*texts, 6)
        backbone.checkpoint_activations()
        assert torch.equal(backbone.decode_greedy(*texts, 6), plain)
        assert all(block.training for block in model.decoder.block)
        best = backbone.logits(*texts, plain).argmax(-1)
    written = plain != 0
    assert torch.equal(best[written], plain[written])
    assert len(plain[written].unique()) > 1


@pytest.mark.parametrize("family", TYPES)
def test_an_instruction_projected_once_per_task_is_the_memory_of_each_row(family):
    """Without checkpointing the memory comes as keys and values, with it as plain states."""
    config = AutoConfig.for_model(
        family, vocab_size=96, d_model=32, d_ff=48, d_kv=12, num_heads=2, num_layers=2,
        dropout_rate=0.0, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(config).double()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    backbone, batch = EncoderDecoder(model, ("q", "k", "v"), family), random_batch()
    bank = random_bank(backbone, requires_grad=True)
    texts = batch.input_ids_KNS, batch.input_mask_KNS
    states = backbone.encode(batch.instruction_ids_KI, batch.instruction_mask_KI).states_KID

    def outcome() -> list[torch.Tensor]:
        given = states.clone().requires_grad_()
        instruction = FusedInstruction(batch.instruction_mask_KI, memory_KID=given)
        for factor in (*bank.a.values(), *bank.b.values()):
            factor.grad = None
        with backbone.bound(bank, instruction):
            logits = backbone.logits(*texts, batch.target_ids_KNT)
            logits.square().mean().backward()
            decoded = backbone.decode_greedy(*texts, 6)
        gradients = [factor.grad for factor in (*bank.a.values(), *bank.b.values())]
        return [logits.detach(), decoded, given.grad, *gradients]

    once = outcome()
    backbone.checkpoint_activations()
    for mine, plain in zip(once, outcome(), strict=True):
        assert plain.abs().max() > 0
        torch.testing.assert_close(mine, plain, rtol=1e-5, atol=1e-7)
