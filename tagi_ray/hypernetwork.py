"""Generate the LoRA factors of all sites of all tasks from encoded instructions, in one pass.

`build_hypernetwork` makes the generator that the settings name. The one in this module, `attention`:
a query per (layer, module, A or B) attends to the instruction through a transformer trunk; a
factored head mixes each factor's R rows from k basis rows of its site. The head starts at zero,
so A starts at the common start and B at zero: at step 0 the model is the backbone.

Axes: K tasks, I instruction tokens, Q queries (two per site), M sites of one shape, R rank,
C capacity (the k basis rows), D features, W trunk width.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from tagi_ray.adapter_generator import AdapterGenerator, SiteRows
from tagi_ray.instruction import EncodedInstruction
from tagi_ray.lora import Site, common_start
from tagi_ray.method_sections import HypernetworkSettings
from tagi_ray.mlp_generator import MlpGenerator
from tagi_ray.sections import LoraSettings
from tagi_ray.shared_adapter import SharedAdapter
from tagi_ray.text_to_lora import TextToLora


def build_hypernetwork(
    sites: tuple[Site, ...], width: int, settings: HypernetworkSettings, lora: LoraSettings
) -> AdapterGenerator | None:
    """Build the generator of adapters of the settings, which is not `prefix`; None for `none`.

    width: features D of the instruction.

    Raises ConfigError when the settings do not fit the generator.
    """
    if settings.generator == "none":
        return None
    if settings.generator == "shared":
        return SharedAdapter(sites, lora)
    if settings.generator == "attention":
        return Hypernetwork(sites, width, settings, lora)
    if settings.generator == "mlp":
        return MlpGenerator(sites, width, settings, lora)
    return TextToLora(sites, width, settings, lora)


class Block(nn.Module):
    """Queries attend to the instruction, then to each other, then pass a feed-forward layer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.cross_attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.self_attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, queries_KQW: Tensor, memory_KIW: Tensor, padding_KI: Tensor) -> Tensor:
        """Return the queries [K, Q, W]; padding_KI is True where there is no token."""
        x = self.norms[0](queries_KQW)
        attended = self.cross_attention(
            x, memory_KIW, memory_KIW, key_padding_mask=padding_KI, need_weights=False
        )[0]
        queries_KQW = queries_KQW + attended
        x = self.norms[1](queries_KQW)
        queries_KQW = queries_KQW + self.self_attention(x, x, x, need_weights=False)[0]
        return queries_KQW + self.feed_forward(self.norms[2](queries_KQW))


class FactoredHead(nn.Module):
    """Mix one side's factors of M sites with equal features from learned basis rows."""

    start_MRD: Tensor | None

    def __init__(
        self,
        sites: int,
        features: int,
        rank: int,
        settings: HypernetworkSettings,
        start_MRD: Tensor | None = None,
    ) -> None:
        """start_MRD: what is added to the mixed rows."""
        super().__init__()
        self.rank = rank
        self.register_buffer("start_MRD", start_MRD, persistent=False)
        self.mix = nn.Linear(settings.width, rank * settings.capacity)
        nn.init.zeros_(self.mix.weight)
        nn.init.zeros_(self.mix.bias)
        # Unit-variance mixing weights then give rows of the size of the common start's.
        scale = (settings.capacity * features) ** -0.5
        self.basis_MCD = nn.Parameter(torch.randn(sites, settings.capacity, features) * scale)

    def forward(self, queries_KMW: Tensor) -> Tensor:
        """Return rows [K, M, R, D]."""
        mix_KMRC = self.mix(queries_KMW).unflatten(-1, (self.rank, -1))
        basis_MCD = self.basis_MCD.to(mix_KMRC.dtype)
        rows_KMRD = torch.einsum("kmrc,mcd->kmrd", mix_KMRC, basis_MCD)
        if self.start_MRD is None:
            return rows_KMRD
        # In place: the rows are the largest tensor that there is.
        return rows_KMRD.add_(self.start_MRD.to(rows_KMRD.dtype))


class Hypernetwork(AdapterGenerator):
    """Instruction states -> a bank with one slot per instruction, by attention."""

    def __init__(
        self,
        sites: tuple[Site, ...],
        width: int,
        settings: HypernetworkSettings,
        lora: LoraSettings,
    ) -> None:
        super().__init__(sites, lora)
        layers = sorted({site.name.rpartition(".")[0] for site in sites})
        modules = sorted({site.module for site in sites})
        self._layer_index = [layers.index(site.name.rpartition(".")[0]) for site in sites]
        self._module_index = [modules.index(site.module) for site in sites]
        self.layers = nn.Embedding(len(layers), settings.width)
        self.modules_ = nn.Embedding(len(modules), settings.width)
        self.sides = nn.Embedding(2, settings.width)
        self.read = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, settings.width))
        self.trunk = nn.ModuleList(
            Block(settings.width, settings.heads) for _ in range(settings.layers)
        )
        self.norm = nn.LayerNorm(settings.width)
        shapes = sorted({(site.d_in, site.d_out) for site in sites})
        self._buckets = [
            [index for index, site in enumerate(sites) if (site.d_in, site.d_out) == shape]
            for shape in shapes
        ]
        starts = common_start(sites, lora.rank, lora.start_seed)
        self.heads_a = nn.ModuleList(
            FactoredHead(
                len(bucket), d_in, lora.rank, settings,
                torch.stack([starts[sites[index].name] for index in bucket]),
            )
            for bucket, (d_in, _) in zip(self._buckets, shapes, strict=True)
        )  # fmt: skip
        self.heads_b = nn.ModuleList(
            FactoredHead(len(bucket), d_out, lora.rank, settings)
            for bucket, (_, d_out) in zip(self._buckets, shapes, strict=True)
        )

    def rows(self, *hidden: Tensor) -> Iterator[SiteRows]:
        """hidden: queries [K, Q, W], those of A of all sites, then those of B."""
        (queries_KQW,) = hidden
        count = len(self.sites)
        for bucket, head_a, head_b in zip(self._buckets, self.heads_a, self.heads_b, strict=True):
            rows_a = head_a(queries_KQW[:, bucket])
            rows_b = head_b(queries_KQW[:, [count + index for index in bucket]])
            # `unbind`: each index would fill a gradient of all sites with zeros.
            yield from map(SiteRows, bucket, rows_a.unbind(1), rows_b.unbind(1))

    def hidden(self, encoded: EncodedInstruction) -> tuple[Tensor, ...]:
        """Return the queries [K, Q, W] of all sites after the trunk: those of A, then those of B."""
        device = encoded.states_KID.device
        layer = self.layers(torch.tensor(self._layer_index, device=device))
        module = self.modules_(torch.tensor(self._module_index, device=device))
        sites_MW = layer + module
        sides = self.sides(torch.arange(2, device=device))
        queries = torch.cat([sites_MW + side for side in sides])
        queries = queries.expand(encoded.states_KID.shape[0], -1, -1)
        memory = self.read(encoded.states_KID.to(self.norm.weight.dtype))
        for block in self.trunk:
            queries = block(queries, memory, ~encoded.mask_KI.bool())
        return (self.norm(queries),)
