"""The model of a backbone: from files, from a seed, or only its shape."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from tagi_ray.errors import ConfigError
from tagi_ray.hub import is_on_hub, model_folder
from tagi_ray.sections import ArchitectureSettings, BackboneSettings, Family
from tagi_ray.vocabulary import TextTokenizer

SHIPPED: Mapping[str, Path] = {
    name: Path(__file__).parent / f"{name}_backbone" for name in ("demo", "demo_decoder")
}
"""Backbones of the embedded world, by the path that names them in settings."""
FAMILIES: Mapping[str, Family] = {
    "t5": "t5", "mt5": "t5", "umt5": "t5", "longt5": "t5",
    "llama": "llama", "mistral": "mistral", "qwen2": "qwen2", "qwen3": "qwen3", "gpt2": "gpt2",
}  # fmt: skip
"""Family of each model type that the interface of `backbone` fits."""
POSITIONS = 2048
"""Of a random decoder-only model."""


def family_of(settings: BackboneSettings) -> Family:
    """Return the family of a backbone: as the settings give it, or its files.

    Raises ConfigError where neither tells.
    """
    if settings.architecture is not None or settings.path == "random":
        return (settings.architecture or ArchitectureSettings()).family
    return FAMILIES[_pretrained_config(settings).model_type]


def is_causal(settings: BackboneSettings) -> bool:
    """Say whether a backbone is decoder-only, so that texts go on where another ended."""
    return family_of(settings) != "t5"


def identify(settings: BackboneSettings, noted: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Say which weights the settings name: a hash of local files, or a commit of the hub.

    Returns `weights`, and `files` with size and time of each that was hashed; where these are as
    in `noted`, which an earlier call returned, the files are not read again. Of a hub model nothing
    but small files is fetched; `hub.pinned` gives its settings the commit. Raises ConfigError for
    what is no model of a known family, or has no safetensors weights.
    """
    if settings.path == "random":
        return {"weights": "random"}
    folder = _source(settings, weights=False)
    _pretrained_config(settings)
    if is_on_hub(settings.path):
        return {"weights": f"{settings.path}@{settings.revision or 'main'}"}
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise ConfigError([
            f"backbone.path={settings.path} holds no .safetensors file, and pickles are never"
            " loaded: write it with save_pretrained"
        ])  # fmt: skip
    files = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in paths}
    if noted and noted.get("files") == files:
        return {"weights": noted["weights"], "files": files}
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return {"weights": f"sha256:{digest.hexdigest()}", "files": files}


def _source(settings: BackboneSettings, weights: bool) -> Path:
    if settings.path in SHIPPED:
        return SHIPPED[settings.path]
    return model_folder(settings.path, settings.revision, weights)


def _pretrained_config(settings: BackboneSettings) -> Any:
    from transformers import AutoConfig

    folder = _source(settings, weights=False)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError([f"backbone.path={settings.path} cannot be loaded: {reason}"]) from error
    if config.model_type not in FAMILIES:
        raise ConfigError([
            f"backbone.path={settings.path} is a model of type {config.model_type}: name one of"
            f" type {', '.join(FAMILIES)}"
        ])  # fmt: skip
    if settings.architecture is not None:
        found = _architecture(config)
        problems = [
            f"backbone.architecture.{name}={value} is not what backbone.path={settings.path} has,"
            f" {_given(found)[name]}: correct it, or leave backbone.architecture out"
            for name, value in _given(settings.architecture).items()
            if value != _given(found)[name]
        ]
        if problems:
            raise ConfigError(problems)
    return config


def _given(shape: ArchitectureSettings) -> dict[str, Any]:
    """Return a shape's values by name; without the vocabulary if it is the tokenizer's."""
    values = shape.model_dump(exclude_none=True)
    return {**values, "kv_heads": shape.kv_heads or shape.heads}


def _architecture(config: Any) -> ArchitectureSettings:
    """Return the shape that a model's configuration tells of."""
    family = FAMILIES[config.model_type]
    common: dict[str, Any] = {
        "family": family,
        "d_model": config.hidden_size,
        "heads": config.num_attention_heads,
        "layers": config.num_hidden_layers,
        "vocabulary": config.vocab_size,
        "tied_embeddings": _tied(config),
    }
    if family == "t5":
        gate = "gated-gelu" if config.is_gated_act else "relu"
        return ArchitectureSettings(**common, d_ff=config.d_ff, d_kv=config.d_kv, feed_forward=gate)
    d_kv = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if family == "gpt2":
        return ArchitectureSettings(
            **common, d_kv=d_kv, d_ff=config.n_inner or 4 * config.hidden_size
        )
    return ArchitectureSettings(
        **common, d_kv=d_kv, d_ff=config.intermediate_size, kv_heads=config.num_key_value_heads
    )


def _tied(config: Any) -> bool:
    """Say whether the output layer is the embedding: transformers' own field says so always."""
    return getattr(config, "scale_decoder_outputs", config.tie_word_embeddings)


def pretrained_model(settings: BackboneSettings) -> Any:
    """Return the model in the files that the settings name; raises ConfigError without one."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
    from transformers.utils import logging as transformers_logging

    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()  # in a log its bars are noise
    # A folder, so that nothing is asked of the hub here, a conversion of pickles least of all.
    folder = _source(settings, weights=True)
    config = _pretrained_config(settings)
    seq2seq = FAMILIES[config.model_type] == "t5"
    try:
        return (AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM).from_pretrained(
            folder,
            config=config,
            dtype=getattr(torch, settings.dtype),
            use_safetensors=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError([f"backbone.path={settings.path} cannot be loaded: {reason}"]) from error


def random_model(settings: BackboneSettings, tokenizer: TextTokenizer, seed: int) -> Any:
    """Return a model of the settings' shape, drawn from a seed."""
    shape = settings.architecture or ArchitectureSettings()
    config = model_config(shape, shape.vocabulary or padded(tokenizer.size))
    if shape.family == "t5":
        config.pad_token_id, config.eos_token_id = tokenizer.pad_id, tokenizer.eos_id
        config.decoder_start_token_id = tokenizer.start_id
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return new_model(config, shape.tied_embeddings).to(getattr(torch, settings.dtype))


def padded(tokens: int) -> int:
    """Return the rows of an embedding for a tokenizer of that size."""
    return -(-tokens // 64) * 64


def model_config(shape: ArchitectureSettings, vocabulary: int) -> Any:
    """Return transformers' configuration of a model of a shape."""
    from transformers import AutoConfig

    common: dict[str, Any] = {
        "vocab_size": vocabulary,
        "tie_word_embeddings": shape.tied_embeddings,
    }
    if shape.family == "t5":
        return AutoConfig.for_model(
            "t5",
            **common,
            d_model=shape.d_model,
            d_ff=shape.d_ff,
            d_kv=shape.d_kv,
            num_heads=shape.heads,
            num_layers=shape.layers,
            feed_forward_proj=shape.feed_forward,
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=0,
        )
    # A padding token's embedding would be held at zero, and padding may be the end token.
    common |= {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    if shape.family == "gpt2":
        return AutoConfig.for_model(
            "gpt2",
            **common,
            n_embd=shape.d_model,
            n_inner=shape.d_ff,
            n_head=shape.heads,
            n_layer=shape.layers,
            n_positions=POSITIONS,
        )
    return AutoConfig.for_model(
        shape.family,
        **common,
        hidden_size=shape.d_model,
        intermediate_size=shape.d_ff,
        head_dim=shape.d_kv,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads or shape.heads,
        num_hidden_layers=shape.layers,
        max_position_embeddings=POSITIONS,
        sliding_window=None,
    )


def backbone_config(settings: BackboneSettings) -> tuple[Any, bool]:
    """Return the configuration of a backbone whose weights need not be there.

    It is the settings' architecture, or that of a local folder or the hub. Returned with it is
    whether the output layer is the embedding. Raises ConfigError where neither can be known.
    """
    shape = settings.architecture
    if settings.path != "random" and shape is None:
        config = _pretrained_config(settings)
        return config, _tied(config)
    shape = shape or ArchitectureSettings()
    rows = shape.vocabulary
    if rows is None and settings.tokenizer == "train":
        rows = padded(settings.tokenizer_vocabulary)
    elif rows is None and not SHIPPED.keys().isdisjoint((settings.tokenizer, settings.path)):
        rows = _pretrained_config(BackboneSettings(path="demo")).vocab_size
    if rows is None:
        raise ConfigError([
            "backbone.architecture.vocabulary is not set, and the size of the tokenizer is not"
            " known before it is loaded: set it to the rows of the embedding"
        ])  # fmt: skip
    return model_config(shape, rows), shape.tied_embeddings


def new_model(config: Any, tied_embeddings: bool) -> Any:
    """Return a model with random weights, on torch's default device."""
    from transformers import AutoModelForCausalLM, T5ForConditionalGeneration

    if FAMILIES[config.model_type] != "t5":
        return AutoModelForCausalLM.from_config(config)
    model = T5ForConditionalGeneration(config)
    if not tied_embeddings:
        # The class ties the output layer whatever it is told; files with both come untied.
        model.lm_head.weight = nn.Parameter(torch.randn_like(model.shared.weight))
    return model


def position_limit(settings: BackboneSettings) -> int | None:
    """Return how many tokens a sequence of the backbone can have, None for any number.

    Positions that are learned end somewhere, and so do windows, which only flash attention slides.
    """
    if not is_causal(settings):
        return None
    if settings.path == "random":
        return POSITIONS if family_of(settings) == "gpt2" else None
    config = _pretrained_config(settings)
    if config.model_type == "gpt2":
        return int(config.max_position_embeddings)
    # Qwen names a window that it does not use.
    window = getattr(config, "use_sliding_window", True) and getattr(config, "sliding_window", None)
    return window or None
