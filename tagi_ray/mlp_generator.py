"""The paper's generator (Eq. 2): a two-layer perceptron for each layer, which its sites share.

A layer is a module of the backbone that holds sites, one attention or one feed-forward: Q and V of
an attention share a perceptron, and only the number of the site tells them apart.

Axes: K tasks, I instruction tokens, L layers of one shape, M sites of a layer, C capacity (hidden
units), R rank, D features.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from tagi_ray.adapter_generator import AdapterGenerator, SiteRows, grouped, masked_mean
from tagi_ray.instruction import EncodedInstruction
from tagi_ray.lora import Site, common_start
from tagi_ray.method_sections import HypernetworkSettings
from tagi_ray.sections import LoraSettings


class HiddenUnits(nn.Module):
    """The first linears of L layers with M sites each, and their ReLU."""

    numbers_LM: Tensor

    def __init__(self, numbers: list[list[int]], width: int, capacity: int) -> None:
        """numbers: idx of the sites of each layer."""
        super().__init__()
        numbers_LM = torch.tensor(numbers, dtype=torch.get_default_dtype())
        self.register_buffer("numbers_LM", numbers_LM, persistent=False)
        bound = (width + 1) ** -0.5
        weight_LCD = torch.empty(len(numbers), capacity, width + 1).uniform_(-bound, bound)
        # The numbers of a layer's sites differ by 1: a weight of this size tells them apart, so
        # that most units answer for one of them.
        weight_LCD[..., -1].uniform_(-1.0, 1.0)
        # Their mean grows with the layer and would outweigh the instruction.
        bias_LC = -weight_LCD[..., -1] * numbers_LM.mean(1, keepdim=True)
        self.weight_LCD = nn.Parameter(weight_LCD)
        """Last column: that of idx."""
        self.bias_LC = nn.Parameter(bias_LC)

    def forward(self, instruction_KD: Tensor) -> Tensor:
        """Return [L, M, K, C]."""
        # The linear of (instruction; idx), without that pair for every site.
        of_instruction = torch.einsum("kd,lcd->lkc", instruction_KD, self.weight_LCD[..., :-1])
        of_number = self.numbers_LM[..., None] * self.weight_LCD[:, None, :, -1]
        offset_LMC = of_number + self.bias_LC[:, None]
        return functional.relu(of_instruction[:, None] + offset_LMC[:, :, None])


class StackedLinear(nn.Module):
    """The last linears of L layers, zero at first, in one product."""

    start_LMD: Tensor | None

    def __init__(
        self, layers: int, capacity: int, features: int, start_LMD: Tensor | None = None
    ) -> None:
        """start_LMD: what is added to the output."""
        super().__init__()
        self.weight_LDC = nn.Parameter(torch.zeros(layers, features, capacity))
        self.bias_LD = nn.Parameter(torch.zeros(layers, features))
        self.register_buffer("start_LMD", start_LMD, persistent=False)

    def forward(self, hidden_LMKC: Tensor) -> Tensor:
        """Return [L, M, K, D]."""
        output = torch.einsum("lmkc,ldc->lmkd", hidden_LMKC, self.weight_LDC)
        offset_LMD = self.bias_LD[:, None]
        if self.start_LMD is not None:
            offset_LMD = offset_LMD + self.start_LMD
        # In place: the output is the largest tensor that there is.
        return output.add_(offset_LMD[:, :, None].to(output.dtype))


class MlpGenerator(AdapterGenerator):
    """Mean state of the instruction, and idx -> the rows of both factors of a site."""

    def __init__(
        self,
        sites: tuple[Site, ...],
        width: int,
        settings: HypernetworkSettings,
        lora: LoraSettings,
    ) -> None:
        super().__init__(sites, lora)
        layers = grouped([site.name.rpartition(".")[0] for site in sites])
        shapes = [
            (len(layer), max(sites[p].d_in for p in layer), max(sites[p].d_out for p in layer))
            for layer in layers
        ]
        starts = common_start(sites, lora.rank, lora.start_seed)
        self._stacks: list[list[list[int]]] = []
        """Layers of one shape, each as the places of its sites."""
        self.units = nn.ModuleList()
        self.heads_a = nn.ModuleList()
        self.heads_b = nn.ModuleList()
        for members in grouped(shapes):
            stack = [layers[member] for member in members]
            _, d_in, d_out = shapes[members[0]]
            padded = torch.stack([
                torch.stack([
                    functional.pad(starts[sites[p].name], (0, d_in - sites[p].d_in))
                    for p in layer
                ])
                for layer in stack
            ])  # fmt: skip
            sizes = (len(stack), settings.capacity)
            self._stacks.append(stack)
            self.units.append(HiddenUnits(stack, width, settings.capacity))
            self.heads_a.append(StackedLinear(*sizes, lora.rank * d_in, padded.flatten(2)))
            self.heads_b.append(StackedLinear(*sizes, lora.rank * d_out))

    def hidden(self, encoded: EncodedInstruction) -> tuple[Tensor, ...]:
        """Return the hidden units [L, M, K, C] of each stack of layers.

        In full precision: idx is larger than what it decides.
        """
        instruction_KD = masked_mean(encoded, next(self.parameters()).dtype)
        return tuple(units(instruction_KD) for units in self.units)

    def rows(self, *hidden: Tensor) -> Iterator[SiteRows]:
        """hidden: the units [L, M, K, C] of each stack."""
        stacks = zip(self._stacks, hidden, self.heads_a, self.heads_b, strict=True)
        for stack, hidden_LMKC, head_a, head_b in stacks:
            a, b = (
                head(hidden_LMKC).unflatten(-1, (self.rank, -1)).flatten(0, 1).unbind(0)
                for head in (head_a, head_b)
            )
            places = [place for layer in stack for place in layer]
            for place, a_KRD, b_KRD in zip(places, a, b, strict=True):
                site = self.sites[place]
                yield SiteRows(place, a_KRD[..., : site.d_in], b_KRD[..., : site.d_out])
