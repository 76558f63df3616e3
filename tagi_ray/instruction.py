"""An instruction after the bare backbone has read it, and what a fusion hands on of it.

Axes: K tasks, I instruction or virtual tokens, D features, H heads, E features of a head.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

Prefix = tuple[tuple[Tensor, Tensor], ...]
"""Keys and values [K, H, I, E] of each layer of a decoder-only model, or of an encoder; empty where
there are none."""


class EncodedInstruction(NamedTuple):
    """What the bare backbone makes of K instructions."""

    states_KID: Tensor
    """Last states of the encoder, or of the decoder-only model."""
    mask_KI: Tensor
    """True at tokens, False at padding."""
    prefix: Prefix = ()


class VirtualTokens(NamedTuple):
    """What stands before all that is read of K tasks; no token, and so part of no text."""

    prefix: Prefix


class FusedInstruction(NamedTuple):
    """What reaches the student of K instructions besides their adapters."""

    mask_KI: Tensor
    memory_KID: Tensor | None = None
    """States that stand before the input's in the decoder's memory."""
    attended_KID: Tensor | None = None
    """States that every encoder block attends to (Eq. 1)."""
    prefix: Prefix = ()
    """Keys and values that stand before the input's."""
    begun: bool = True
    """Whether the begin token, where the model has one, is the first of the prefix."""
