"""Random models and batches of fixed shapes.

Axes: K tasks, N instances, I instruction, S source and T target tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # torch would make `--help` slow
    from tagi_ray.batches import Batch
    from tagi_ray.model import TagiModel


@dataclass(frozen=True, slots=True)
class Shape:
    """Size of a random T5."""

    d_model: int
    layers: int
    """Blocks in the encoder and again in the decoder."""
    vocabulary: int
    d_kv: int = 64


SHAPES = {"S": Shape(128, 2, 4096), "M": Shape(256, 4, 4096), "L": Shape(512, 6, 32128)}


def random_model(shape: Shape) -> TagiModel:
    """Return a frozen random T5 with a hypernetwork of the default size whose bank is not zero."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    from tagi_ray.encoder_decoder import EncoderDecoder
    from tagi_ray.fusion import Fusion
    from tagi_ray.hypernetwork import Hypernetwork
    from tagi_ray.method_sections import FusionSettings, HypernetworkSettings
    from tagi_ray.model import TagiModel
    from tagi_ray.sections import LoraSettings

    lora = LoraSettings()
    config = T5Config(
        vocab_size=shape.vocabulary, d_model=shape.d_model, d_ff=4 * shape.d_model,
        d_kv=shape.d_kv, num_heads=shape.d_model // shape.d_kv, num_layers=shape.layers,
        dropout_rate=0.0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    config.decoder_start_token_id = 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = EncoderDecoder(T5ForConditionalGeneration(config), lora.targets, "random")
        hypernetwork = Hypernetwork(backbone.sites, backbone.width, HypernetworkSettings(), lora)
        for head in (*hypernetwork.heads_a, *hypernetwork.heads_b):
            # Zero at the start of training, where a wrongly routed row would change no loss.
            torch.nn.init.normal_(head.get_parameter("mix.weight"), std=0.1)
        fusion = Fusion(FusionSettings(), backbone)
    return TagiModel(backbone, hypernetwork, fusion)


def random_batch(shape: Shape, tasks: int, instances: int, tokens: tuple[int, int, int]) -> Batch:
    """Return K x N rows of random tokens without padding and without prompts."""
    import torch

    from tagi_ray.batches import Batch

    generator = torch.Generator().manual_seed(0)
    instruction, source, target = tokens

    def ids(*size: int) -> torch.Tensor:
        return torch.randint(3, shape.vocabulary, size, generator=generator)

    instruction_ids, input_ids = ids(tasks, instruction), ids(tasks, instances, source)
    prompt_ids = ids(tasks, instances, 0)
    return Batch(
        instruction_ids_KI=instruction_ids,
        instruction_mask_KI=torch.ones_like(instruction_ids, dtype=torch.bool),
        input_ids_KNS=input_ids,
        input_mask_KNS=torch.ones_like(input_ids, dtype=torch.bool),
        prompt_ids_KNS=prompt_ids,
        prompt_mask_KNS=prompt_ids.bool(),
        target_ids_KNT=ids(tasks, instances, target),
        slots_K=torch.full((tasks,), -1),
        tasks=tuple(f"task_{number}" for number in range(tasks)),
        categories=("random",) * tasks,
        position=0,
        cut_texts=0,
    )
