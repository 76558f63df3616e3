"""The heads of Text-to-LoRA (arXiv 2506.06105), large, medium and small, on the backbone's states.

The mean state of the instruction, a layer embedding and a module embedding pass a mixer and a
residual trunk, and one linear head for each module type makes the factors: `t2l_l` both at once;
`t2l_m` one of the two, told by an embedding; `t2l_s` one row of one of the two, told by a second
embedding. The sizes are the published ones; dropout is left out, as everywhere, and the heads start
at zero beside the common start, so that at step 0 the model is the backbone.

Axes: K tasks, I instruction tokens, M sites, F factors made apart (1 or 2), P rows made apart (1 or
R), R rank, D features, W width (the latent size), H features that the heads read.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from tagi_ray.adapter_generator import AdapterGenerator, SiteRows, grouped, masked_mean
from tagi_ray.errors import ConfigError
from tagi_ray.instruction import EncodedInstruction
from tagi_ray.lora import Site, common_start
from tagi_ray.method_sections import HypernetworkSettings
from tagi_ray.sections import LoraSettings

NARROWEST = 8
"""Below, a normalised embedding of a quarter of the width has one feature: a constant."""


class Residual(nn.Module):
    """A normalised perceptron beside its own input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width), nn.SiLU(),
            nn.Linear(4 * width, width), nn.SiLU(),
        )  # fmt: skip

    def forward(self, input_W: Tensor) -> Tensor:
        """Return [..., W]."""
        return input_W + self.mlp(input_W)


class ModuleHead(nn.Module):
    """The linear that makes the factors of all sites of a module type, zero at first."""

    start_MRD: Tensor

    def __init__(self, width: int, size: str, features: tuple[int, int], start_MRD: Tensor) -> None:
        """size: l, m or s. features: D_in and D_out. start_MRD: what is added to A."""
        super().__init__()
        self.rank, self.features, self.joint = start_MRD.shape[1], features, size == "l"
        d_head = sum(features) if self.joint else max(features)
        self.linear = nn.Linear(width, d_head if size == "s" else self.rank * d_head)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.register_buffer("start_MRD", start_MRD, persistent=False)

    def forward(self, input_KMFPH: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows of A [K, M, R, D_in] and of B [K, M, R, D_out]."""
        output = self.linear(input_KMFPH)
        d_in, d_out = self.features
        if self.joint:
            output = output.flatten(2)
            rows_a = output[..., : self.rank * d_in].unflatten(-1, (self.rank, d_in))
            rows_b = output[..., self.rank * d_in :].unflatten(-1, (self.rank, d_out))
        else:
            rows_KMFRD = output.flatten(3).unflatten(3, (self.rank, -1))
            rows_a, rows_b = rows_KMFRD[:, :, 0, :, :d_in], rows_KMFRD[:, :, 1, :, :d_out]
        # In place: the rows are the largest tensor that there is.
        return rows_a.add_(self.start_MRD.to(rows_a.dtype)), rows_b


class TextToLora(AdapterGenerator):
    """Mean state of the instruction, layer and module -> both factors of a site."""

    layer_M: Tensor
    type_M: Tensor

    def __init__(
        self,
        sites: tuple[Site, ...],
        width: int,
        settings: HypernetworkSettings,
        lora: LoraSettings,
    ) -> None:
        """Raises ConfigError for a latent size that has no room for the embeddings."""
        super().__init__(sites, lora)
        latent, size = settings.width, settings.generator.removeprefix("t2l_")
        if latent < NARROWEST:
            raise ConfigError([
                f"hypernetwork.width={latent} is too narrow for hypernetwork.generator="
                f"{settings.generator}: set at least {NARROWEST}"
            ])  # fmt: skip
        depths = [_depth_and_type(site) for site in sites]
        self._types = grouped([(kind, site.d_in, site.d_out)
                               for site, (_, kind) in zip(sites, depths, strict=True)])  # fmt: skip
        layers = sorted({depth for depth, _ in depths})
        layer = [layers.index(depths[place][0]) for members in self._types for place in members]
        kind = [index for index, members in enumerate(self._types) for _ in members]
        self.register_buffer("layer_M", torch.tensor(layer), persistent=False)
        self.register_buffer("type_M", torch.tensor(kind), persistent=False)

        quarter = latent // 4
        task = latent - 2 * quarter
        self.task_encoder = nn.Sequential(nn.Linear(width, task), nn.LayerNorm(task))
        self.layer_embedding = _embedding(len(layers), quarter)
        self.type_embedding = _embedding(len(self._types), quarter)
        self.mixer = nn.Sequential(
            nn.Linear(latent, 4 * latent), nn.SiLU(), nn.Linear(4 * latent, latent), nn.SiLU()
        )
        self.mlp1, self.mlp2 = Residual(latent), Residual(latent)
        self.mlp3 = nn.Sequential(
            nn.LayerNorm(latent),
            nn.Linear(latent, 4 * latent), nn.SiLU(),
            nn.Linear(4 * latent, 4 * latent), nn.SiLU(),
        )  # fmt: skip
        self.factor_embedding = _embedding(2 * len(self._types), latent) if size != "l" else None
        self.row_embedding = _embedding(lora.rank, latent) if size == "s" else None
        starts = common_start(sites, lora.rank, lora.start_seed)
        self.heads = nn.ModuleList(
            ModuleHead(
                4 * latent, size, (sites[members[0]].d_in, sites[members[0]].d_out),
                torch.stack([starts[sites[place].name] for place in members]),
            )
            for members in self._types
        )  # fmt: skip

    def hidden(self, encoded: EncodedInstruction) -> tuple[Tensor, ...]:
        """Return what each module type's head reads, [K, M, F, P, H]."""
        task_KW = self.task_encoder(masked_mean(encoded, next(self.parameters()).dtype))
        place_MW = torch.cat(
            [self.layer_embedding(self.layer_M), self.type_embedding(self.type_M)], dim=-1
        )
        tasks, sites = len(task_KW), len(place_MW)
        joined_KMW = torch.cat(
            [task_KW[:, None].expand(-1, sites, -1), place_MW.expand(tasks, -1, -1)], dim=-1
        )
        mixed_KMFW = self.mlp1(self.mixer(joined_KMW)).unsqueeze(2)
        if self.factor_embedding is not None:
            factors = torch.arange(2, device=self.type_M.device)
            mixed_KMFW = mixed_KMFW + self.factor_embedding(2 * self.type_M[:, None] + factors)
        mixed_KMFPW = self.mlp2(mixed_KMFW).unsqueeze(3)
        if self.row_embedding is not None:
            rows_R = torch.arange(self.rank, device=self.type_M.device)
            mixed_KMFPW = mixed_KMFPW + self.mlp2(self.row_embedding(rows_R))
        return self.mlp3(mixed_KMFPW).split([len(members) for members in self._types], dim=1)

    def rows(self, *hidden: Tensor) -> Iterator[SiteRows]:
        """hidden: [K, M, F, P, H] of each module type."""
        for members, head, input_KMFPH in zip(self._types, self.heads, hidden, strict=True):
            rows_a, rows_b = head(input_KMFPH)
            # `unbind`: each index would fill a gradient of all sites with zeros.
            yield from map(SiteRows, members, rows_a.unbind(1), rows_b.unbind(1))


def _embedding(count: int, features: int) -> nn.Sequential:
    return nn.Sequential(nn.Embedding(count, features), nn.LayerNorm(features))


def _depth_and_type(site: Site) -> tuple[int, str]:
    """Return the number of the site's block, and its name without that number.

    The first number of a name is the block's: encoder.block.3.layer.0.SelfAttention.q is module
    encoder.block.*.layer.0.SelfAttention.q of layer 3. A site outside blocks is of layer 0.
    """
    parts = site.name.split(".")
    for place, part in enumerate(parts):
        if part.isdigit():
            return int(part), ".".join([*parts[:place], "*", *parts[place + 1 :]])
    return 0, site.name
