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
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from tagi_ray.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Site:
    """A linear of the backbone that adapters attach to."""

    name: str
    """Path of the module inside the backbone, as PEFT writes it."""
    d_in: int
    d_out: int

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
    scaling: float
    """alpha / R."""

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
        return self.map(lambda factor: factor.index_select(0, slots.to(factor.device)))

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
    """Identity on a factor; knows whether a graph that uses the factor still awaits its backward."""

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
    """The bank that a backbone's linears apply at the moment, if any."""

    def __init__(self) -> None:
        self.bank: LoraBank | None = None
        self._leases: list[weakref.ref[_Token]] = []

    def bind(self, bank: LoraBank) -> None:
        """Bind a bank.

        Raises RuntimeError when one is bound already, or when a graph through an earlier bank
        still awaits its backward: under activation checkpointing its recomputation would read
        the new bank and give wrong gradients without a word.
        """
        if self.bank is not None:
            raise RuntimeError("a bank is bound already: leave its `bound(...)` block first")
        if any((token := lease()) is not None and not token.returned for lease in self._leases):
            raise RuntimeError(
                "a forward through an earlier bank still awaits its backward: run backward inside"
                " that bank's `bound(...)` block, or run its forward under torch.no_grad()"
            )
        self._leases = []
        if torch.is_grad_enabled():
            bank = bank.map(self._lease)
        self.bank = bank

    def unbind(self) -> None:
        """Return to the bare backbone."""
        self.bank = None

    def _lease(self, factor: Tensor) -> Tensor:
        if not factor.requires_grad:
            return factor
        leased: Tensor = _Lease.apply(factor, self._leases)  # pyright: ignore[reportAssignmentType]
        return leased


class LoraLinear(nn.Linear):
    """A frozen linear that adds the bound bank's update to each task's rows.

    Rows of the input are K-major: the first B/K rows belong to slot 0, and so on. The parameters
    keep the names they have in the linear it replaces.
    """

    site: Site
    binding: Binding

    @classmethod
    def from_linear(cls, linear: nn.Linear, site: Site, binding: Binding) -> LoraLinear:
        """Take over the parameters of a linear."""
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made.in_features, made.out_features = linear.in_features, linear.out_features
        made.weight, made.bias = linear.weight, linear.bias
        made.site, made.binding = site, binding
        made.train(linear.training)
        return made

    def forward(self, input: Tensor) -> Tensor:
        """input: [K*N, ..., D_in] -> [K*N, ..., D_out]."""
        output = functional.linear(input, self.weight, self.bias)
        bank = self.binding.bank
        if bank is None:
            return output
        a, b = bank.a[self.site.name], bank.b[self.site.name]
        if input.shape[0] % a.shape[0]:
            raise ValueError(f"{input.shape[0]} rows do not divide among {a.shape[0]} tasks")
        rows = input.reshape(a.shape[0], -1, input.shape[-1])
        update = torch.bmm(torch.bmm(rows, a.transpose(1, 2)), b.transpose(1, 2))
        return output + (bank.scaling * update).view_as(output)


def inject(model: nn.Module, targets: tuple[str, ...]) -> tuple[tuple[Site, ...], Binding]:
    """Replace the target linears of a model by `LoraLinear`s that share one binding.

    Raises ConfigError for a target that no linear of the model has.
    """
    binding = Binding()
    sites: list[Site] = []
    linears = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    for name, linear in linears:
        site = Site(name, linear.in_features, linear.out_features)
        if site.module not in targets:
            continue
        parent = model.get_submodule(name.rpartition(".")[0])
        setattr(parent, site.module, LoraLinear.from_linear(linear, site, binding))
        sites.append(site)
    missing = sorted(set(targets) - {site.module for site in sites})
    if missing:
        present = sorted({name.rsplit(".", 1)[-1] for name, _ in linears})
        raise ConfigError([
            f"lora.targets: the backbone has no linear named {', '.join(missing)};"
            f" it has {', '.join(present)}"
        ])  # fmt: skip
    return tuple(sites), binding


@contextmanager
def bound(binding: Binding, bank: LoraBank | None) -> Iterator[None]:
    """Bind a bank for the block, which must span forward and backward. None: bare backbone.

    Its factors must have the dtype of the weights of their sites.
    """
    if bank is None:
        yield
        return
    binding.bind(bank)
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
