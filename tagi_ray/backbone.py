"""The frozen language model behind one small interface.

Model families differ in which linears are sites, how an instruction is encoded, and how it is
fused: `encoder_decoder` and `decoder_only` say how, and nothing else asks which family it is.

Axes: K tasks, N instances, S source tokens, T target tokens, I instruction tokens, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tagi_ray.instruction import EncodedInstruction, FusedInstruction, VirtualTokens
from tagi_ray.lora import Binding, LoraBank, Site, bound, inject
from tagi_ray.method_sections import FusionKind


class Backbone(nn.Module, ABC):
    """A frozen language model with adapter sites.

    Always in evaluation mode: teacher and student must differ in adapters alone, not in dropout.
    """

    fusions: tuple[FusionKind, ...]
    """Kinds of fusion that the family has."""
    task_type: str
    """PEFT's name of what its adapters are for."""

    def __init__(self, model: Any, targets: tuple[str, ...], identity: str) -> None:
        super().__init__()
        self.sites: tuple[Site, ...]
        self.binding: Binding
        self.sites, self.binding = inject(model, targets)
        self.model = model.eval().requires_grad_(False)
        self.identity = identity

    @property
    @abstractmethod
    def width(self) -> int:
        """Features D of the states of an encoded instruction."""

    @property
    @abstractmethod
    def heads(self) -> int:
        """Heads of an attention."""

    @property
    @abstractmethod
    def prefix_shape(self) -> tuple[int, int, int]:
        """Layers that a prefix stands in, heads H of its keys, features E of a head.

        Raises ConfigError for a model without a place for one.
        """

    @property
    @abstractmethod
    def blocks(self) -> nn.ModuleList | list[nn.Module]:
        """Blocks whose activations can be recomputed."""

    @abstractmethod
    def encode(self, ids_KI: Tensor, mask_KI: Tensor) -> EncodedInstruction:
        """Read instructions with the bare model.

        Raises RuntimeError while a bank or an instruction is bound: instructions are what these
        are made from.
        """

    @abstractmethod
    def logits(
        self, input_ids_KNS: Tensor, input_mask_KNS: Tensor, target_ids_KNT: Tensor
    ) -> Tensor:
        """Return logits [K, N, T, V] under teacher forcing; targets are -100 where padded.

        The bank and the fused instruction are those that are bound.
        """

    @abstractmethod
    def decode_greedy(
        self, input_ids_KNS: Tensor, input_mask_KNS: Tensor, max_new_tokens: int
    ) -> Tensor:
        """Return greedily decoded ids [K, N, T], padded after the end of each."""

    def train(self, mode: bool = True) -> Backbone:
        """Stay in evaluation mode."""
        return self

    def checkpoint_activations(self) -> None:
        """Recompute each block's activations in the backward instead of keeping them."""
        self.model.activation_checkpointing_enable({"use_reentrant": False})
        self._recompute(True)

    @property
    def _recomputes(self) -> bool:
        return self.blocks[0].training

    def _recompute(self, switch: bool) -> None:
        for block in self.blocks:
            block.training = switch  # the block's own flag switches recomputation, nothing else

    @contextmanager
    def _kept(self) -> Iterator[None]:
        """Keep activations in the block: a block that recomputes drops the cache."""
        recomputes = self._recomputes
        self._recompute(False)
        try:
            yield
        finally:
            self._recompute(recomputes)

    @contextmanager
    def bound(
        self, bank: LoraBank | VirtualTokens | None, instruction: FusedInstruction | None = None
    ) -> Iterator[None]:
        """Apply a bank and a fused instruction in the block, which must span forward and backward.

        The bank's factors are cast once, here, to the dtype of the weights that they are added to.
        Virtual tokens in a bank's place take the instruction's too.
        """
        if isinstance(bank, VirtualTokens):
            assert instruction is None, "no fusion stands beside virtual tokens"
            keys = bank.prefix[0][0]
            mask_KI = keys.new_ones(keys.shape[0], keys.shape[2], dtype=torch.bool)
            bank, instruction = None, FusedInstruction(mask_KI, prefix=bank.prefix, begun=False)
        if bank is not None:
            dtypes = {s.name: self.model.get_submodule(s.name).weight.dtype for s in self.sites}
            bank = LoraBank(
                {name: bank.a[name].to(dtype) for name, dtype in dtypes.items()},
                {name: bank.b[name].to(dtype) for name, dtype in dtypes.items()},
                bank.scaling,
            )
        with bound(self.binding, bank, instruction):
            yield

    def _refuse_bound(self) -> None:
        if self.binding.bank is not None or self.binding.instruction is not None:
            raise RuntimeError("instructions are encoded without a bank: encode before binding one")


def before_each_row(prefix_KI: Tensor, rows: Tensor, dim: int = 1) -> Tensor:
    """Join [K, I, ...] to each of its task's rows [K*N, S, ...]: [K*N, I + S, ...].

    dim: where I and S stand, if not there.
    """
    rows_KN = rows.unflatten(0, (prefix_KI.shape[0], -1))
    prefix_KN = prefix_KI.unsqueeze(1).expand(-1, rows_KN.shape[1], *prefix_KI.shape[1:])
    return torch.cat([prefix_KN, rows_KN], dim + 1).flatten(0, 1)
