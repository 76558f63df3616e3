"""Optimisers, the learning-rate schedule, and the optimiser of a bank with its own slots.

Engine parameters use torch's optimisers. The factors of teachers are stacked slot by slot, and a
slot must learn as if it were alone: `SlotAdamW` keeps step, rate, clip norm and moments per slot.

Axes: K slots.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tagi_ray.sections import OptimizerSettings

BETAS = (0.9, 0.999)
EPSILON = 1e-8


def build_optimizer(
    parameters: Iterable[Tensor], settings: OptimizerSettings, learning_rate: float | None = None
) -> torch.optim.Optimizer:
    """Build torch's AdamW or Adafactor. The rate is that of the settings unless given."""
    rate = settings.learning_rate if learning_rate is None else learning_rate
    options: dict[str, Any] = {"lr": rate, "weight_decay": settings.weight_decay}
    if settings.name == "adafactor":
        return torch.optim.Adafactor(parameters, **options)
    return torch.optim.AdamW(parameters, betas=BETAS, eps=EPSILON, **options)


def rate_factor(step: int, total_steps: int, settings: OptimizerSettings) -> float:
    """Multiplier of the learning rate in update `step`, counted from 0.

    Rises linearly over the warm-up and reaches 1 in its last update; then stays, falls linearly to
    0 (first reached after the last update), or falls with the inverse square root of the step.
    """
    warmup = round(settings.warmup_fraction * total_steps)
    if step < warmup:
        return (step + 1) / warmup
    if settings.schedule == "linear":
        return max(total_steps - step, 0) / max(total_steps - warmup, 1)
    if settings.schedule == "inverse_sqrt":
        return (max(warmup, 1) / (step + 1)) ** 0.5
    return 1.0


def clip_gradients(parameters: Iterable[Tensor], clip_norm: float) -> float:
    """Scale all gradients down to a global norm of at most `clip_norm`; return the norm before."""
    return float(torch.nn.utils.clip_grad_norm_(parameters, clip_norm))


class SlotAdamW:
    """AdamW over tensors whose first axis counts slots, each slot with a schedule of its own.

    Equal to K separate `torch.optim.AdamW`, each after `clip_grad_norm_` over its own slot. A slot
    that is not active in a step keeps its factors, moments and step.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        settings: OptimizerSettings,
        total_steps_K: Sequence[int],
        learning_rate: float | None = None,
    ) -> None:
        """`total_steps_K`: updates that each slot will have in all, the length of its schedule.

        Raises ValueError for another optimiser than AdamW, or a tensor without the slot axis.
        """
        if settings.name != "adamw":
            raise ValueError(f"slots are trained with adamw only, not {settings.name}")
        for name, tensor in tensors.items():
            if tensor.shape[0] != len(total_steps_K):
                raise ValueError(f"{name} has {tensor.shape[0]} slots, not {len(total_steps_K)}")
        self.tensors = dict(tensors)
        self.settings = settings
        self.learning_rate = settings.learning_rate if learning_rate is None else learning_rate
        self.total_steps_K = list(total_steps_K)
        self.steps_K = [0] * len(self.total_steps_K)
        self.exp_avg = {name: torch.zeros_like(t) for name, t in self.tensors.items()}
        self.exp_avg_sq = {name: torch.zeros_like(t) for name, t in self.tensors.items()}

    def rates_K(self) -> list[float]:
        """Learning rate of each slot's next update."""
        return [
            self.learning_rate * rate_factor(step, total, self.settings)
            for step, total in zip(self.steps_K, self.total_steps_K, strict=True)
        ]

    @torch.no_grad()
    def step(self, active_K: Tensor) -> Tensor:
        """Update the active slots from the gradients, and drop these.

        active_K: [K] bool. Returns the gradient norm of each slot before clipping, [K].
        """
        active = active_K.nonzero().flatten()
        device = next(iter(self.tensors.values())).device
        squares = [
            t.grad.flatten(1).square().sum(1) for t in self.tensors.values() if t.grad is not None
        ]
        norms_K = torch.stack(squares).sum(0).sqrt()
        if not len(active):
            self.zero_grad()
            return norms_K
        chosen = active.tolist()
        rates = self.rates_K()
        for slot in chosen:
            self.steps_K[slot] += 1

        def per_slot(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float64, device=device)

        steps, rates_A = [self.steps_K[k] for k in chosen], [rates[k] for k in chosen]
        beta1, beta2 = BETAS
        decay = per_slot([1 - rate * self.settings.weight_decay for rate in rates_A])
        size = per_slot([r / (1 - beta1**s) for r, s in zip(rates_A, steps, strict=True)])
        root = per_slot([(1 - beta2**s) ** 0.5 for s in steps])
        index = active.to(device)
        clip = (self.settings.clip_norm / (norms_K[index] + 1e-6)).clamp(max=1.0)
        for name, tensor in self.tensors.items():
            if tensor.grad is None:
                continue

            def wide(values: Tensor, like: Tensor = tensor) -> Tensor:
                return values.to(like.dtype).view(-1, *[1] * (like.dim() - 1))

            gradient = tensor.grad[index] * wide(clip)
            first = self.exp_avg[name][index].lerp_(gradient, 1 - beta1)
            second = self.exp_avg_sq[name][index].mul_(beta2)
            second.addcmul_(gradient, gradient, value=1 - beta2)
            denominator = second.sqrt().div_(wide(root)).add_(EPSILON)
            value = tensor[index] * wide(decay) - wide(size) * first / denominator
            tensor.index_copy_(0, index, value)
            self.exp_avg[name].index_copy_(0, index, first)
            self.exp_avg_sq[name].index_copy_(0, index, second)
        self.zero_grad()
        return norms_K

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for tensor in self.tensors.values():
            tensor.grad = None

    def state(self) -> dict[str, Tensor]:
        """Return factors, moments and steps by name, on the CPU."""
        state = {"step": torch.tensor(self.steps_K)}
        for kind, tensors in self._kinds().items():
            for name, tensor in tensors.items():
                state[f"{kind}.{name}"] = tensor.detach().cpu().clone()
        return state

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what `state` returned."""
        self.steps_K = state["step"].tolist()
        for kind, tensors in self._kinds().items():
            for name, tensor in tensors.items():
                tensor.copy_(state[f"{kind}.{name}"])

    def _kinds(self) -> dict[str, dict[str, Tensor]]:
        return {"model": self.tensors, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
