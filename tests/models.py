"""Small random models, banks and batches for the tests."""

from pathlib import Path

import torch
from transformers import T5Config, T5ForConditionalGeneration

from tagi_ray.batches import Batch
from tagi_ray.encoder_decoder import EncoderDecoder
from tagi_ray.fusion import Fusion
from tagi_ray.hypernetwork import Hypernetwork
from tagi_ray.lora import LoraBank, Site
from tagi_ray.method_sections import FusionSettings, HypernetworkSettings
from tagi_ray.model import TagiModel
from tagi_ray.sections import LoraSettings

SHARED = Path(__file__).parents[2] / "shared"
VOCABULARY = 96
LORA = LoraSettings(rank=4, alpha=8.0, targets=("q", "v"))


def random_t5(seed: int = 0) -> T5ForConditionalGeneration:
    """A T5 with inner width other than its model width, so that no shape fits by chance."""
    torch.manual_seed(seed)
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCABULARY, d_model=32, d_ff=48, d_kv=12, num_heads=2, num_layers=2,
            dropout_rate=0.0, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
        )
    )  # fmt: skip


def random_backbone(
    targets: tuple[str, ...] = LORA.targets, checkpointing: bool = False
) -> EncoderDecoder:
    backbone = EncoderDecoder(random_t5(), targets, "random")
    if checkpointing:
        backbone.checkpoint_activations()
    return backbone


def random_model(fusion: FusionSettings | None = None, lora: LoraSettings = LORA) -> TagiModel:
    backbone = random_backbone(lora.targets)
    torch.manual_seed(1)
    settings = HypernetworkSettings(width=16, layers=1, heads=2, capacity=4)
    hypernetwork = Hypernetwork(backbone.sites, backbone.width, settings, lora)
    for head in (*hypernetwork.heads_a, *hypernetwork.heads_b):
        torch.nn.init.normal_(head.mix.weight, std=0.3)  # off its zero start
    return TagiModel(backbone, hypernetwork, Fusion(fusion or FusionSettings(), backbone))


def fill(
    sites: tuple[Site, ...], slots: int, rank: int = 4, scaling: float = 2.0, seed: int = 0
) -> LoraBank:
    generator = torch.Generator().manual_seed(seed)
    return LoraBank(
        {s.name: torch.randn(slots, rank, s.d_in, generator=generator) * 0.3 for s in sites},
        {s.name: torch.randn(slots, s.d_out, rank, generator=generator) * 0.3 for s in sites},
        scaling,
    )


def random_bank(
    backbone: EncoderDecoder, tasks: int = 2, seed: int = 0, requires_grad: bool = False
) -> LoraBank:
    bank = fill(backbone.sites, tasks, seed=seed)
    return bank.map(lambda factor: factor.requires_grad_(requires_grad))


def random_batch(tasks: int = 2, instances: int = 3, seed: int = 0, slots: bool = True) -> Batch:
    generator = torch.Generator().manual_seed(seed)

    def ids(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
        drawn = torch.randint(3, VOCABULARY, shape, generator=generator)
        lengths = torch.randint(2, shape[-1] + 1, shape[:-1], generator=generator)
        mask = torch.arange(shape[-1]) < lengths[..., None]
        return drawn * mask, mask

    instruction, instruction_mask = ids(tasks, 9)
    inputs, input_mask = ids(tasks, instances, 7)
    prompts, prompt_mask = ids(tasks, instances, 15)
    targets, target_mask = ids(tasks, instances, 5)
    return Batch(
        instruction_ids_KI=instruction,
        instruction_mask_KI=instruction_mask,
        input_ids_KNS=inputs,
        input_mask_KNS=input_mask,
        prompt_ids_KNS=prompts,
        prompt_mask_KNS=prompt_mask,
        target_ids_KNT=targets.masked_fill(~target_mask, -100),
        slots_K=torch.arange(tasks) if slots else torch.full((tasks,), -1),
        tasks=tuple(f"task{k}" for k in range(tasks)),
        categories=("any",) * tasks,
        position=0,
        cut_texts=0,
    )
