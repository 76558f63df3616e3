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
from torch.optim.adamw import adamw

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
    that is not active in a step, or whose gradient is not finite, keeps its factors, moments and
    step.
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
        names = [name for name, tensor in self.tensors.items() if tensor.grad is not None]
        gradients = [self._gradient(name) for name in names]
        norms = [torch.linalg.vector_norm(gradient.flatten(1), dim=1) for gradient in gradients]
        norms_K = torch.linalg.vector_norm(torch.stack(norms), dim=0)
        excess_K = ((norms_K + 1e-6) / self.settings.clip_norm).clamp(min=1.0).float()
        rates = self.rates_K()
        moving_K = active_K.to(norms_K.device) & norms_K.isfinite()
        for slot in moving_K.nonzero().flatten().tolist():
            self.steps_K[slot] += 1
            done = [torch.full((), self.steps_K[slot] - 1.0, device=norms_K.device) for _ in names]
            adamw(
                [self.tensors[name][slot] for name in names],
                [gradient[slot] for gradient in gradients],
                [self.exp_avg[name][slot] for name in names],
                [self.exp_avg_sq[name][slot] for name in names],
                [],
                done,
                fused=True,
                grad_scale=excess_K[slot],
                lr=rates[slot],
                beta1=BETAS[0],
                beta2=BETAS[1],
                weight_decay=self.settings.weight_decay,
                eps=EPSILON,
                amsgrad=False,
                maximize=False,
            )
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

    def slot_state(self, slot: int) -> dict[str, Tensor]:
        """Return what `state` returns of one slot."""
        state = {"step": torch.tensor(self.steps_K[slot])}
        for kind, tensors in self._kinds().items():
            for name, tensor in tensors.items():
                state[f"{kind}.{name}"] = tensor[slot].detach().cpu().clone()
        return state

    @torch.no_grad()
    def assign(self, slot: int, total_steps: int, state: Mapping[str, Tensor]) -> None:
        """Give a slot to another schedule: of a state without moments a new one, at step 0.

        state: as `slot_state` returned it, of this or another optimiser.
        """
        self.total_steps_K[slot] = total_steps
        self.steps_K[slot] = int(state.get("step", 0))
        for kind, tensors in self._kinds().items():
            for name, tensor in tensors.items():
                tensor[slot].copy_(state.get(f"{kind}.{name}", torch.zeros(())))

    def _gradient(self, name: str) -> Tensor:
        gradient = self.tensors[name].grad
        assert gradient is not None
        return gradient

    def _kinds(self) -> dict[str, dict[str, Tensor]]:
        return {"model": self.tensors, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
