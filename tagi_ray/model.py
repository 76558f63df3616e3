"""The trained model: frozen backbone, hypernetwork, fusion; or the backbone alone.

Axes: K tasks, I instruction tokens, D features.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from torch import nn

from tagi_ray.backbone import Backbone
from tagi_ray.config import Experiment
from tagi_ray.families import load_backbone
from tagi_ray.fusion import Fusion
from tagi_ray.hypernetwork import build_hypernetwork
from tagi_ray.instruction import EncodedInstruction, FusedInstruction, VirtualTokens
from tagi_ray.lora import LoraBank
from tagi_ray.virtual_tokens import TrainedPrefix

ModelKind = Literal["metatrain", "teacher", "hypernetwork"]


class TagiModel(nn.Module):
    """A frozen backbone, and what makes adapters and fused instructions for it."""

    def __init__(
        self, backbone: Backbone, hypernetwork: nn.Module | None, fusion: Fusion | None
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.hypernetwork = hypernetwork
        self.fusion = fusion
        self.teacher: Backbone | None = None
        """A fully tuned model whose logits are learnt, where there is one."""
        self.generated_tasks = 0
        """Tasks that the hypernetwork has generated adapters for, so far."""

    def encode_instruction(self, ids_KI: torch.Tensor, mask_KI: torch.Tensor) -> EncodedInstruction:
        """Encode instructions with the frozen, bare backbone: no gradient."""
        with torch.no_grad():
            return self.backbone.encode(ids_KI, mask_KI)

    def generate_bank(self, encoded: EncodedInstruction) -> LoraBank | VirtualTokens | None:
        """Generate the K adapters of K instructions; None without a hypernetwork.

        The generator `prefix` has virtual tokens for them in a bank's place.
        """
        if self.hypernetwork is None:
            return None
        self.generated_tasks += encoded.states_KID.shape[0]
        return self.hypernetwork(encoded)

    def fused(self, encoded: EncodedInstruction) -> FusedInstruction | None:
        """Return what the student gets of the instructions besides adapters, None without fusion."""
        return None if self.fusion is None else self.fusion(encoded)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return the parameters that training changes, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}


def build_model(
    experiment: Experiment, tokenizer_folder: Path, kind: ModelKind, seed: int
) -> TagiModel:
    """Build the model of a stage. Initial values depend on the seed alone, not on the device.

    `metatrain` trains the whole backbone, `teacher` nothing but a bank kept outside the model,
    `hypernetwork` what makes adapters and fuses instructions.
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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if experiment.hypernetwork.generator == "prefix":
            hypernetwork = TrainedPrefix(backbone.prefix_shape, experiment.hypernetwork.capacity)
        else:
            hypernetwork = build_hypernetwork(
                backbone.sites, backbone.width, experiment.hypernetwork, experiment.lora
            )
        fusion = Fusion(experiment.fusion, backbone)
    return TagiModel(backbone, hypernetwork, fusion)
