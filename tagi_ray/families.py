"""Load the backbone that the settings name, whatever its family."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tagi_ray.architecture import (
    FAMILIES,
    family_of,
    position_limit,
    pretrained_model,
    random_model,
)
from tagi_ray.backbone import Backbone
from tagi_ray.config import Experiment
from tagi_ray.decoder_only import DecoderOnly
from tagi_ray.encoder_decoder import EncoderDecoder
from tagi_ray.errors import ConfigError
from tagi_ray.sections import BackboneSettings, Family, LoraSettings
from tagi_ray.vocabulary import TextTokenizer

_ROTARY = (
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head",
)  # fmt: skip
LINEARS: Mapping[Family, tuple[str, ...]] = {
    "t5": ("q", "k", "v", "o", "wi", "wi_0", "wi_1", "wo", "lm_head"),
    "llama": _ROTARY,
    "mistral": _ROTARY,
    "qwen2": _ROTARY,
    "qwen3": _ROTARY,
    "gpt2": ("c_attn", "c_proj", "c_fc"),
}
"""What lora.targets can name."""


def check_backbone(experiment: Experiment, files: bool = True) -> None:
    """Raise ConfigError for settings that the backbone's family does not fit.

    files: whether its configuration is there, which alone tells how long a sequence can be.
    """
    settings, targets = experiment.backbone, experiment.lora.targets
    family = family_of(settings)
    kinds = {"fusion.kind": experiment.fusion.kind}
    kinds |= {
        f"variants.{name}.fusion.kind": experiment.varied(name).fusion.kind
        for name, variant in experiment.variants.items()
        if "kind" in variant.fusion
    }
    fusions = class_of(family).fusions
    problems = [
        f"{field}={kind} is not for the backbone {settings.path} of the family {family}: choose"
        f" one of {', '.join(fusions)}"
        for field, kind in kinds.items()
        if kind not in fusions
    ]
    if missing := sorted(set(targets) - set(LINEARS[family])):
        problems.append(
            f"lora.targets: the backbone {settings.path} of the family {family} has no linear"
            f" named {', '.join(missing)}: choose of {', '.join(LINEARS[family])}"
        )
    data, limit = experiment.data, position_limit(settings) if files else None
    student = data.max_input_tokens
    if "kv_prefix" in kinds.values():
        student += data.max_instruction_tokens
    longest = 1 + max(student, data.max_prompt_tokens) + data.max_target_tokens
    if experiment.pretrain.enabled:
        longest = max(longest, 3 + experiment.pretrain.max_tokens)
    networks = [experiment.varied(name).hypernetwork for name in experiment.variants]
    longest += max((one.capacity for one in networks if one.generator == "prefix"), default=0)
    if limit is not None and longest > limit:
        problems.append(
            f"the backbone {settings.path} reads at most {limit} tokens, and instruction, input and"
            f" target can have {longest}: lower data.max_instruction_tokens, data.max_input_tokens,"
            " data.max_prompt_tokens, data.max_target_tokens, pretrain.max_tokens, or the"
            " hypernetwork.capacity of a prefix"
        )
    if problems:
        raise ConfigError(problems)


def load_backbone(
    settings: BackboneSettings, lora: LoraSettings, tokenizer_folder: Path, seed: int = 0
) -> Backbone:
    """Load the backbone and give its target linears their sites.

    Raises ConfigError for a path that is no model of a known family, or a tokenizer with more
    entries than the model has embeddings.
    """
    tokenizer = TextTokenizer(tokenizer_folder)
    model = (
        random_model(settings, tokenizer, seed)
        if settings.path == "random"
        else pretrained_model(settings)
    )
    rows = model.get_input_embeddings().num_embeddings  # sharded weights have no shape
    if tokenizer.size > rows:
        raise ConfigError([
            f"backbone.tokenizer has {tokenizer.size} entries, the backbone {settings.path}"
            f" embeds {rows}: use the backbone's own tokenizer"
        ])  # fmt: skip
    backbone = wrapped(model, lora.targets, settings.path, tokenizer)
    if settings.activation_checkpointing:
        backbone.checkpoint_activations()
    return backbone


def wrapped(
    model: Any, targets: tuple[str, ...], identity: str, tokenizer: TextTokenizer | None = None
) -> Backbone:
    """Return a model of a known family behind the interface of a backbone.

    tokenizer: of the run. A decoder-only model takes its special tokens, for they are what the
    texts are made of, whatever else the model's files name.
    """
    family, config = FAMILIES[model.config.model_type], model.config
    if tokenizer is not None and family != "t5":
        config.bos_token_id, config.eos_token_id = tokenizer.begin_id, tokenizer.eos_id
        config.pad_token_id = tokenizer.pad_id
    return class_of(family)(model, targets, identity)


def class_of(family: Family) -> type[Backbone]:
    """Return what a family's models stand behind."""
    return EncoderDecoder if family == "t5" else DecoderOnly
