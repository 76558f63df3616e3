"""The model of a backbone: from files, from a seed, or only its shape.

Encoder-decoder models of the T5 family are supported.
"""

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
from tagi_ray.sections import ArchitectureSettings, BackboneSettings
from tagi_ray.vocabulary import TextTokenizer

DEMO = Path(__file__).parent / "demo_backbone"
FAMILIES = ("t5", "mt5", "umt5", "longt5")
"""Model types that the interface of `backbone` fits."""


def identify(settings: BackboneSettings, noted: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Say which weights the settings name: a hash of local files, or a commit of the hub.

    Returns `weights`, and `files` with size and time of each that was hashed; where these are as
    in `noted`, which an earlier call returned, the files are not read again. Of a hub model nothing
    but small files is fetched; `hub.pinned` gives its settings the commit. Raises ConfigError for
    what is no model of the T5 family, or has no safetensors weights.
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
    if settings.path == "demo":
        return DEMO
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
            f"backbone.path={settings.path} is a model of type {config.model_type}: name an"
            f" encoder-decoder model of the T5 family ({', '.join(FAMILIES)})"
        ])  # fmt: skip
    if settings.architecture is not None:
        found = _architecture(config)
        problems = [
            f"backbone.architecture.{name}={value} is not what backbone.path={settings.path} has,"
            f" {getattr(found, name)}: correct it, or leave backbone.architecture out"
            for name, value in settings.architecture.model_dump(exclude_none=True).items()
            if value != getattr(found, name)
        ]
        if problems:
            raise ConfigError(problems)
    return config


def _architecture(config: Any) -> ArchitectureSettings:
    """Return the shape that a model's configuration tells of."""
    gate = "gated-gelu" if config.is_gated_act else "relu"
    return ArchitectureSettings(
        d_model=config.d_model,
        d_ff=config.d_ff,
        d_kv=config.d_kv,
        heads=config.num_heads,
        layers=config.num_layers,
        vocabulary=config.vocab_size,
        feed_forward=gate,
        tied_embeddings=_tied(config),
    )


def _tied(config: Any) -> bool:
    """Say whether the output layer is the embedding: transformers' own field says so always."""
    return getattr(config, "scale_decoder_outputs", config.tie_word_embeddings)


def pretrained_model(settings: BackboneSettings) -> Any:
    """Return the model in the files that the settings name; raises ConfigError without one."""
    from transformers import AutoModelForSeq2SeqLM
    from transformers.utils import logging as transformers_logging

    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()  # in a log its bars are noise
    # A folder, so that nothing is asked of the hub here, a conversion of pickles least of all.
    folder = _source(settings, weights=True)
    config = _pretrained_config(settings)
    try:
        return AutoModelForSeq2SeqLM.from_pretrained(
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
    """Return a T5 of the settings' shape, drawn from a seed."""
    shape = settings.architecture or ArchitectureSettings()
    config = t5_config(shape, shape.vocabulary or padded(tokenizer.size))
    config.pad_token_id, config.eos_token_id = tokenizer.pad_id, tokenizer.eos_id
    config.decoder_start_token_id = tokenizer.start_id
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return t5_model(config, shape.tied_embeddings).to(getattr(torch, settings.dtype))


def padded(tokens: int) -> int:
    """Return the rows of an embedding for a tokenizer of that size."""
    return -(-tokens // 64) * 64


def t5_config(shape: ArchitectureSettings, vocabulary: int) -> Any:
    """Return transformers' configuration of a T5 of a shape."""
    from transformers import T5Config

    return T5Config(
        vocab_size=vocabulary,
        d_model=shape.d_model,
        d_ff=shape.d_ff,
        d_kv=shape.d_kv,
        num_heads=shape.heads,
        num_layers=shape.layers,
        feed_forward_proj=shape.feed_forward,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,  # pyright: ignore[reportCallIssue] # a field of the base class
        tie_word_embeddings=shape.tied_embeddings,  # pyright: ignore[reportCallIssue] # no field
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
    elif rows is None and "demo" in (settings.tokenizer, settings.path):
        rows = _pretrained_config(BackboneSettings(path="demo")).vocab_size
    if rows is None:
        raise ConfigError([
            "backbone.architecture.vocabulary is not set, and the size of the tokenizer is not"
            " known before it is loaded: set it to the rows of the embedding"
        ])  # fmt: skip
    return t5_config(shape, rows), shape.tied_embeddings


def t5_model(config: Any, tied_embeddings: bool) -> Any:
    """Return a T5 with random weights, on torch's default device."""
    from transformers import T5ForConditionalGeneration

    model = T5ForConditionalGeneration(config)
    if not tied_embeddings:
        # The class ties the output layer whatever it is told; files with both come untied.
        model.lm_head.weight = nn.Parameter(torch.randn_like(model.shared.weight))
    return model
