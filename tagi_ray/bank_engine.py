"""The engine that trains the factors of teachers, which are no parameters of a model.

Axes: K slots of a bank.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack

import torch
from torch import Tensor

from tagi_ray.batches import Batch
from tagi_ray.lora import LoraBank
from tagi_ray.objectives import LossParts, Totals
from tagi_ray.optim import SlotAdamW
from tagi_ray.sections import StageSettings
from tagi_ray.zero import FrozenModel, State, sum_over_ranks


class BankEngine:
    """Trains the factors of a bank, each slot as if it were alone; gradients summed over ranks."""

    def __init__(
        self,
        frozen: FrozenModel,
        bank: LoraBank,
        settings: StageSettings,
        learning_rate: float,
    ) -> None:
        """`bank`: leaf tensors that require gradients, the ones that `frozen`'s objective trains."""
        self._frozen = frozen
        tensors = {f"{name}.lora_A": factor for name, factor in bank.a.items()}
        tensors |= {f"{name}.lora_B": factor for name, factor in bank.b.items()}
        steps_K = slot_steps(settings.steps, settings.groups, bank.slots)
        self.optimizer = SlotAdamW(tensors, settings.optimizer, steps_K, learning_rate)
        self._active_K = torch.zeros(bank.slots, device=next(iter(bank.a.values())).device)

    def forward(self, batch: Batch, totals: Totals, scope: ExitStack) -> LossParts:
        """Return the micro-batch's share of the step's loss."""
        if torch.is_grad_enabled():
            self._active_K[batch.slots_K] = 1
        return self._frozen.forward(batch, totals, scope)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of one micro-batch."""
        self._frozen.backward(loss)

    def step(self) -> dict[str, float]:
        """Update the slots that any rank had rows of; norm and rate are means over these."""
        tensors = list(self.optimizer.tensors.values())
        gradients = [
            torch.zeros_like(tensor) if tensor.grad is None else tensor.grad for tensor in tensors
        ]
        active_K, *summed = sum_over_ranks([self._active_K, *gradients])
        for tensor, gradient in zip(tensors, summed, strict=True):
            tensor.grad = gradient
        chosen_K = active_K > 0
        rates_K = torch.tensor(self.optimizer.rates_K())
        norms_K = self.optimizer.step(chosen_K)
        self._active_K.zero_()
        return {
            "grad_norm": float(norms_K[chosen_K].mean()),
            "learning_rate": float(rates_K[chosen_K.cpu()].mean()),
        }

    def state(self) -> State:
        """Return factors, moments and steps by slot."""
        return self.optimizer.state()

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Set factors, moments and steps by slot."""
        self.optimizer.restore(state)

    def close(self) -> None:
        """Release what the frozen model holds."""
        self._frozen.close()


def slot_steps(steps: int, groups: int, slots: int) -> list[int]:
    """Return how many of the optimiser steps have rows of each slot, [K].

    Position p belongs to slot p mod `slots`, and step t has positions t*groups to (t+1)*groups.
    """
    if groups >= slots:
        return [steps] * slots
    return [(steps * groups - 1 - slot) // slots + 1 for slot in range(slots)]
