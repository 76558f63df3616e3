"""The schedule, and the packed optimiser of teacher slots against separate ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tagi_ray.optim import SlotAdamW, build_optimizer, clip_gradients, rate_factor
from tagi_ray.sections import OptimizerSettings

SHAPES = {"q.a": (4, 6), "q.b": (5, 4), "v.a": (4, 3)}


def settings(**changes: object) -> OptimizerSettings:
    return OptimizerSettings.model_validate(
        {"learning_rate": 0.05, "schedule": "constant", "warmup_fraction": 0.0, **changes}
    )


def gradients(slots: int, step: int, generator_seed: int = 0) -> dict[str, Tensor]:
    """Gradients that differ by slot in size, so that some slots are clipped and others are not."""
    generator = torch.Generator().manual_seed(1000 * generator_seed + step)
    sizes = torch.logspace(-2, 1, slots)
    return {
        name: torch.randn(slots, *shape, generator=generator) * sizes.view(-1, 1, 1)
        for name, shape in SHAPES.items()
    }


def start(slots: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {n: torch.randn(slots, *shape, generator=generator) for n, shape in SHAPES.items()}


def separate_run(
    slot: int, slots: int, active: list[list[bool]], chosen: OptimizerSettings
) -> dict:
    parameters = {n: t[slot].clone().requires_grad_() for n, t in start(slots).items()}
    optimizer = build_optimizer(parameters.values(), chosen)
    own_steps = [step for step, row in enumerate(active) if row[slot]]
    for done, step in enumerate(own_steps):
        for name, gradient in gradients(slots, step).items():
            parameters[name].grad = gradient[slot].clone()
        clip_gradients(parameters.values(), chosen.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = chosen.learning_rate * rate_factor(done, len(own_steps), chosen)
        optimizer.step()
    return parameters


@pytest.mark.parametrize("schedule", ["constant", "linear", "inverse_sqrt"])
def test_packed_slots_equal_separate_optimizers(schedule: str) -> None:
    chosen = settings(schedule=schedule, warmup_fraction=0.2, weight_decay=0.1, clip_norm=1.0)
    slots, steps = 4, 30
    active = [[(step + slot) % (slot + 1) == 0 for slot in range(slots)] for step in range(steps)]
    totals = [sum(row[slot] for row in active) for slot in range(slots)]
    tensors = {n: t.clone().requires_grad_() for n, t in start(slots).items()}
    packed = SlotAdamW(tensors, chosen, totals)
    for step in range(steps):
        for name, gradient in gradients(slots, step).items():
            tensors[name].grad = gradient
        packed.step(torch.tensor(active[step]))
    assert packed.steps_K == totals
    for slot in range(slots):
        for name, expected in separate_run(slot, slots, active, chosen).items():
            torch.testing.assert_close(
                tensors[name][slot], expected, rtol=0, atol=1e-6, msg=f"slot {slot}, {name}"
            )


def test_slot_without_rows_does_not_move() -> None:
    tensors = {n: t.clone().requires_grad_() for n, t in start(2).items()}
    packed = SlotAdamW(tensors, settings(weight_decay=0.1), [5, 5])
    for name, gradient in gradients(2, 0).items():
        tensors[name].grad = gradient
    packed.step(torch.tensor([True, False]))
    assert packed.steps_K == [1, 0]
    for name, before in start(2).items():
        assert torch.equal(tensors[name][1], before[1])
        assert not torch.equal(tensors[name][0], before[0])
        assert not packed.exp_avg[name][1].any()


def test_restored_slots_continue_exactly() -> None:
    chosen = settings(schedule="linear", warmup_fraction=0.3)

    def run(packed: SlotAdamW, steps: range) -> None:
        for step in steps:
            for name, gradient in gradients(3, step).items():
                packed.tensors[name].grad = gradient
            packed.step(torch.tensor([True, step % 2 == 0, True]))

    def fresh() -> SlotAdamW:
        return SlotAdamW(
            {n: t.requires_grad_() for n, t in start(3).items()}, chosen, total_steps_K=[10, 5, 10]
        )

    whole, first, second = fresh(), fresh(), fresh()
    run(whole, range(10))
    run(first, range(4))
    second.restore(first.state())
    run(second, range(4, 10))
    for name, tensor in whole.tensors.items():
        assert torch.equal(tensor, second.tensors[name])


def test_warm_up_reaches_the_rate_in_its_last_update() -> None:
    chosen = settings(schedule="linear", warmup_fraction=0.1)
    factors = [rate_factor(step, 100, chosen) for step in range(101)]
    assert factors[:10] == pytest.approx([i / 10 for i in range(1, 11)])
    assert max(factors) == 1.0
    assert factors[55] == pytest.approx(0.5)
    assert factors[100] == 0.0


def test_constant_and_inverse_square_root() -> None:
    assert rate_factor(999, 1000, settings(schedule="constant")) == 1.0
    decaying = settings(schedule="inverse_sqrt", warmup_fraction=0.1)
    assert rate_factor(99, 1000, decaying) == 1.0
    assert rate_factor(399, 1000, decaying) == pytest.approx(0.5)


def test_adafactor_is_torchs_own_and_slots_refuse_it() -> None:
    chosen = settings(name="adafactor")
    tensors = {n: t.requires_grad_() for n, t in start(2).items()}
    assert isinstance(build_optimizer(tensors.values(), chosen), torch.optim.Adafactor)
    with pytest.raises(ValueError, match="adamw only"):
        SlotAdamW(tensors, chosen, [1, 1])


def test_a_slot_given_to_another_schedule_starts_anew() -> None:
    chosen = settings(schedule="linear", warmup_fraction=0.2)
    tensors = {n: t.clone().requires_grad_() for n, t in start(2).items()}
    packed = SlotAdamW(tensors, chosen, [20, 20])
    fresh = SlotAdamW({n: t.clone().requires_grad_() for n, t in start(2).items()}, chosen, [6, 6])
    for step in range(10):
        if step == 4:
            packed.assign(1, 6, {f"model.{n}": t[1] for n, t in start(2).items()})
        for name, gradient in gradients(2, step).items():
            packed.tensors[name].grad = gradient
            fresh.tensors[name].grad = gradient.clone()
        packed.step(torch.tensor([True, True]))
        if step >= 4:
            fresh.step(torch.tensor([False, True]))
    assert packed.steps_K == [10, 6]
    for name, tensor in packed.tensors.items():
        assert torch.equal(tensor[1], fresh.tensors[name][1])
        assert not torch.equal(tensor[0], fresh.tensors[name][0])


def test_a_slot_goes_on_in_another_optimizer() -> None:
    chosen = settings(schedule="linear")
    tensors = {n: t.clone().requires_grad_() for n, t in start(3).items()}
    first = SlotAdamW(tensors, chosen, [9, 9, 9])
    second = SlotAdamW({n: torch.zeros(1, *shape) for n, shape in SHAPES.items()}, chosen, [1])
    for step in range(9):
        if step == 5:
            second.assign(0, 9, first.slot_state(2))
        for name, gradient in gradients(3, step).items():
            first.tensors[name].grad = gradient
            second.tensors[name].grad = gradient[2:].clone()
        first.step(torch.tensor([True, True, True]))
        if step >= 5:
            second.step(torch.tensor([True]))
    for name, tensor in second.tensors.items():
        assert torch.equal(tensor[0], first.tensors[name][2])


def test_a_gradient_that_is_not_finite_moves_no_slot() -> None:
    tensors = {n: t.clone().requires_grad_() for n, t in start(3).items()}
    packed = SlotAdamW(tensors, settings(), [5, 5, 5])
    for name, gradient in gradients(3, 0).items():
        tensors[name].grad = gradient
    for slot, bad in ((0, float("nan")), (2, float("inf"))):
        tensors["q.b"].grad[slot, 1, 1] = bad
    norms = packed.step(torch.tensor([True, True, True]))
    assert norms.isfinite().tolist() == [False, True, False]
    assert packed.steps_K == [0, 1, 0]
    for name, before in start(3).items():
        assert torch.equal(tensors[name][0], before[0])
        assert torch.equal(tensors[name][2], before[2])
        assert not torch.equal(tensors[name][1], before[1])
