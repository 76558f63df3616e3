"""Small random decoder-only models for the tests."""

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from tagi_ray.architecture import model_config
from tagi_ray.decoder_only import DecoderOnly
from tagi_ray.sections import ArchitectureSettings, Family
from tests.models import VOCABULARY

FAMILIES: tuple[Family, ...] = ("llama", "mistral", "qwen2", "qwen3", "gpt2")
PAD, END, BEGIN = 0, 1, 2


def targets_of(family: Family) -> tuple[str, ...]:
    return ("c_attn",) if family == "gpt2" else ("q_proj", "v_proj")


def random_causal_lm(
    family: Family, dtype: torch.dtype = torch.float64, seed: int = 0
) -> PreTrainedModel:
    """Four heads, of which two share keys; its inner width is not its model width."""
    gpt2 = family == "gpt2"
    shape = ArchitectureSettings(
        family=family, d_model=32, d_ff=48, d_kv=8 if gpt2 else 12, heads=4,
        kv_heads=None if gpt2 else 2, layers=2, vocabulary=VOCABULARY,
    )  # fmt: skip
    config = model_config(shape, VOCABULARY)
    config.initializer_range = 0.3
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.2 * torch.randn_like(parameter)  # biases and norms matter too
    return model


def random_decoder(
    family: Family,
    dtype: torch.dtype = torch.float64,
    *,
    begin: int | None = BEGIN,
    targets: tuple[str, ...] | None = None,
    checkpointing: bool = False,
) -> DecoderOnly:
    model = random_causal_lm(family, dtype)
    config = model.config
    config.bos_token_id, config.eos_token_id, config.pad_token_id = begin, END, PAD
    backbone = DecoderOnly(model, targets or targets_of(family), "random")
    if checkpointing:
        backbone.checkpoint_activations()
    return backbone
