"""What all generators share: from the factors of single sites to a bank, in the right precision.

Axes: K tasks, I instruction tokens, R rank, D features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tagi_ray.instruction import EncodedInstruction
from tagi_ray.lora import LoraBank, Site
from tagi_ray.sections import LoraSettings


class SiteRows(NamedTuple):
    """Both factors of one site of K tasks, each as R rows."""

    site: int
    """Place of the site among the generator's."""
    a_KRD: Tensor
    b_KRD: Tensor
    """B transposed: its columns as rows."""


class AdapterGenerator(nn.Module, ABC):
    """Instruction states -> a bank with one slot per instruction.

    At step 0 A is the common start and B is zero, so that the model is the backbone.
    """

    def __init__(self, sites: tuple[Site, ...], lora: LoraSettings) -> None:
        super().__init__()
        self.sites = sites
        self.rank = lora.rank
        self.scaling = lora.alpha / lora.rank

    @abstractmethod
    def hidden(self, encoded: EncodedInstruction) -> tuple[Tensor, ...]:
        """Return what the factors are made from, in the parameters' precision."""

    @abstractmethod
    def rows(self, *hidden: Tensor) -> Iterator[SiteRows]:
        """Make the factors of every site, in any order."""

    def forward(self, encoded: EncodedInstruction) -> LoraBank:
        """encoded: states [K, I, D], mask [K, I] -> a bank of K slots, its sites in their order.

        Above a bfloat16 backbone, whose weights the factors are added to in bfloat16, the factors
        are made in it too; the parameters, and what reads the instruction, stay float32.
        """
        hidden = self.hidden(encoded)
        kind, dtype = encoded.states_KID.device.type, encoded.states_KID.dtype
        if dtype != torch.bfloat16 or not torch.amp.is_autocast_available(kind):
            return self._bank(hidden)
        with torch.autocast(kind, dtype):
            return self._bank(hidden)

    def _bank(self, hidden: tuple[Tensor, ...]) -> LoraBank:
        made = {rows.site: rows for rows in self.rows(*hidden)}
        named = [(site.name, made[place]) for place, site in enumerate(self.sites)]
        a = {name: rows.a_KRD for name, rows in named}
        b = {name: rows.b_KRD.transpose(1, 2) for name, rows in named}
        return LoraBank(a, b, self.scaling)


def masked_mean(encoded: EncodedInstruction, dtype: torch.dtype) -> Tensor:
    """Return the mean state [K, D] of each instruction's own tokens, whatever padding holds."""
    states_KID = encoded.states_KID.to(dtype)
    mask_KI1 = encoded.mask_KI.bool().unsqueeze(-1)
    tokens_K1 = mask_KI1.sum(1).clamp(min=1)
    return states_KID.masked_fill(~mask_KI1, 0.0).sum(1) / tokens_K1


def grouped(keys: Sequence[Hashable]) -> list[list[int]]:
    """Return the places of equal keys together, in the order of first appearance."""
    groups: dict[Hashable, list[int]] = {}
    for place, key in enumerate(keys):
        groups.setdefault(key, []).append(place)
    return list(groups.values())
