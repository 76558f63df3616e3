"""Teachers trained side by side: K slots on one frozen backbone, each as if it were alone.

One forward and backward serves all slots. Their loss is the sum of the means over each teacher's
own target tokens, so that no gradient of a slot depends on another's rows; clip norm, schedule and
early stop are a slot's own. A teacher that is done leaves its slot to the next one, and where there
is none the pack narrows.

Axes: K slots, G slots of one forward, N instances, S source and T target tokens, R rank, D features,
P numbers of a slot's factors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from tagi_ray.factor_layout import FactorLayout
from tagi_ray.lora import LoraBank, common_start
from tagi_ray.losses import cross_entropy
from tagi_ray.model import TagiModel
from tagi_ray.optim import SlotAdamW
from tagi_ray.sections import OptimizerSettings
from tagi_ray.teacher_rows import Row, even, forwards, padded, target_tokens

FACTORS = "factors"
"""Name of all of a slot's factors in its optimiser."""
KINDS = ("model", "exp_avg", "exp_avg_sq")

Record = dict[str, Any]


class Rows(Protocol):
    """What a teacher reads."""

    @property
    def valid(self) -> Sequence[Row]:
        """Rows that it is validated on; none without validation."""
        ...

    def of_step(self, step: int) -> Sequence[Row]:
        """Return the n rows of a step, counted from 0: as many for all teachers of a pack."""
        ...


@dataclass(frozen=True, slots=True)
class PackSettings:
    """How each teacher of a pack is trained."""

    optimizer: OptimizerSettings
    valid_every: int = 0
    """Own steps between two validations (0: after the last one only)."""
    patience: int = 0
    """Validations in a row without a better loss after which a teacher is done (0: never early)."""
    log_every: int = 50
    """Own steps between two records."""
    start_seed: int = 0
    """Of the common A."""
    forward_tokens: int = 256
    """Tokens that take as long as a forward costs whatever it reads; a fast device has more."""
    most_tokens: int = 1024
    """Tokens of one forward, which bound what it holds; a teacher whose own are more has one alone.
    A CPU is fastest where its caches hold them, a GPU has room for more."""


class SlotState(NamedTuple):
    """A teacher on its way, without padding: it goes on in any pack whose rank is not smaller."""

    tensors: dict[str, Tensor]
    """KIND.SITE.lora_A and _B; KIND is of `KINDS`, or `best`."""
    progress: dict[str, Any]
    """Numbers that JSON holds."""


@dataclass(frozen=True, slots=True, eq=False)
class Teacher:
    """One adapter to be trained."""

    name: str
    rows: Rows
    steps: int
    rank: int
    alpha: float
    state: SlotState | None = None
    """Where it goes on; None: at the start."""


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """A teacher that has left its slot."""

    teacher: Teacher
    steps: int
    """Updates it had, fewer than planned if it failed or no longer got better."""
    loss: float
    """Of the steps since its last record."""
    valid_loss: float | None
    """The best; None without validation."""
    bank: LoraBank | None
    """Its factors on the CPU, the best in validation, as a bank of one slot; None if it failed."""
    failure: str | None = None


@dataclass(slots=True)
class _Progress:
    """What a slot remembers besides its tensors."""

    loss_sum: float = 0.0
    loss_count: int = 0
    best_loss: float | None = None
    misses: int = 0
    """Validations since the best one."""


@dataclass(slots=True)
class _Slot:
    teacher: Teacher
    progress: _Progress = field(default_factory=_Progress)
    best_P: Tensor | None = None
    """On the CPU."""


class TeacherPack:
    """Up to `width` teachers in training.

    Used as `while pack.fill(pull): outcomes += pack.step()`.
    """

    def __init__(
        self,
        model: TagiModel,
        settings: PackSettings,
        width: int,
        rank: int,
        device: torch.device | str = "cpu",
        report: Callable[[Record], None] = lambda record: None,
    ) -> None:
        """rank: the largest of all teachers to come; the factors of others are padded with zeros,
        which stay zeros.

        report: called with each teacher's records.
        """
        self.model, self.settings, self.width = model, settings, width
        self._sites, self._layout = model.backbone.sites, FactorLayout(model.backbone.sites, rank)
        self._device, self._report = torch.device(device), report
        self._starts: dict[int, Tensor] = {}
        self._slots: list[_Slot | None] = []
        self._resize(0)

    @property
    def names(self) -> list[str]:
        """Teachers in training."""
        return [slot.teacher.name for slot in self._slots if slot is not None]

    def fill(self, pull: Callable[[], Teacher | None]) -> bool:
        """Give free slots to the next teachers, and drop those for which there is none.

        Returns whether any teacher is in training. Raises ValueError for a rank above the pack's.
        """
        fresh: list[_Slot] = []
        staying = sum(slot is not None for slot in self._slots)
        while staying + len(fresh) < self.width and (teacher := pull()) is not None:
            if teacher.rank > self._layout.rank:
                raise ValueError(
                    f"{teacher.name} has rank {teacher.rank}, the pack {self._layout.rank}"
                )
            fresh.append(_Slot(teacher))
        if staying + len(fresh) != len(self._slots):
            self._resize(staying + len(fresh))
        for number, slot in enumerate(self._slots):
            if slot is None:
                self._start(number, fresh.pop(0))
        scaling = [slot.teacher.alpha / slot.teacher.rank for slot in self._all]
        self._scaling_K11 = torch.tensor(scaling, device=self._device).view(-1, 1, 1)
        return bool(self._slots)

    def step(self) -> list[Outcome]:
        """Train every slot by one update; return the teachers that are done with it, or failed.

        A loss or gradient that is not finite ends its teacher, and reaches no other.
        """
        slots, steps, rates = self._all, list(self._optimizer.steps_K), self._optimizer.rates_K()
        losses_K = self._backward([
            slot.teacher.rows.of_step(step) for slot, step in zip(slots, steps, strict=True)
        ])  # fmt: skip
        norms_K = self._optimizer.step(losses_K.isfinite())
        values = torch.stack([losses_K, norms_K], 1).tolist()
        moved = [all(map(math.isfinite, pair)) for pair in values]
        valid = self._validate([k for k in range(len(slots)) if moved[k] and self._is_judged(k)])
        outcomes: list[Outcome] = []
        for k, (loss, norm) in enumerate(values):
            record = {"learning_rate": rates[k], "grad_norm": norm}
            if moved[k]:
                outcome = self._after(k, slots[k], loss, valid.get(k), record)
            else:
                outcome = _failed(slots[k].teacher, steps[k], loss, record)
            if outcome is not None:
                self._slots[k] = None
                outcomes.append(outcome)
        return outcomes

    def state(self, name: str) -> SlotState:
        """Return all that a teacher in training needs to go on in another pack."""
        k, slot = next((k, s) for k, s in enumerate(self._slots) if s and s.teacher.name == name)
        kept, rank = self._optimizer.slot_state(k), slot.teacher.rank
        rows = {kind: kept[f"{kind}.{FACTORS}"] for kind in KINDS}
        if slot.best_P is not None:
            rows["best"] = slot.best_P
        tensors = {
            f"{kind}.{name}": factor
            for kind, row_P in rows.items()
            for name, factor in self._layout.named(row_P, rank).items()
        }
        return SlotState(tensors, {"step": int(kept["step"]), **asdict(slot.progress)})

    @property
    def _all(self) -> list[_Slot]:
        """The slots, all of which have a teacher between `fill` and the end of `step`."""
        assert all(slot is not None for slot in self._slots), "fill the pack first"
        return [slot for slot in self._slots if slot is not None]

    @property
    def _factors_KP(self) -> Tensor:
        return self._optimizer.tensors[FACTORS]

    def _resize(self, width: int) -> None:
        """Keep the teachers that are in training, in their order, and `width` slots in all."""
        kept = [
            (slot, self._optimizer.slot_state(k))
            for k, slot in enumerate(self._slots)
            if slot is not None
        ]
        factors_KP = torch.zeros(width, self._layout.numbers, device=self._device)
        self._optimizer = SlotAdamW({FACTORS: factors_KP}, self.settings.optimizer, [0] * width)
        self._slots = [None] * width
        for k, (slot, state) in enumerate(kept):
            self._slots[k] = slot
            self._optimizer.assign(k, slot.teacher.steps, state)

    def _start(self, k: int, slot: _Slot) -> None:
        """Put a teacher into a slot: at the common start, or where its state is."""
        teacher, state = slot.teacher, slot.teacher.state
        if state is None:
            kept = {f"model.{FACTORS}": self._start_of(teacher.rank)}
        else:
            rows = {kind: self._layout.padded(state.tensors, f"{kind}.") for kind in KINDS}
            kept = {f"{kind}.{FACTORS}": row_P for kind, row_P in rows.items()}
            progress = dict(state.progress)
            kept["step"] = torch.tensor(progress.pop("step"))
            slot.progress = _Progress(**progress)
            if slot.progress.best_loss is not None:
                slot.best_P = self._layout.padded(state.tensors, "best.")
        self._optimizer.assign(k, teacher.steps, kept)
        self._slots[k] = slot

    def _start_of(self, rank: int) -> Tensor:
        """Return the common A of a rank with B = 0, [P]."""
        if rank not in self._starts:
            start = common_start(self._sites, rank, self.settings.start_seed)
            named = {f"{name}.lora_A": a_RD for name, a_RD in start.items()}
            self._starts[rank] = self._layout.padded(named)
        return self._starts[rank]

    def _backward(self, rows_KN: Sequence[Sequence[Row]]) -> Tensor:
        """Set the gradient of every slot's mean loss; return these losses, [K]."""
        factors_KP, groups = self._factors_KP, self._forwards(rows_KN)
        losses_K = torch.zeros(len(rows_KN), device=self._device)
        gradients_KP = torch.empty_like(factors_KP) if len(groups) > 1 else None
        for group in groups:
            # All slots in one forward need no copy: they are in their own order.
            own_GP = factors_KP if gradients_KP is None else factors_KP[group]
            leaf_GP = own_GP.detach().requires_grad_()
            rows_GN = [rows_KN[k] for k in group]
            tokens_G = torch.tensor(target_tokens(rows_GN), device=self._device)
            with self._bound(leaf_GP, group):
                means_G = self._sums(rows_GN) / tokens_G
                means_G.sum().backward()
            losses_K[group] = means_G.detach()
            if gradients_KP is None:
                factors_KP.grad = leaf_GP.grad
            else:
                assert leaf_GP.grad is not None
                gradients_KP[group] = leaf_GP.grad
        if gradients_KP is not None:
            factors_KP.grad = gradients_KP
        return losses_K

    def _forwards(self, rows_KN: Sequence[Sequence[Row]]) -> list[list[int]]:
        tokens_K = [max(row.tokens for row in rows_N) for rows_N in rows_KN]
        limits = self.settings.forward_tokens, self.settings.most_tokens
        return forwards(tokens_K, len(rows_KN[0]), *limits)

    def _bound(self, factors_GP: Tensor, slots: Sequence[int]) -> AbstractContextManager[None]:
        bank = self._layout.bank(factors_GP, self._scaling_K11[list(slots)])
        return self.model.backbone.bound(bank)

    def _sums(self, rows_GN: Sequence[Sequence[Row]]) -> Tensor:
        """Return the summed loss of each slot's rows under the bound bank, [G]."""
        ids, mask, targets = (tensor.to(self._device) for tensor in padded(rows_GN))
        return cross_entropy(self.model.backbone.logits(ids, mask, targets), targets)

    def _is_judged(self, k: int) -> bool:
        """Say whether a slot is validated after the update that it just had."""
        step, teacher = self._optimizer.steps_K[k], self._all[k].teacher
        due = step == teacher.steps or _due(step, self.settings.valid_every)
        return due and len(teacher.rows.valid) > 0

    @torch.no_grad()
    def _validate(self, slots: Sequence[int]) -> dict[int, float]:
        """Return slot -> mean loss over the target tokens of its held-out rows."""
        if not slots:
            return {}
        held = [self._all[k].teacher.rows.valid for k in slots]
        tokens, held = target_tokens(held), even(held)
        losses: dict[int, float] = {}
        for group in self._forwards(held):
            chosen = [slots[number] for number in group]
            with self._bound(self._factors_KP[chosen], chosen):
                sums_G = self._sums([held[number] for number in group])
            for number, total in zip(group, sums_G.tolist(), strict=True):
                losses[slots[number]] = total / tokens[number]
        return losses

    def _after(
        self, k: int, slot: _Slot, loss: float, valid_loss: float | None, record: Record
    ) -> Outcome | None:
        """Take note of a slot's update; return what came out if it was the last."""
        step, settings = self._optimizer.steps_K[k], self.settings
        teacher, progress = slot.teacher, slot.progress
        progress.loss_sum, progress.loss_count = progress.loss_sum + loss, progress.loss_count + 1
        if valid_loss is not None:
            record["valid_loss"] = valid_loss
            progress.misses += 1
            if valid_loss < (math.inf if progress.best_loss is None else progress.best_loss):
                progress.best_loss, progress.misses = valid_loss, 0
                slot.best_P = self._factors_KP[k].cpu().clone()
        done = step == teacher.steps or 0 < settings.patience <= progress.misses
        if not (done or valid_loss is not None or _due(step, settings.log_every)):
            return None
        mean = progress.loss_sum / progress.loss_count
        progress.loss_sum, progress.loss_count = 0.0, 0
        place = {"teacher": teacher.name, "step": step, "steps": teacher.steps}
        self._report({**place, "loss": mean, **record})
        if not done:
            return None
        chosen_P = self._factors_KP[k] if slot.best_P is None else slot.best_P
        bank = self._layout.alone(chosen_P, teacher.rank, teacher.alpha)
        return Outcome(teacher, step, mean, progress.best_loss, bank)


def _failed(teacher: Teacher, step: int, loss: float, record: Record) -> Outcome:
    """step: updates before the one that failed."""
    norm, rate = record["grad_norm"], record["learning_rate"]
    what = f"loss is {loss}" if not math.isfinite(loss) else f"grad_norm is {norm}"
    failure = (
        f"{teacher.name}: {what} at step {step + 1}, with learning rate {rate:g}: lower the rate,"
        " or the norm that gradients are clipped to (optimizer.clip_norm)"
    )
    return Outcome(teacher, step, loss, None, None, failure)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
