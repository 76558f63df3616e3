"""How the instruction reaches the student besides its adapter.

A fusion's modules live here, outside the backbone, whose state-dict keys and site names stay as
they are.

Axes: K tasks, N instances, S source tokens, P = N S positions of a task, I instruction tokens,
D features, H heads, E features of a head.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional

from tagi_ray.backbone import Backbone
from tagi_ray.encoder_decoder import EncoderDecoder
from tagi_ray.errors import ConfigError
from tagi_ray.instruction import EncodedInstruction, FusedInstruction
from tagi_ray.method_sections import FusionSettings


class CrossAttention(nn.Module):
    """What the states of an encoder block take from the instruction (Eq. 1).

    The paper names neither norm nor start. Its Figure 2 draws the norm after the residual, which
    would change the frozen backbone at step 0; here, as everywhere in T5, it stands before the
    projections, the instruction's too, for T5's last norm leaves encoded text at any scale.

    The output projection starts at zero, so that step 0 is the backbone. With a gate of zero per
    feature in its place nothing but the gate learns at first: alone on the demo backbone it was at
    a loss of 6.5 after 400 steps at 1e-4 where the projection was at 2.0, and at 0.23 against
    0.03 at 1e-3.
    """

    def __init__(self, width: int, inner: int, heads: int) -> None:
        """inner: features H E of the attention."""
        super().__init__()
        self.heads = heads
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.instruction_norm = nn.RMSNorm(width, eps=1e-6)
        self.q = nn.Linear(width, inner, bias=False)
        self.k = nn.Linear(width, inner, bias=False)
        self.v = nn.Linear(width, inner, bias=False)
        self.o = nn.Linear(inner, width, bias=False)
        for projection in (self.q, self.k, self.v):
            # Of normed states: features, and scores, of unit variance.
            nn.init.normal_(projection.weight, std=width**-0.5)
        nn.init.zeros_(self.o.weight)

    def forward(self, states: Tensor, instruction_KID: Tensor, mask_KI: Tensor) -> Tensor:
        """Return what is to be added to the states [K*N, S, D].

        All positions of a task attend to its one instruction, which is not repeated for them.
        """
        tasks, dtype = instruction_KID.shape[0], self.norm.weight.dtype
        states_KPD = states.unflatten(0, (tasks, -1)).flatten(1, 2)
        x_KPD = self.norm(states_KPD.to(dtype))
        x_KID = self.instruction_norm(instruction_KID.to(dtype))
        queries_KHPE = self._of_heads(self.q(x_KPD))
        keys_KHIE, values_KHIE = self._of_heads(self.k(x_KID)), self._of_heads(self.v(x_KID))
        taken_KHPE = functional.scaled_dot_product_attention(
            queries_KHPE, keys_KHIE, values_KHIE, attn_mask=mask_KI.bool()[:, None, None]
        )
        return self.o(taken_KHPE.transpose(1, 2).flatten(2)).view(states.shape)

    def _of_heads(self, projected: Tensor) -> Tensor:
        return projected.unflatten(2, (self.heads, -1)).transpose(1, 2)


class Gate(nn.Module):
    """A factor for each feature, one at the start."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, states: Tensor) -> Tensor:
        """states: [..., D]."""
        return states * self.weight


class Fusion(nn.Module):
    """Choose what reaches the student of encoded instructions, and attach what it trains."""

    def __init__(self, settings: FusionSettings, backbone: Backbone) -> None:
        """The backbone keeps what is attached here: one fusion with a cross-attention for each.

        Raises ConfigError for a kind that the backbone's family does not have, or features that
        do not divide among its heads.
        """
        super().__init__()
        self.settings = settings
        if settings.kind not in backbone.fusions:
            raise ConfigError([
                f"fusion.kind={settings.kind} is not for the backbone {backbone.identity}: choose"
                f" one of {', '.join(backbone.fusions)}"
            ])  # fmt: skip
        self.layers = nn.ModuleList()
        """A cross-attention for each encoder block, or one for all."""
        self.gates = nn.ModuleList()
        """Of each encoder block, where they share the cross-attention."""
        if settings.cross_attention:
            assert isinstance(backbone, EncoderDecoder), "no other family has the kind"
            self._attach(backbone)

    def forward(self, encoded: EncodedInstruction) -> FusedInstruction | None:
        """encoded: states [K, I, D] -> what the student gets of them, or None."""
        settings, states = self.settings, encoded.states_KID
        if settings.kind == "none":
            return None
        return FusedInstruction(
            encoded.mask_KI,
            states if settings.concat else None,
            states if settings.cross_attention else None,
            encoded.prefix if settings.kind == "kv_prefix" else (),
        )

    def _attach(self, backbone: EncoderDecoder) -> None:
        settings, width, heads = self.settings, backbone.width, backbone.heads
        if settings.low_rank and settings.low_rank % heads:
            raise ConfigError([
                f"fusion.low_rank={settings.low_rank} is not a multiple of the {heads} heads of the"
                f" backbone {backbone.identity}: make it one"
            ])  # fmt: skip
        inner = settings.low_rank or backbone.attention_width
        blocks = len(backbone.model.encoder.block)
        self.layers.extend(
            CrossAttention(width, inner, heads) for _ in range(1 if settings.shared else blocks)
        )
        if settings.shared:
            self.gates.extend(Gate(width) for _ in range(blocks))
        backbone.after_self_attention(self._attend)

    def _attend(self, block: int, states: Tensor, instruction: FusedInstruction) -> Tensor:
        """Return a block's states [K*N, S, D] with what they take from the instruction."""
        assert instruction.attended_KID is not None
        layer = self.layers[0 if self.settings.shared else block]
        with _precision(states):
            taken = layer(states, instruction.attended_KID, instruction.mask_KI)
            if self.settings.shared:
                taken = self.gates[block](taken)
        return states + taken.to(states.dtype)


def _precision(states: Tensor) -> AbstractContextManager[object]:
    """Above a bfloat16 backbone products are in bfloat16 too; the weights stay float32."""
    kind = states.device.type
    if states.dtype != torch.bfloat16 or not torch.amp.is_autocast_available(kind):
        return nullcontext()
    return torch.autocast(kind, states.dtype)
