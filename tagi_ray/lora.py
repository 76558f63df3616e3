"""A bank of low-rank factors for K tasks, and the linears that apply it to their task's rows.

Everything in the method is arithmetic on banks: teachers train one, the hypernetwork generates
one, distillation compares two, export writes a slot of one. A bank is *bound* for the time of a
forward and its backward; with none bound the model is the bare backbone.

Axes: K tasks, N instances, R rank, D features.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from tagi_ray.errors import ConfigError
from tagi_ray.instruction import FusedInstruction


@dataclass(frozen=True, slots=True)
class Site:
    """A linear of the backbone that adapters attach to."""

    name: str
    """Path of the module inside the backbone, as PEFT writes it."""
    d_in: int
    d_out: int
    transposed: bool = False
    """Whether the weight is [D_in, D_out], as in GPT-2's Conv1D."""

    @property
    def module(self) -> str:
        """Last part of the name: q, v, ..."""
        return self.name.rsplit(".", 1)[-1]


class LoraBank(NamedTuple):
    """Factors of K adapters; the update of a site is `scaling * b @ a` (PEFT's orientation).

    A tuple, in which ZeRO's hooks on a module's output find the tensors.
    """

    a: Mapping[str, Tensor]
    """Site name -> [K, R, D_in]."""
    b: Mapping[str, Tensor]
    """Site name -> [K, D_out, R]."""
    scaling: float | Tensor
    """alpha / R; [K, 1, 1] where the slots differ in it."""

    @property
    def slots(self) -> int:
        """Number K of tasks in the bank."""
        return next(iter(self.a.values())).shape[0]

    @property
    def rank(self) -> int:
        """Rank R of the factors."""
        return next(iter(self.a.values())).shape[1]

    def map(self, change: Any) -> LoraBank:
        """Return the bank with `change` applied to every factor."""
        return LoraBank(
            {name: change(factor) for name, factor in self.a.items()},
            {name: change(factor) for name, factor in self.b.items()},
            self.scaling,
        )

    def take(self, slots: Tensor) -> LoraBank:
        """Return the bank of the given slots, in their order. slots: [K'] indices."""

        def taken(factor: Tensor) -> Tensor:
            return factor.index_select(0, slots.to(factor.device))

        scaling = taken(self.scaling) if isinstance(self.scaling, Tensor) else self.scaling
        return self.map(taken)._replace(scaling=scaling)

    def detach(self) -> LoraBank:
        """Return the bank without its gradient history."""
        return self.map(lambda factor: factor.detach())

    def zeroed(self) -> LoraBank:
        """Return the bank with b = 0: the backbone's own output, bit for bit."""
        return LoraBank(
            self.a,
            {name: torch.zeros_like(factor) for name, factor in self.b.items()},
            self.scaling,
        )

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> LoraBank:
        """Return the bank on a device, in a dtype."""
        return self.map(lambda factor: factor.to(device=device, dtype=dtype))


class _Lease(torch.autograd.Function):
    """Identity; knows whether a graph that uses its tensor still awaits its backward."""

    @staticmethod
    def forward(ctx: Any, factor: Tensor, tokens: list[weakref.ref[_Token]]) -> Tensor:
        ctx.token = _Token()
        tokens.append(weakref.ref(ctx.token))
        return factor.view_as(factor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        ctx.token.returned = True
        return gradients[0], None


class _Token:
    """Lives as long as the graph of its lease."""

    __slots__ = ("__weakref__", "returned")

    def __init__(self) -> None:
        self.returned = False


class Binding:
    """The bank and the fused instruction that a backbone applies at the moment, if any."""

    def __init__(self) -> None:
        self.bank: LoraBank | None = None
        self.instruction: FusedInstruction | None = None
        self._leases: list[weakref.ref[_Token]] = []

    def bind(self, bank: LoraBank | None, instruction: FusedInstruction | None = None) -> None:
        """Bind a bank and an instruction.

        Raises RuntimeError when one is bound already, or when a graph through an earlier one
        still awaits its backward: under activation checkpointing its recomputation would read
        the new one and give wrong gradients without a word.
        """
        if self.bank is not None or self.instruction is not None:
            raise RuntimeError("a bank is bound already: leave its `bound(...)` block first")
        if any((token := lease()) is not None and not token.returned for lease in self._leases):
            raise RuntimeError(
                "a forward through an earlier bank still awaits its backward: run backward inside"
                " that bank's `bound(...)` block, or run its forward under torch.no_grad()"
            )
        self._leases = []
        if bank is not None and torch.is_grad_enabled():
            bank = bank.map(self.leased)
        self.bank, self.instruction = bank, instruction

    def unbind(self) -> None:
        """Return to the bare backbone."""
        self.bank, self.instruction = None, None

    def leased(self, tensor: Tensor) -> Tensor:
        """Return a tensor that what is bound is part of: until its backward nothing else is bound."""
        if not (tensor.requires_grad and torch.is_grad_enabled()):
            return tensor
        leased: Tensor = _Lease.apply(tensor, self._leases)  # pyright: ignore[reportAssignmentType]
        return leased


class _Adapted(nn.Module):
    """A frozen layer that adds the bound bank's update to each task's rows.

    Rows of the input are K-major: the first B/K rows belong to slot 0, and so on. The parameters
    are those of the layer it replaces, under their names.
    """

    site: Site
    binding: Binding

    @classmethod
    def replacing(cls, layer: Any, site: Site, binding: Binding) -> Self:
        """Take over the parameters of a layer."""
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made.weight, made.bias = layer.weight, layer.bias
        made.site, made.binding = site, binding
        made.train(layer.training)
        return made

    def updated(self, output: Tensor, input: Tensor) -> Tensor:
        """output: [K*N, ..., D_out], input: [K*N, ..., D_in]."""
        bank = self.binding.bank
        if bank is None:
            return output
        a, b = bank.a[self.site.name], bank.b[self.site.name]
        if input.shape[0] % a.shape[0]:
            raise ValueError(f"{input.shape[0]} rows do not divide among {a.shape[0]} tasks")
        rows = input.reshape(a.shape[0], -1, input.shape[-1])
        # Scaled where it is narrow, and added in the product: two passes over the output less.
        narrow = (bank.scaling * torch.bmm(rows, a.transpose(1, 2))).to(rows.dtype)
        wide = output.reshape(a.shape[0], -1, output.shape[-1])
        return torch.baddbmm(wide, narrow, b.transpose(1, 2)).view_as(output)


class LoraLinear(_Adapted, nn.Linear):
    """A linear with adapters."""

    @classmethod
    def replacing(cls, layer: Any, site: Site, binding: Binding) -> Self:
        """Take over the parameters of a linear."""
        made = super().replacing(layer, site, binding)
        made.in_features, made.out_features = layer.in_features, layer.out_features
        return made

    def forward(self, input: Tensor) -> Tensor:
        """input: [K*N, ..., D_in] -> [K*N, ..., D_out]."""
        return self.updated(functional.linear(input, self.weight, self.bias), input)


class LoraConv1D(_Adapted):
    """GPT-2's Conv1D with adapters: a linear whose weight is [D_in, D_out]."""

    weight: nn.Parameter
    bias: nn.Parameter

    def forward(self, input: Tensor) -> Tensor:
        """input: [K*N, ..., D_in] -> [K*N, ..., D_out]."""
        rows = torch.addmm(self.bias, input.reshape(-1, input.shape[-1]), self.weight)
        return self.updated(rows.view(*input.shape[:-1], self.site.d_out), input)


def inject(model: nn.Module, targets: tuple[str, ...]) -> tuple[tuple[Site, ...], Binding]:
    """Replace the target layers of a model by ones that share one binding.

    Raises ConfigError for a target that no linear or Conv1D of the model has, and for targets of
    both kinds, which no PEFT adapter can name together.
    """
    binding = Binding()
    sites: list[Site] = []
    layers = [(name, layer, _site(name, layer)) for name, layer in model.named_modules()]
    for name, layer, site in layers:
        if site is None or site.module not in targets:
            continue
        adapted = LoraConv1D if site.transposed else LoraLinear
        parent = model.get_submodule(name.rpartition(".")[0])
        setattr(parent, site.module, adapted.replacing(layer, site, binding))
        sites.append(site)
    missing = sorted(set(targets) - {site.module for site in sites})
    if missing:
        present = sorted({site.module for _, _, site in layers if site})
        raise ConfigError([
            f"lora.targets: the backbone has no linear named {', '.join(missing)};"
            f" it has {', '.join(present)}"
        ])  # fmt: skip
    if len({site.transposed for site in sites}) > 1:
        plain = sorted({site.module for site in sites if not site.transposed})
        raise ConfigError([
            f"lora.targets: {', '.join(plain)} and GPT-2's Conv1D layers cannot share a PEFT"
            f" adapter: leave {', '.join(plain)} out"
        ])  # fmt: skip
    return tuple(sites), binding


def _site(name: str, layer: nn.Module) -> Site | None:
    """Return the site that a layer would be."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(layer, nn.Linear):
        return Site(name, layer.in_features, layer.out_features)
    # By its own count: sharded weights have no shape.
    return Site(name, layer.nx, layer.nf, True) if isinstance(layer, Conv1D) else None


@contextmanager
def bound(
    binding: Binding, bank: LoraBank | None, instruction: FusedInstruction | None = None
) -> Iterator[None]:
    """Bind a bank and an instruction for the block, which must span forward and backward.

    None: the bare backbone. The bank's factors must have the dtype of the weights of their sites.
    """
    if bank is None and instruction is None:
        yield
        return
    binding.bind(bank, instruction)
    try:
        yield
    finally:
        binding.unbind()


def common_start(sites: tuple[Site, ...], rank: int, seed: int) -> dict[str, Tensor]:
    """Return the A factors that every teacher and the hypernetwork start from.

    Teachers of one task from different random A have the same update and unrelated factors; only
    from a common start can factors be compared. Drawn on the CPU, so that no device and no
    sharding changes them. Returns site name -> [R, D_in], uniform as in PEFT's initialisation.
    """
    generator = torch.Generator().manual_seed(seed)
    return {
        site.name: (torch.rand(rank, site.d_in, generator=generator, device="cpu") * 2 - 1)
        / site.d_in**0.5
        for site in sites
    }
