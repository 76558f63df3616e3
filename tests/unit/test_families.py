"""What a family of models fits, known before anything is started; and models of given shapes."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tagi_ray import recipes
from tagi_ray.architecture import (
    FAMILIES,
    backbone_config,
    family_of,
    identify,
    model_config,
    pretrained_model,
)
from tagi_ray.decoder_only import DecoderOnly
from tagi_ray.encoder_decoder import EncoderDecoder
from tagi_ray.errors import ConfigError
from tagi_ray.families import LINEARS, check_backbone, load_backbone, wrapped
from tagi_ray.pipeline import open_run
from tagi_ray.sections import ArchitectureSettings, BackboneSettings, LoraSettings
from tagi_ray.vocabulary import TextTokenizer, prepare_tokenizer
from tests.decoders import FAMILIES as DECODERS
from tests.decoders import random_causal_lm, targets_of

LLAMA = ("backbone.path=random", "backbone.architecture.family=llama", "lora.targets=[q_proj]",
         "backbone.tokenizer=demo", "fusion.kind=kv_prefix")  # fmt: skip


def problems(*overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        check_backbone(recipes.load("demo", list(overrides)))
    return caught.value.problems


def test_a_fusion_that_the_family_lacks_is_refused_with_those_it_has():
    check_backbone(recipes.load("demo"))
    check_backbone(recipes.load("demo", list(LLAMA)))
    (found,) = problems("fusion.kind=kv_prefix")
    assert found.startswith("fusion.kind=kv_prefix is not for the backbone demo of the family t5")
    assert found.endswith("one of none, concat, cross_attention, cross_attention+concat")
    (found,) = problems(*LLAMA, "fusion.kind=concat")
    assert found.endswith("choose one of none, kv_prefix")
    (found,) = problems(*LLAMA, "variants={tagi: {}, plain: {fusion: {kind: concat}}}")
    assert found.startswith("variants.plain.fusion.kind=concat is not for the backbone random")


def test_a_target_that_the_family_lacks_is_refused_with_those_it_has():
    (found,) = problems(*LLAMA, "lora.targets=[q, v_proj]")
    assert found.startswith("lora.targets: the backbone random of the family llama has no linear")
    assert "named q: choose of q_proj, k_proj" in found


@pytest.mark.parametrize("family", DECODERS)
def test_every_linear_of_a_family_can_be_a_target(family):
    targets = tuple(t for t in LINEARS[family] if t != "lm_head")
    sites = wrapped(random_causal_lm(family), targets, "random").sites
    assert {site.module for site in sites} == set(targets)


def test_texts_longer_than_learned_positions_or_a_window_are_refused(tmp_path):
    gpt2 = ["backbone.path=random", "backbone.tokenizer=demo", "lora.targets=[c_attn]",
            "backbone.architecture={family: gpt2, d_model: 64, d_kv: 16, heads: 4}",
            "fusion.kind=none", "data.max_prompt_tokens=1024"]  # fmt: skip
    check_backbone(recipes.load("demo", [*gpt2, "data.max_target_tokens=1023"]))
    (found,) = problems(*gpt2, "data.max_target_tokens=1024")
    assert "reads at most 2048 tokens, and instruction, input and target can have 2049" in found
    config = AutoConfig.for_model("mistral", sliding_window=1000).to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config))
    mistral = [f"backbone.path={tmp_path}", "lora.targets=[q_proj]", "fusion.kind=kv_prefix",
               "data.max_instruction_tokens=900", "data.max_input_tokens=90",
               "data.max_target_tokens=10"]  # fmt: skip
    (found,) = problems(*mistral)
    assert "reads at most 1000 tokens, and instruction, input and target can have 1001" in found
    check_backbone(recipes.load("demo", [*mistral, "data.max_target_tokens=9"]))


def test_a_run_that_cannot_be_is_not_begun(tmp_path):
    with pytest.raises(ConfigError, match=r"fusion\.kind=kv_prefix is not for the backbone demo"):
        open_run(recipes.load("demo", [f"storage={tmp_path}", "fusion.kind=kv_prefix"]))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("family", DECODERS)
def test_a_random_model_is_drawn_from_its_seed_and_takes_the_runs_special_tokens(family, tmp_path):
    prepare_tokenizer(BackboneSettings(path="demo"), tmp_path, tmp_path, causal=True)
    tokenizer = TextTokenizer(tmp_path)
    shape = ArchitectureSettings(family=family, d_model=32, d_ff=48, d_kv=8, heads=4)
    settings = BackboneSettings(path="random", architecture=shape)
    lora = LoraSettings(targets=targets_of(family))
    first, again, other = (load_backbone(settings, lora, tmp_path, s) for s in (0, 0, 1))
    states = [one.model.state_dict() for one in (first, again, other)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(*(s[next(iter(s))] for s in (states[0], states[2])))
    assert isinstance(first, DecoderOnly)
    config = first.model.config
    assert (config.eos_token_id, config.pad_token_id) == (tokenizer.eos_id, tokenizer.pad_id)
    assert config.bos_token_id is None
    # An embedding at which training stands still would be that of the padding token.
    assert first.model.get_input_embeddings().padding_idx is None


@pytest.mark.parametrize("family", DECODERS)
def test_a_saved_model_is_loaded_with_its_own_architecture_only(family, tmp_path):
    random_causal_lm(family, torch.float32).save_pretrained(tmp_path)
    settings = BackboneSettings(path=str(tmp_path))
    assert family_of(settings) == family
    assert identify(settings)["weights"].startswith("sha256:")
    loaded, made = pretrained_model(settings).state_dict(), random_causal_lm(family, torch.float32)
    assert all(torch.equal(loaded[name], value) for name, value in made.state_dict().items())
    gpt2 = family == "gpt2"
    right = {"family": family, "d_model": 32, "d_ff": 48, "d_kv": 8 if gpt2 else 12, "heads": 4,
             "kv_heads": None if gpt2 else 2, "layers": 2, "vocabulary": 96}  # fmt: skip
    identify(BackboneSettings(path=str(tmp_path), architecture=ArchitectureSettings(**right)))
    wrong = {"layers": 3, **({} if gpt2 else {"kv_heads": None})}
    shape = ArchitectureSettings(**right | wrong)
    with pytest.raises(ConfigError) as caught:
        identify(BackboneSettings(path=str(tmp_path), architecture=shape))
    told = {problem.split(" ")[0] for problem in caught.value.problems}
    assert told == {
        "backbone.architecture.layers=3",
        *([] if gpt2 else ["backbone.architecture.kv_heads=4"]),
    }


def test_a_model_of_no_known_family_is_refused_with_those_there_are(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ConfigError, match=r"is a model of type bert: name one of type t5, .*gpt2"):
        identify(BackboneSettings(path=str(tmp_path)))


@pytest.mark.parametrize("family", set(FAMILIES.values()))
def test_a_shape_becomes_the_same_parameters_planned_and_made(family):
    shape = ArchitectureSettings(
        family=family, d_model=32, d_ff=48, d_kv=8, heads=4, vocabulary=96, tied_embeddings=False
    )
    config, tied = backbone_config(BackboneSettings(path="random", architecture=shape))
    assert not tied
    assert config.to_dict() == model_config(shape, 96).to_dict()
    if family != "t5":
        model = AutoModelForCausalLM.from_config(config)
        assert model.lm_head.weight is not model.get_input_embeddings().weight
        assert isinstance(wrapped(model, targets_of(family), "random"), DecoderOnly)
    else:
        assert EncoderDecoder.task_type == "SEQ_2_SEQ_LM"
