"""Engines on spawned gloo ranks, against plain torch and against themselves after a restore."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tagi_ray.bank_engine import BankEngine, slot_steps
from tagi_ray.lora import LoraBank
from tagi_ray.objectives import LossParts, Objective
from tagi_ray.optim import build_optimizer, clip_gradients, rate_factor
from tagi_ray.sections import ResourceSettings, StageSettings
from tagi_ray.zero import Engine, FrozenModel, ZeroEngine, sum_over_ranks
from tests.ray.ranks import on_ranks

GROUPS, FEATURES, STEPS = 8, 6, 6


@dataclass
class Rows:
    """Stands in for a batch: what an engine itself reads of one is `slots_K`."""

    inputs: Tensor
    targets: Tensor
    slots_K: Tensor


class Model(nn.Module):
    """A frozen layer below a trained one, like a backbone and what is trained with it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.frozen = nn.Linear(FEATURES, 5).requires_grad_(False)
        self.trained = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))

    def trainable(self) -> dict[str, nn.Parameter]:
        return {n: p for n, p in self.named_parameters() if p.requires_grad}


def squared_error(model: Any, batch: Any, totals: dict[str, Tensor], scope: ExitStack) -> LossParts:
    output = model.trained(model.frozen(batch.inputs))
    loss = (output - batch.targets).square().sum() / totals["rows"]
    return LossParts(loss, {"error": loss.detach()})


def row_count(batch: Any) -> dict[str, Tensor]:
    return {"rows": torch.tensor(float(len(batch.inputs)))}


OBJECTIVE = Objective(("input",), row_count, squared_error)


def bank_objective(bank: LoraBank) -> Objective:
    def loss(model: Any, batch: Any, totals: dict[str, Tensor], scope: ExitStack) -> LossParts:
        a, b = bank.a["site"][batch.slots_K], bank.b["site"][batch.slots_K]
        output = torch.einsum("kor,krd,kd->ko", b, a, model.layer(batch.inputs))
        each = (output - batch.targets).square().sum(1)
        value = (each / totals["rows"][batch.slots_K]).sum()
        return LossParts(value, {"error": value.detach()})

    def denominators(batch: Any) -> dict[str, Tensor]:
        return {"rows": torch.bincount(batch.slots_K, minlength=bank.slots).float()}

    return Objective(("input",), denominators, loss)


def settings(micro_groups: int = 2, **optimizer: object) -> StageSettings:
    optimizer = {"learning_rate": 0.05, "warmup_fraction": 0.4, "clip_norm": 0.7, **optimizer}
    return StageSettings.model_validate(
        {"steps": STEPS, "groups": GROUPS, "micro_groups": micro_groups, "optimizer": optimizer}
    )


def rows(position: int, slots: int) -> Rows:
    generator = torch.Generator().manual_seed(position)
    inputs, targets = (torch.randn(1, n, generator=generator) * 2 for n in (FEATURES, 3))
    return Rows(inputs, targets, torch.tensor([position % slots]))


def micro_batches(step: int, rank: int, world: int, micro: int, slots: int) -> list[Rows]:
    """Position p goes to rank p mod world, as in the order plan."""
    mine = [p for p in range(step * GROUPS, (step + 1) * GROUPS) if p % world == rank]
    cut = [mine[i : i + micro] for i in range(0, len(mine), micro)]
    names = ("inputs", "targets", "slots_K")
    return [
        Rows(*(torch.cat([getattr(rows(p, slots), name) for p in part]) for name in names))
        for part in cut
    ]


def train(
    engine: Engine, objective: Objective, first: int, last: int, micro: int, slots: int = 1
) -> list[float]:
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    losses = []
    for step in range(first, last):
        batches = micro_batches(step, rank, world, micro, slots)
        counts = [objective.denominators(batch)["rows"] for batch in batches]
        (total,) = sum_over_ranks([torch.stack(counts).sum(0)])
        share = torch.zeros(())
        for batch in batches:
            with ExitStack() as scope:
                result = engine.forward(batch, {"rows": total}, scope)
                engine.backward(result.loss)
            share = share + result.parts["error"]
        engine.step()
        losses.append(float(sum_over_ranks([share])[0]))
    return losses


@dataclass(frozen=True)
class Case:
    """A training on some ranks, from the start or from a saved state."""

    resources: dict[str, Any]
    first: int = 0
    last: int = STEPS
    restore: str | None = None
    save: str | None = None
    optimizer: dict[str, Any] = field(default_factory=dict)


def zero_worker(folder: Path, case: Case) -> dict[str, Tensor]:
    torch.manual_seed(dist.get_rank())  # ranks must agree through their data alone
    chosen = settings(**case.optimizer)
    model = Model()
    if case.restore:
        with torch.no_grad():  # a fresh engine has other values: only the restored ones may count
            for parameter in model.trainable().values():
                parameter.add_(1.0)
    resources = ResourceSettings.model_validate(case.resources)
    rate = chosen.optimizer.learning_rate
    engine = ZeroEngine(model, OBJECTIVE, chosen, resources, rate, torch.device("cpu"))
    if case.restore:
        engine.restore(load_file(folder / case.restore))
    losses = train(engine, OBJECTIVE, case.first, case.last, chosen.micro_groups)
    state = engine.state()
    assert bool(state) == (dist.get_rank() == 0)
    if case.save and state:
        save_file(state, folder / case.save)
    engine.close()
    return {"losses": torch.tensor(losses), **{k: v for k, v in state.items() if "model." in k}}


def start_bank() -> LoraBank:
    generator = torch.Generator().manual_seed(5)
    a = torch.randn(3, 2, FEATURES, generator=generator).requires_grad_()
    b = torch.randn(3, 3, 2, generator=generator).requires_grad_()
    return LoraBank({"site": a}, {"site": b}, 1.0)


class Frozen(nn.Module):
    """The frozen layer that rows pass before they reach the bank."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layer = nn.Linear(FEATURES, FEATURES).requires_grad_(False)


def bank_worker(folder: Path, stage: int) -> dict[str, Tensor]:
    bank = start_bank()
    chosen = settings()
    frozen = FrozenModel(
        Frozen(), bank_objective(bank), chosen, ResourceSettings(zero_stage=stage),
        torch.device("cpu"),
    )  # fmt: skip
    engine = BankEngine(frozen, bank, chosen, chosen.optimizer.learning_rate)
    losses = train(engine, bank_objective(bank), 0, STEPS, chosen.micro_groups, slots=3)
    state = engine.state()
    engine.close()
    return {"losses": torch.tensor(losses), **state}


@pytest.fixture(scope="module")
def plain() -> dict[str, Tensor]:
    """The same training in one process, the whole step in one batch, with torch alone."""
    return plain_run()


def plain_run(**options: object) -> dict[str, Tensor]:
    chosen, model = settings(**options), Model()
    parameters = model.trainable()
    optimizer = build_optimizer(parameters.values(), chosen.optimizer)
    losses = []
    for step in range(STEPS):
        (batch,) = micro_batches(step, 0, 1, GROUPS, 1)
        result = squared_error(model, batch, {"rows": torch.tensor(float(GROUPS))}, ExitStack())
        optimizer.zero_grad()
        result.loss.backward()
        assert clip_gradients(parameters.values(), chosen.optimizer.clip_norm) > 0.7
        factor = rate_factor(step, STEPS, chosen.optimizer)
        optimizer.param_groups[0]["lr"] = chosen.optimizer.learning_rate * factor
        optimizer.step()
        losses.append(result.loss.item())
    weights = {f"model.{n}": p.detach().clone() for n, p in parameters.items()}
    return {"losses": torch.tensor(losses), **weights}


def assert_equal(
    actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float, what: str = ""
) -> None:
    for key, value in expected.items():
        torch.testing.assert_close(
            actual[key], value, rtol=tolerance, atol=tolerance, msg=f"{what} {key}: {actual[key]}"
        )


OFFLOADED = {"zero_stage": 2, "offload_optimizer": True}
ALL_OFFLOADED = {"zero_stage": 3, "offload_optimizer": True, "offload_parameters": True}
SHARDINGS: list[dict[str, Any]] = [
    *({"zero_stage": stage} for stage in range(4)), OFFLOADED, ALL_OFFLOADED
]  # fmt: skip


@pytest.mark.parametrize("world", [1, 2])
def test_ranks_and_accumulation_equal_plain_torch(
    world: int, plain: dict[str, Tensor], tmp_path: Path
) -> None:
    cases = [Case(resources) for resources in SHARDINGS]
    for case, result in zip(cases, on_ranks(world, tmp_path, zero_worker, cases), strict=True):
        assert_equal(result, plain, 1e-5, str(case.resources))


def test_restored_run_continues_on_other_ranks_and_sharding(
    plain: dict[str, Tensor], tmp_path: Path
) -> None:
    saved = [Case(sharding, last=3, save=str(i)) for i, sharding in enumerate(SHARDINGS)]
    on_ranks(2, tmp_path, zero_worker, saved)
    expected = {**plain, "losses": plain["losses"][3:]}
    other = [*SHARDINGS[3:], *SHARDINGS[:3]]  # each state goes on in another sharding
    for world in (1, 2):
        moved = [Case(sharding, first=3, restore=str(i)) for i, sharding in enumerate(other)]
        for case, result in zip(moved, on_ranks(world, tmp_path, zero_worker, moved), strict=True):
            assert_equal(result, expected, 1e-5, f"{case.restore} -> {case.resources}")


def test_restored_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    shardings = [SHARDINGS[stage] for stage in (0, 2, 3)]
    saved = [Case(sharding, last=3, save=str(i)) for i, sharding in enumerate(shardings)]
    again = [Case(sharding, first=3, restore=str(i)) for i, sharding in enumerate(shardings)]
    whole = [Case(sharding) for sharding in shardings]
    results = on_ranks(2, tmp_path, zero_worker, [*saved, *again, *whole])
    for continued, uninterrupted in zip(results[3:6], results[6:], strict=True):
        expected = {**uninterrupted, "losses": uninterrupted["losses"][3:]}
        assert_equal(continued, expected, 0.0)


def test_adafactor_survives_a_restore(tmp_path: Path) -> None:
    options = {"name": "adafactor"}
    on_ranks(1, tmp_path, zero_worker, [Case(SHARDINGS[0], last=3, save="s", optimizer=options)])
    continued = Case(SHARDINGS[0], first=3, restore="s", optimizer=options)
    (result,) = on_ranks(2, tmp_path, zero_worker, [continued])
    expected = plain_run(**options)
    assert_equal(result, {**expected, "losses": expected["losses"][3:]}, 1e-5)


def test_bank_is_the_same_on_two_ranks_and_above_sharded_weights(tmp_path: Path) -> None:
    one, one_sharded = on_ranks(1, tmp_path, bank_worker, [0, 3])
    two, two_sharded = on_ranks(2, tmp_path, bank_worker, [0, 3])
    for other in (one_sharded, two, two_sharded):
        assert_equal(other, one, 1e-5)
    assert one["losses"][-1] < one["losses"][0]


@pytest.mark.parametrize(
    ("steps", "groups", "slots"), [(5, 3, 7), (4, 8, 3), (1, 2, 5), (10, 1, 3)]
)
def test_slot_steps_count_the_steps_with_rows(steps: int, groups: int, slots: int) -> None:
    counted = [0] * slots
    for step in range(steps):
        for slot in {p % slots for p in range(step * groups, (step + 1) * groups)}:
            counted[slot] += 1
    assert slot_steps(steps, groups, slots) == counted
