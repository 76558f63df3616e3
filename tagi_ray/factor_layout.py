"""The factors of a slot as one row of numbers, which an optimiser moves in one go.

Axes: K slots, G of them, P numbers of a slot's factors, R the largest rank, r a slot's own,
D features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tagi_ray.lora import LoraBank, Site


class FactorLayout:
    """Where the factors of each site lie among the P numbers of a slot."""

    def __init__(self, sites: Sequence[Site], rank: int) -> None:
        self.rank = rank
        self._shapes = {f"{site.name}.lora_A": (rank, site.d_in) for site in sites}
        self._shapes |= {f"{site.name}.lora_B": (site.d_out, rank) for site in sites}
        self._sizes = [math.prod(shape) for shape in self._shapes.values()]
        self.numbers = sum(self._sizes)

    def bank(self, factors_GP: Tensor, scaling_G11: Tensor) -> LoraBank:
        """Return views of G slots as a bank."""
        parts = zip(self._shapes.items(), factors_GP.split(self._sizes, 1), strict=True)
        return _bank({n: part.unflatten(1, shape) for (n, shape), part in parts}, scaling_G11)

    def alone(self, numbers_P: Tensor, rank: int, alpha: float) -> LoraBank:
        """Return a copy of one slot as a bank, at the teacher's own rank and on the CPU."""
        named = self.named(numbers_P, rank)
        factors = {name: factor[None] for name, factor in named.items()}
        return _bank(factors, alpha / rank)

    def named(self, numbers_P: Tensor, rank: int) -> dict[str, Tensor]:
        """Return copies of one slot's factors without padding, on the CPU: [r, D_in], [D_out, r]."""
        parts = zip(self._shapes.items(), numbers_P.cpu().split(self._sizes), strict=True)
        whole = {name: part.view(shape) for (name, shape), part in parts}
        return {
            name: (part[:rank] if name.endswith("_A") else part[:, :rank]).clone().contiguous()
            for name, part in whole.items()
        }

    def padded(self, named: Mapping[str, Tensor], prefix: str = "") -> Tensor:
        """Return the numbers [P] of what `named` returned; zeros where nothing is given."""
        numbers_P = torch.zeros(self.numbers)
        for (name, shape), part in zip(
            self._shapes.items(), numbers_P.split(self._sizes), strict=True
        ):
            if (factor := named.get(prefix + name)) is not None:
                part.view(shape)[: factor.shape[0], : factor.shape[1]] = factor
        return numbers_P


def _bank(factors: Mapping[str, Tensor], scaling: float | Tensor) -> LoraBank:
    def ending(end: str) -> dict[str, Tensor]:
        return {n.removesuffix(end): factor for n, factor in factors.items() if n.endswith(end)}

    return LoraBank(ending(".lora_A"), ending(".lora_B"), scaling)
