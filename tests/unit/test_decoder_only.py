"""Decoder-only backbones: what the prefix of an instruction is, and what padding is not."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tagi_ray.batches import Batch
from tagi_ray.families import load_backbone
from tagi_ray.footprint import META, _LiveStorages
from tagi_ray.instruction import FusedInstruction
from tagi_ray.lora import LoraBank
from tagi_ray.sections import BackboneSettings, LoraSettings
from tagi_ray.vocabulary import TextTokenizer, prepare_tokenizer
from tests.decoders import BEGIN, END, FAMILIES, PAD, random_causal_lm, random_decoder
from tests.models import SHARED, random_bank, random_batch

STORIES = SHARED / "data" / "models" / "stories260K" / "hf"


def bank_of(backbone, tasks: int, seed: int = 0, requires_grad: bool = False) -> LoraBank:
    dtype = next(backbone.parameters()).dtype
    bank = random_bank(backbone, tasks, seed=seed)
    return bank.map(lambda f: f.to(dtype).requires_grad_(requires_grad))


def texts(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    return batch.input_ids_KNS, batch.input_mask_KNS, batch.target_ids_KNT


def prefix_of(backbone, batch: Batch) -> FusedInstruction:
    encoded = backbone.encode(batch.instruction_ids_KI, batch.instruction_mask_KI)
    return FusedInstruction(encoded.mask_KI, prefix=encoded.prefix)


def factors(bank: LoraBank) -> list[Tensor]:
    return [*bank.a.values(), *bank.b.values()]


def joined(batch: Batch, k: int, n: int, begin: int | None, instruction: bool) -> Tensor:
    """One row as the plain model reads it: no padding, and the target is not in it."""
    parts = [torch.tensor([begin])] if begin is not None else []
    if instruction:
        parts.append(batch.instruction_ids_KI[k][batch.instruction_mask_KI[k]])
    return torch.cat([*parts, batch.input_ids_KNS[k, n][batch.input_mask_KNS[k, n]]])


def plain_logits(model, read: Tensor, target: Tensor) -> Tensor:
    """Logits [T, V] of stock transformers for the target after what was read."""
    logits = model(torch.cat([read, target])[None]).logits[0]
    return logits[len(read) - 1 : len(read) - 1 + len(target)]


def merged(model, family: str, bank: LoraBank, slot: int) -> None:
    """Add a slot's update to the weights of a stock model."""
    for name in bank.a:
        update = bank.scaling * bank.b[name][slot] @ bank.a[name][slot]
        weight = model.get_submodule(name).weight
        weight.data += update.T if family == "gpt2" else update


@pytest.mark.parametrize("family", FAMILIES)
def test_injection_changes_neither_keys_nor_the_output(family):
    stock, backbone, batch = random_causal_lm(family), random_decoder(family), random_batch()
    assert list(stock.state_dict()) == list(backbone.model.state_dict())
    bare = backbone.logits(*texts(batch))
    with backbone.bound(bank_of(backbone, 2).zeroed()):
        assert torch.equal(backbone.logits(*texts(batch)), bare)
    read = joined(batch, 1, 2, BEGIN, instruction=False)
    target = batch.target_ids_KNT[1, 2][batch.target_ids_KNT[1, 2] != -100]
    expected = plain_logits(stock, read, target)
    torch.testing.assert_close(bare[1, 2, : len(target)], expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("begin", [BEGIN, None])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_zero_bank_with_the_prefix_is_the_backbone_on_instruction_and_input(family, begin):
    backbone, batch = random_decoder(family, begin=begin), random_batch(tasks=3)
    stock = random_causal_lm(family)
    stock.set_attn_implementation("sdpa")
    with torch.no_grad(), backbone.bound(bank_of(backbone, 3).zeroed(), prefix_of(backbone, batch)):
        logits = backbone.logits(*texts(batch))
    for k in range(3):
        for n in range(3):
            target = batch.target_ids_KNT[k, n][batch.target_ids_KNT[k, n] != -100]
            expected = plain_logits(stock, joined(batch, k, n, begin, instruction=True), target)
            torch.testing.assert_close(
                logits[k, n, : len(target)], expected, atol=1e-10, rtol=1e-10
            )


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_with_the_prefix_are_those_of_rows_that_read_the_bare_instruction(
    family, checkpointing
):
    """Against the backbone itself with a cache of the instruction for each row, one by one."""
    from transformers.cache_utils import DynamicCache

    backbone = random_decoder(family, checkpointing=checkpointing)
    batch, bank = random_batch(tasks=3), None
    bank = bank_of(backbone, 3, requires_grad=True)
    valid = batch.target_ids_KNT != -100
    with backbone.bound(bank, prefix_of(backbone, batch)):
        logits = backbone.logits(*texts(batch))
        (logits.logsumexp(-1) * valid).sum().backward()
    found = [factor.grad for factor in factors(bank)]

    for factor in factors(bank):
        factor.grad = None
    one_by_one, stock = random_decoder(family), random_causal_lm(family)
    for k in range(3):
        instruction = joined(batch, k, 0, BEGIN, instruction=True)
        instruction = instruction[: 1 + int(batch.instruction_mask_KI[k].sum())]
        for n in range(3):
            with torch.no_grad():  # the bare model, and none of our code
                cache = stock(instruction[None], past_key_values=DynamicCache()).past_key_values
            target = batch.target_ids_KNT[k, n][valid[k, n]]
            row = torch.cat([joined(batch, k, n, None, instruction=False), target[:-1]])
            start = len(instruction)
            seen = torch.ones(len(row), start + len(row), dtype=torch.bool).tril(start)
            with one_by_one.bound(bank.take(torch.tensor([k]))):
                states = one_by_one.model.base_model(
                    input_ids=row[None],
                    position_ids=torch.arange(start, start + len(row))[None],
                    attention_mask=seen[None, None],
                    past_key_values=cache,
                    use_cache=True,
                ).last_hidden_state
                expected = one_by_one.model.lm_head(states[0, -len(target) :])
                expected.logsumexp(-1).sum().backward()
            torch.testing.assert_close(
                logits[k, n, : len(target)], expected, atol=1e-10, rtol=1e-10
            )
    for ours, factor in zip(found, factors(bank), strict=True):
        assert ours.abs().max() > 1e-3
        torch.testing.assert_close(ours, factor.grad, atol=1e-9, rtol=1e-8)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_task_has_its_own_update(family):
    backbone, batch = random_decoder(family), random_batch(tasks=2)
    bank = bank_of(backbone, 2)
    with backbone.bound(bank):
        logits = backbone.logits(*texts(batch))
    for k in range(2):
        stock = random_causal_lm(family)
        stock.set_attn_implementation("sdpa")
        merged(stock, family, bank, k)
        target = batch.target_ids_KNT[k, 0][batch.target_ids_KNT[k, 0] != -100]
        expected = plain_logits(stock, joined(batch, k, 0, BEGIN, instruction=False), target)
        torch.testing.assert_close(logits[k, 0, : len(target)], expected, atol=1e-9, rtol=1e-9)


def padded(values: Tensor, more: int, fill: int) -> Tensor:
    return torch.cat([values, values.new_full((*values.shape[:-1], more), fill)], -1)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_and_the_other_tasks_and_rows_change_nothing(family, fused):
    backbone, batch = random_decoder(family), random_batch(tasks=3)
    bank = bank_of(backbone, 3)
    wide = replace(
        batch,
        # What stands under padding is no token of any text.
        instruction_ids_KI=padded(batch.instruction_ids_KI, 4, 7),
        instruction_mask_KI=padded(batch.instruction_mask_KI, 4, 0),
        input_ids_KNS=padded(batch.input_ids_KNS, 3, 9),
        input_mask_KNS=padded(batch.input_mask_KNS, 3, 0),
        target_ids_KNT=padded(batch.target_ids_KNT, 2, -100),
    )

    def outcome(of: Batch, bank: LoraBank) -> tuple[Tensor, Tensor]:
        instruction = prefix_of(backbone, of) if fused else None
        with torch.no_grad(), backbone.bound(bank, instruction):
            return backbone.logits(*texts(of)), backbone.decode_greedy(*texts(of)[:2], 6)

    valid = batch.target_ids_KNT != -100
    logits, decoded = outcome(batch, bank)
    wider, decoded_wide = outcome(wide, bank)
    close = {"atol": 1e-10, "rtol": 1e-10}
    torch.testing.assert_close(wider[:, :, : logits.shape[2]][valid], logits[valid], **close)
    assert torch.equal(decoded, decoded_wide)
    for k in range(3):
        alone = replace(
            batch,
            instruction_ids_KI=batch.instruction_ids_KI[k : k + 1],
            instruction_mask_KI=batch.instruction_mask_KI[k : k + 1],
            input_ids_KNS=batch.input_ids_KNS[k : k + 1, 1:2],
            input_mask_KNS=batch.input_mask_KNS[k : k + 1, 1:2],
            target_ids_KNT=batch.target_ids_KNT[k : k + 1, 1:2],
        )
        one, decoded_one = outcome(alone, bank.take(torch.tensor([k])))
        torch.testing.assert_close(one[0, 0][valid[k, 1]], logits[k, 1][valid[k, 1]], **close)
        row = decoded[k, 1, : decoded_one.shape[-1]]
        assert torch.equal(decoded_one[0, 0], row)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_decoding_is_the_argmax_of_the_logits_with_and_without_checkpointing(family, fused):
    backbone, batch = random_decoder(family), random_batch()
    with backbone.bound(bank_of(backbone, 2), prefix_of(backbone, batch) if fused else None):
        decoded = backbone.decode_greedy(*texts(batch)[:2], 8)
        backbone.checkpoint_activations()
        assert torch.equal(backbone.decode_greedy(*texts(batch)[:2], 8), decoded)
        assert all(block.training for block in backbone.blocks)
        best = backbone.logits(*texts(batch)[:2], decoded).argmax(-1)
    ends = (decoded == END).cumsum(-1)
    written = (ends == 0) | ((ends == 1) & (decoded == END))
    assert torch.equal(best[written], decoded[written])
    assert (decoded[~written] == PAD).all()
    assert len(decoded[written].unique()) > 4


def test_decoding_ends_when_every_row_has_ended():
    backbone, batch = random_decoder("llama"), random_batch()
    first = backbone.decode_greedy(*texts(batch)[:2], 1)
    backbone.model.config.eos_token_id = int(first[0, 0, 0])
    decoded = backbone.decode_greedy(*texts(batch)[:2], 5)
    assert decoded[0, 0].tolist() == [int(first[0, 0, 0]), *[PAD] * (decoded.shape[-1] - 1)]
    one = (part[:1, :1] for part in texts(batch)[:2])
    assert backbone.decode_greedy(*one, 5).tolist() == [[[int(first[0, 0, 0])]]]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_with_and_without_activation_checkpointing_agree(family, fused):
    def gradients(checkpointing: bool) -> list[Tensor]:
        backbone = random_decoder(family, checkpointing=checkpointing)
        batch, bank = random_batch(), bank_of(backbone, 2, requires_grad=True)
        with backbone.bound(bank, prefix_of(backbone, batch) if fused else None):
            backbone.logits(*texts(batch)).square().mean().backward()
        return [factor.grad for factor in factors(bank)]

    for plain, recomputed in zip(gradients(False), gradients(True), strict=True):
        assert plain.abs().max() > 0
        torch.testing.assert_close(plain, recomputed, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_prefix_that_is_gone_at_the_backward_gives_its_gradients_or_an_error(checkpointing):
    """Attention recomputes from what it was given; a block that recomputes looks for the bound one."""
    backbone, batch = random_decoder("llama", checkpointing=checkpointing), random_batch()
    bank, prefix = bank_of(backbone, 2, requires_grad=True), prefix_of(backbone, batch)
    with backbone.bound(bank, prefix):
        loss = backbone.logits(*texts(batch)).square().mean()
    with (
        pytest.raises(RuntimeError, match="awaits its backward"),
        backbone.bound(bank_of(backbone, 2)),
    ):
        pass
    if checkpointing:
        with pytest.raises(torch.utils.checkpoint.CheckpointError):
            loss.backward()
        return
    late = torch.autograd.grad(loss, factors(bank))
    with backbone.bound(bank, prefix):
        loss = backbone.logits(*texts(batch)).square().mean()
        expected = torch.autograd.grad(loss, factors(bank))
    assert all(torch.equal(one, other) for one, other in zip(late, expected, strict=True))


def test_instructions_are_not_read_while_something_is_bound():
    backbone, batch = random_decoder("llama"), random_batch()
    instruction = prefix_of(backbone, batch)
    with (
        backbone.bound(None, instruction),
        pytest.raises(RuntimeError, match="encoded without a bank"),
    ):
        prefix_of(backbone, batch)


def kept_for_backward(instances: int, tokens: int) -> int:
    """Bytes that live between forward and backward besides the weights, with a prefix of I tokens."""
    with META:
        backbone = random_decoder("llama", torch.float32).to(META)
        bank = bank_of(backbone, 2, requires_grad=True).map(
            lambda factor: torch.empty(factor.shape, device=META).requires_grad_()
        )
        ids = torch.empty(2, instances, 16, dtype=torch.long, device=META)
        prefix = tuple(
            (torch.empty(2, 2, tokens, 12, device=META), torch.empty(2, 2, tokens, 12, device=META))
            for _ in range(2)
        )
        mask = torch.empty(2, tokens, dtype=torch.bool, device=META)
    known = [*factors(bank), ids, mask, *(one for layer in prefix for one in layer)]
    live = _LiveStorages([*backbone.parameters(), *backbone.buffers(), *known])
    with live, backbone.bound(bank, FusedInstruction(mask, prefix=prefix)):
        logits = backbone.logits(ids, torch.empty_like(ids, dtype=torch.bool), ids)
        kept = live.live
        logits.sum().backward()
    return kept


def test_what_is_kept_for_the_backward_has_no_prefix_for_each_row():
    for instances in (1, 8):
        few, many = kept_for_backward(instances, 8), kept_for_backward(instances, 512)
        # Besides the prefix itself, which is not counted here.
        assert many == few
    assert kept_for_backward(8, 8) > 4 * kept_for_backward(1, 8)


def test_a_row_without_tokens_is_finite_and_leaves_the_others_alone():
    backbone, batch = random_decoder("llama", begin=None), random_batch()
    empty = replace(batch, input_mask_KNS=batch.input_mask_KNS.clone())
    empty.input_mask_KNS[0, 0] = False
    for fused in (None, prefix_of(backbone, batch)):
        with backbone.bound(None, fused), torch.no_grad():
            before, after = backbone.logits(*texts(batch)), backbone.logits(*texts(empty))
            assert backbone.decode_greedy(*texts(empty)[:2], 3).shape[:2] == (2, 3)
        assert after.isfinite().all()
        torch.testing.assert_close(before[1], after[1])
        torch.testing.assert_close(before[0, 1:], after[0, 1:])


@pytest.mark.parametrize("family", FAMILIES)
def test_in_bfloat16_the_prefix_is_near_what_it_is_in_float64(family):
    batch, backbone = random_batch(), random_decoder(family)
    half = random_decoder(family).to(torch.bfloat16)
    valid, logits = batch.target_ids_KNT != -100, []
    for one in (backbone, half):
        with torch.no_grad(), one.bound(bank_of(one, 2), prefix_of(one, batch)):
            logits.append(one.logits(*texts(batch))[valid].double())
    assert (logits[0] - logits[1]).abs().mean() < 0.1 * logits[0].std()


@pytest.mark.skipif(not STORIES.exists(), reason="the stories model is not at ../shared")
@pytest.mark.parametrize("fused", [True, False])
def test_a_pretrained_model_with_its_own_tokenizer(tmp_path, fused):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    settings = BackboneSettings(path=str(STORIES))
    prepare_tokenizer(settings, tmp_path, tmp_path / "tokenizer", causal=True)
    tokenizer = TextTokenizer(tmp_path / "tokenizer")
    heavy, stock = (
        AutoTokenizer.from_pretrained(STORIES),
        AutoModelForCausalLM.from_pretrained(STORIES),
    )
    backbone = load_backbone(
        settings, LoraSettings(targets=("q_proj", "v_proj")), tmp_path / "tokenizer"
    )
    assert (tokenizer.begin_id, tokenizer.eos_id) == (1, 2)
    assert not tokenizer.ends_texts
    instruction, text = (
        ("Tell a story.", " Once upon a time") if fused else ("", "Once upon a time")
    )
    ids = [tokenizer.encode_batch([part], 99, end=False)[0] for part in (instruction, text)]
    assert heavy(text)["input_ids"] == [1, *ids[1]] if not fused else True
    row = torch.tensor([1, *(ids[0] if fused else []), *ids[1]])
    with torch.no_grad():
        expected = stock.generate(row[None], max_new_tokens=24, do_sample=False)[0, len(row) :]
        read = torch.tensor([ids[0]])
        encoded = backbone.encode(read, torch.ones_like(read, dtype=torch.bool))
        prefix = FusedInstruction(encoded.mask_KI, prefix=encoded.prefix) if fused else None
        given = torch.tensor([[ids[1]]])
        with backbone.bound(None, prefix) if fused else nullcontext():
            found = backbone.decode_greedy(given, torch.ones_like(given, dtype=torch.bool), 24)
    assert found[0, 0].tolist() == expected.tolist()
    if not fused:
        assert "there was" in tokenizer.decode_batch([found[0, 0].tolist()])[0]
