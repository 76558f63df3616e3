"""Virtual tokens: what they are to stock models, what is trained, and that nothing else changes."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from transformers import AutoConfig, AutoModelForSeq2SeqLM
from transformers.cache_utils import DynamicCache

from tagi_ray import objectives, recipes
from tagi_ray.backbone import Backbone
from tagi_ray.batches import Batch
from tagi_ray.config import Experiment
from tagi_ray.encoder_decoder import EncoderDecoder
from tagi_ray.errors import ConfigError
from tagi_ray.evaluate import Scorer
from tagi_ray.families import check_backbone, wrapped
from tagi_ray.instruction import VirtualTokens
from tagi_ray.model import TagiModel, assemble, build_model
from tagi_ray.plan import plan
from tagi_ray.shards import read_tasks_of
from tagi_ray.systems import instruction_sources, plan_of
from tagi_ray.vocabulary import TextTokenizer
from tests.decoders import BEGIN, FAMILIES, random_causal_lm, random_decoder
from tests.models import random_backbone, random_batch, random_t5
from tests.tiny_run import tiny_experiment, tiny_run

TOKENS = 3
NAME = "hypernetwork.prefix_L2HIE"
PREFIX: dict[str, Any] = {
    "hypernetwork": {"generator": "prefix", "capacity": TOKENS},
    "fusion": {"kind": "none"},
    "distillation": {"student_prompt": "full", "lambda_kl": 0},
}
EXPERIMENT = Experiment.model_validate({"name": "tiny", **PREFIX})

each_family = pytest.mark.parametrize("family", ["t5", *FAMILIES])


def backbone_of(family: Any, checkpointing: bool = False) -> Backbone:
    if family == "t5":
        return random_backbone(checkpointing=checkpointing).double()
    return random_decoder(family, checkpointing=checkpointing)


def model_of(family: Any, checkpointing: bool = False) -> TagiModel:
    """A float64 model whose virtual tokens matter."""
    model = assemble(EXPERIMENT, backbone_of(family, checkpointing), "hypernetwork", 0).double()
    torch.manual_seed(3)
    torch.nn.init.normal_(model.get_parameter(NAME))
    return model


def bound(model: TagiModel, batch: Batch) -> Any:
    encoded = model.encode_instruction(batch.instruction_ids_KI, batch.instruction_mask_KI)
    return model.backbone.bound(model.generate_bank(encoded), model.fused(encoded))


def prompts(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    return batch.prompt_ids_KNS, batch.prompt_mask_KNS, batch.target_ids_KNT


def expected_of_t5(stock: Any, prefix: Tensor, read: Tensor, target: Tensor) -> Tensor:
    """Logits [T, V] by the stock model's layers, the encoder's attention written out."""
    encoder, tokens = stock.encoder, prefix.shape[3]
    states = stock.shared(read)[None]
    whole = tokens + len(read)
    bias = encoder.block[0].layer[0].SelfAttention.compute_bias(whole, whole)[0, :, tokens:]
    for layer, block in zip(prefix, encoder.block, strict=True):
        attention = block.layer[0].SelfAttention
        x = block.layer[0].layer_norm(states)[0]
        q, k, v = (
            project(x).unflatten(1, (attention.n_heads, -1)).transpose(0, 1)
            for project in (attention.q, attention.k, attention.v)
        )
        k, v = torch.cat([layer[0], k], 1), torch.cat([layer[1], v], 1)
        weights = (q @ k.transpose(1, 2) + bias).softmax(-1)
        states = states + attention.o((weights @ v).transpose(0, 1).flatten(1))[None]
        states = block.layer[1](states)
    memory = encoder.final_layer_norm(states)
    return stock(encoder_outputs=(memory,), labels=target[None]).logits[0]


def expected_of_decoder(stock: Any, prefix: Tensor, read: Tensor, target: Tensor) -> Tensor:
    """Logits [T, V] of the stock model with a cache that begins with the virtual tokens."""
    cache = DynamicCache()
    for number, (keys, values) in enumerate(prefix):
        cache.update(keys[None], values[None], number)
    row = torch.cat([torch.tensor([BEGIN]), read, target])
    logits = stock(row[None], past_key_values=cache).logits[0]
    return logits[len(read) : len(read) + len(target)]


def expected(family: Any, prefix: Tensor, batch: Batch, k: int, n: int) -> Tensor:
    read = batch.prompt_ids_KNS[k, n][batch.prompt_mask_KNS[k, n]]
    target = batch.target_ids_KNT[k, n][batch.target_ids_KNT[k, n] != -100]
    if family == "t5":
        return expected_of_t5(random_t5().double().eval(), prefix, read, target)
    return expected_of_decoder(random_causal_lm(family), prefix, read, target)


@pytest.mark.parametrize("checkpointing", [False, True])
@each_family
def test_logits_and_gradients_are_those_of_keys_and_values_before_each_text(family, checkpointing):
    model, batch = model_of(family, checkpointing), random_batch(tasks=3)
    prefix = model.get_parameter(NAME)
    other = prefix.detach().clone().requires_grad_()
    valid, total = batch.target_ids_KNT != -100, torch.zeros((), dtype=torch.float64)
    with bound(model, batch):
        logits = model.backbone.logits(*prompts(batch))
        (logits.logsumexp(-1) * valid).sum().backward()
    for k in range(3):
        for n in range(3):
            alone = expected(family, other, batch, k, n)
            torch.testing.assert_close(logits[k, n, : len(alone)], alone, atol=1e-6, rtol=1e-6)
            total = total + alone.logsumexp(-1).sum()
    total.backward()
    assert prefix.grad is not None
    assert other.grad is not None
    assert (other.grad.abs().flatten(3).amax(3) > 1e-4).all(), "each layer's keys and values learn"
    torch.testing.assert_close(prefix.grad, other.grad, atol=1e-6, rtol=1e-6)


@each_family
def test_a_row_depends_neither_on_the_batch_nor_on_its_padding(family):
    model, batch = model_of(family), random_batch(tasks=3)
    with torch.no_grad():
        with bound(model, batch):
            together = model.backbone.logits(*prompts(batch))
        for k in range(3):
            part = batch.prompt_ids_KNS[k : k + 1, :1], batch.prompt_mask_KNS[k : k + 1, :1]
            length = int(part[1].sum())
            ids, mask = (one[..., :length] for one in part)
            instruction = batch.instruction_ids_KI[k : k + 1], batch.instruction_mask_KI[k : k + 1]
            with model.backbone.bound(model.generate_bank(model.encode_instruction(*instruction))):
                alone = model.backbone.logits(ids, mask, batch.target_ids_KNT[k : k + 1, :1])
            taught = int((batch.target_ids_KNT[k, 0] != -100).sum())
            torch.testing.assert_close(
                together[k, 0, :taught], alone[0, 0, :taught], atol=1e-6, rtol=1e-6
            )


@each_family
def test_what_is_decoded_is_what_the_logits_find_likeliest(family):
    model, batch = model_of(family), random_batch()
    prefix = model.get_parameter(NAME).detach()
    with torch.no_grad(), bound(model, batch):
        decoded = model.backbone.decode_greedy(batch.prompt_ids_KNS, batch.prompt_mask_KNS, 4)
    written = torch.zeros(2, 3, 0, dtype=torch.long)
    for _ in range(decoded.shape[2]):
        guess = torch.cat([written, torch.full((2, 3, 1), 5)], 2)
        step = replace(batch, target_ids_KNT=guess)
        logits = [[expected(family, prefix, step, k, n)[-1] for n in range(3)] for k in range(2)]
        best = torch.stack([torch.stack(row) for row in logits]).argmax(-1, keepdim=True)
        written = torch.cat([written, best], 2)
    ended = (written == 1).cumsum(2) - (written == 1).long() > 0
    assert torch.equal(decoded, written.masked_fill(ended, 0))


@each_family
def test_the_backbone_stays_as_it_is_and_virtual_tokens_alone_are_trained(family):
    model, batch = model_of(family), random_batch()
    stock = random_t5() if family == "t5" else random_causal_lm(family)
    assert list(model.backbone.model.state_dict()) == list(stock.state_dict())
    assert list(model.trainable()) == [NAME]
    bare = model.backbone.logits(*prompts(batch))
    objective = objectives.finetune(EXPERIMENT.distillation, None, "full")
    totals = objective.denominators(batch)
    optimizer = torch.optim.SGD(model.trainable().values(), lr=0.5)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        with ExitStack() as scope:
            parts = objective.loss(model, batch, totals, scope)
            parts.loss.backward()
        losses.append(parts.loss.item())
        optimizer.step()
    assert set(parts.parts) == {"cross_entropy"}
    assert losses[-1] < losses[0]
    assert all(p.grad is None for p in model.backbone.parameters())
    assert torch.equal(model.backbone.logits(*prompts(batch)), bare)


@each_family
def test_all_tasks_have_the_same_tokens_whatever_their_instructions(family):
    model, batch = model_of(family), random_batch(tasks=3)
    tokens = model.generate_bank(
        model.encode_instruction(batch.instruction_ids_KI, batch.instruction_mask_KI)
    )
    assert isinstance(tokens, VirtualTokens)
    for layer, pair in enumerate(tokens.prefix):
        for side, made in enumerate(pair):
            assert made.stride(0) == 0, "repeated without a copy"
            whole = model.get_parameter(NAME)[layer, side].expand(3, -1, -1, -1)
            assert torch.equal(made, whole)


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_float32_tokens_serve_a_bfloat16_backbone(family):
    model, exact, batch = model_of(family).float(), model_of(family), random_batch()
    model.backbone.to(torch.bfloat16)
    with bound(model, batch):
        logits = model.backbone.logits(*prompts(batch))
        logits.float().logsumexp(-1).sum().backward()
    assert logits.dtype == torch.bfloat16
    gradient = model.get_parameter(NAME).grad
    assert gradient is not None
    assert gradient.dtype == torch.float32
    assert gradient.isfinite().all()
    with bound(exact, batch):
        expected = exact.backbone.logits(*prompts(batch))
    assert (logits - expected).norm() < 0.06 * expected.norm()


def test_initial_values_are_of_the_seed():
    first, again, other = (
        assemble(EXPERIMENT, random_backbone(), "hypernetwork", seed).get_parameter(NAME)
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.unique().numel() == first.numel(), "equal tokens would stay equal"


@pytest.mark.parametrize("name", ["demo", "demo_decoder"])
def test_the_plan_counts_them(name, tmp_path):
    given = ["variants={prefix_tuning: {}}", "evaluation.systems=[prefix_tuning]",
             "hypernetwork={generator: prefix, capacity: 32}", "fusion={kind: none}"]  # fmt: skip
    experiment = recipes.load(name, given)
    config = AutoConfig.from_pretrained(Path(recipes.__file__).parents[1] / f"{name}_backbone")
    if name == "demo":
        by_hand = config.num_layers * 2 * config.num_heads * 32 * config.d_kv
    else:
        by_hand = config.num_hidden_layers * 2 * config.num_key_value_heads * 32 * config.head_dim
    made = plan(experiment)
    assert made.hypernetwork == made.stage("finetune").trained == by_hand


@pytest.mark.parametrize("kind", ["concat", "cross_attention+concat", "kv_prefix"])
def test_a_fusion_beside_them_is_refused(kind):
    with pytest.raises(ValidationError, match=r"variants\.tagi: .*=prefix and fusion\.kind="):
        Experiment.model_validate({"name": "x", **PREFIX, "fusion": {"kind": kind}})


def test_positions_that_they_take_are_counted():
    gpt2 = ["backbone.path=random", "backbone.tokenizer=demo", "lora.targets=[c_attn]",
            "backbone.architecture={family: gpt2, d_model: 64, d_kv: 16, heads: 4}",
            "fusion={kind: none}", "data.max_prompt_tokens=1024",
            "hypernetwork={generator: prefix, capacity: 32}"]  # fmt: skip
    check_backbone(recipes.load("demo", [*gpt2, "data.max_target_tokens=991"]))
    with pytest.raises(ConfigError, match=r"can have 2049: .* hypernetwork\.capacity of a prefix"):
        check_backbone(recipes.load("demo", [*gpt2, "data.max_target_tokens=992"]))


def test_an_encoder_that_would_not_see_them_is_refused():
    config = AutoConfig.for_model(
        "longt5", vocab_size=96, d_model=16, d_kv=8, d_ff=16, num_heads=2, num_layers=1
    )
    backbone = wrapped(AutoModelForSeq2SeqLM.from_config(config), ("q",), "owner/long")
    assert isinstance(backbone, EncoderDecoder)
    with pytest.raises(ConfigError, match=r"generator=prefix is not for the backbone owner/long"):
        assemble(EXPERIMENT, backbone, "hypernetwork", 0)


def test_a_variant_is_scored_with_them_and_its_control_is_the_backbone_on_the_prompt(tmp_path):
    """Also: the tasks that answer together change no answer."""
    values = tiny_experiment(tmp_path).model_dump(mode="json")
    values["variants"] = {"tagi": {}, "prefix_tuning": {**PREFIX}}
    values["evaluation"] = {"systems": ["prefix_tuning"], "instances_per_batch": 3}
    experiment = Experiment.model_validate(values)
    run = tiny_run(experiment)
    varied = experiment.varied("prefix_tuning")
    model = build_model(varied, run / "tokenizer", "hypernetwork", 0)
    for name, parameter in model.backbone.named_parameters():
        if "Attention" in name:
            torch.nn.init.normal_(parameter, std=0.6)  # so that what it reads matters
    torch.nn.init.normal_(model.get_parameter(NAME), std=8)
    tasks = list(read_tasks_of(run / "shards", "test"))[:3]
    tokenizer = TextTokenizer(run / "tokenizer")

    def answers(system: str, at_once: int) -> list[str]:
        plan = plan_of(system, experiment)
        evaluation = varied.evaluation.model_copy(update={"tasks_per_batch": at_once})
        settings = varied.model_copy(update={"evaluation": evaluation})
        sources = instruction_sources([task.task for task in tasks], plan.instruction)
        predicted = Scorer(model, tokenizer, settings, run).predict(plan, tasks, sources)
        return [one.prediction for one in predicted]

    found = answers("prefix_tuning", 3)
    assert found == answers("prefix_tuning", 1) == answers("prefix_tuning_no_fusion", 2)
    without = answers("prefix_tuning_no_bank", 2)
    bare = replace(plan_of("base", experiment), prompt="full")
    sources = instruction_sources([task.task for task in tasks], "own")
    scored = Scorer(model, tokenizer, varied, run).predict(bare, tasks, sources)
    assert without == [one.prediction for one in scored] != found


def test_a_run_of_them_alone_exports_nothing(tmp_path, monkeypatch):
    from tagi_ray import pipeline

    experiment = Experiment.model_validate({"name": "tiny", **PREFIX})
    assert not pipeline._writable(experiment)
    assert pipeline._writable(Experiment(name="tiny"))
    monkeypatch.setattr(pipeline, "open_run", lambda *_, **__: (experiment, tmp_path))
    monkeypatch.setattr(pipeline, "trained_weights", lambda *_: tmp_path)
    with pytest.raises(ConfigError, match=r"generator=prefix: the run 'tiny' makes no adapters"):
        pipeline.generate(experiment, "Reverse the words.")
    assert list(tmp_path.iterdir()) == []
