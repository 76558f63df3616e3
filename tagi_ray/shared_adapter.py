"""One trained adapter for all tasks, whatever their instructions: Tk-Instruct-LoRA of Table 4.

Axes: K tasks, R rank, D features.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from tagi_ray.adapter_generator import AdapterGenerator, SiteRows
from tagi_ray.instruction import EncodedInstruction
from tagi_ray.lora import Site, common_start
from tagi_ray.sections import LoraSettings


class SharedAdapter(AdapterGenerator):
    """Gives each task the same factors, which are parameters."""

    def __init__(self, sites: tuple[Site, ...], lora: LoraSettings) -> None:
        super().__init__(sites, lora)
        starts = common_start(sites, lora.rank, lora.start_seed)
        for place, site in enumerate(sites):
            # Parameters of this very module, whose forward is what ZeRO-3 gathers them for.
            self.register_parameter(f"a_{place}", nn.Parameter(starts[site.name]))
            zero_RD = torch.zeros(lora.rank, site.d_out)
            self.register_parameter(f"b_{place}", nn.Parameter(zero_RD))

    def hidden(self, encoded: EncodedInstruction) -> tuple[Tensor, ...]:
        """Return the instructions' masks, of which the number of tasks is all that is read."""
        return (encoded.mask_KI,)

    def rows(self, *hidden: Tensor) -> Iterator[SiteRows]:
        """Repeat the factors of every site for each task, without a copy."""
        (mask_KI,) = hidden
        for place in range(len(self.sites)):
            a_RD, b_RD = getattr(self, f"a_{place}"), getattr(self, f"b_{place}")
            tasks = mask_KI.shape[0]
            yield SiteRows(place, a_RD.expand(tasks, -1, -1), b_RD.expand(tasks, -1, -1))
