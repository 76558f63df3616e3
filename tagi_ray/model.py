"""The trained model: frozen backbone, hypernetwork, fusion; or the backbone alone.

Axes: K tasks, I instruction tokens, D features.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from torch import nn

from tagi_ray.backbone import Backbone, EncodedInstruction, load_backbone
from tagi_ray.config import Experiment
from tagi_ray.fusion import Fusion
from tagi_ray.hypernetwork import Hypernetwork
from tagi_ray.lora import LoraBank
from tagi_ray.sections import FusionSettings, Variant

ModelKind = Literal["metatrain", "teacher"] | Variant


class TagiModel(nn.Module):
    """A frozen backbone, and what makes adapters and fused memory from instructions for it."""

    def __init__(
        self,
        backbone: Backbone,
        hypernetwork: Hypernetwork | None,
        fusion: Fusion | None,
        *,
        zero_bank: bool = False,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.hypernetwork = hypernetwork
        self.fusion = fusion
        self.zero_bank = zero_bank
        self.generated_tasks = 0
        """Tasks that the hypernetwork has generated adapters for, so far."""

    def encode_instruction(self, ids_KI: torch.Tensor, mask_KI: torch.Tensor) -> EncodedInstruction:
        """Encode instructions with the frozen, bare backbone: no gradient."""
        with torch.no_grad():
            return self.backbone.encode(ids_KI, mask_KI)

    def generate_bank(self, encoded: EncodedInstruction) -> LoraBank | None:
        """Generate the K adapters of K instructions; None where the bank is zero by design."""
        if self.hypernetwork is None or self.zero_bank:
            return None
        self.generated_tasks += encoded.states_KID.shape[0]
        return self.hypernetwork(encoded)

    def fused(self, encoded: EncodedInstruction) -> EncodedInstruction | None:
        """Return what the decoder's memory gets of the instructions, None without fusion."""
        return None if self.fusion is None else self.fusion(encoded)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return the parameters that training changes, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}


def build_model(
    experiment: Experiment,
    tokenizer_folder: Path,
    kind: ModelKind,
    seed: int,
) -> TagiModel:
    """Build the model of a stage. Initial values depend on the seed alone, not on the device.

    `metatrain` trains the whole backbone, `teacher` nothing but a bank kept outside the model,
    the variants a hypernetwork: `tagi_adapter_only` without fusion; `tagi_fusion_only`, whose bank
    stays zero, trains a projection of the fused instruction in its place.
    """
    backbone = load_backbone(
        experiment.backbone, experiment.lora, tokenizer_folder, experiment.seeds[0]
    )
    return assemble(experiment, backbone, kind, seed)


def assemble(experiment: Experiment, backbone: Backbone, kind: ModelKind, seed: int) -> TagiModel:
    """Build what a stage puts around its backbone."""
    if kind == "teacher":
        return TagiModel(backbone, None, None)
    if kind == "metatrain":
        backbone.requires_grad_(True)
        return TagiModel(backbone, None, None)
    settings = FusionSettings(kind="none") if kind == "tagi_adapter_only" else experiment.fusion
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        hypernetwork = Hypernetwork(
            backbone.sites, backbone.width, experiment.hypernetwork, experiment.lora
        )
        zero_bank = kind == "tagi_fusion_only"
        fusion = Fusion(settings, backbone.width, projected=zero_bank)
    hypernetwork.requires_grad_(not zero_bank)
    return TagiModel(backbone, hypernetwork, fusion, zero_bank=zero_bank)
