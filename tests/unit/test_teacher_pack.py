"""Teachers trained side by side: each as if stock PEFT had trained it alone."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from tagi_ray.backbone import Backbone
from tagi_ray.encoder_decoder import EncoderDecoder
from tagi_ray.export import write_adapter
from tagi_ray.lora import common_start
from tagi_ray.model import TagiModel
from tagi_ray.optim import rate_factor
from tagi_ray.sections import LoraSettings, OptimizerSettings
from tagi_ray.teacher_pack import Outcome, PackSettings, Teacher, TeacherPack
from tagi_ray.teacher_rows import Row, forwards
from tests.decoders import BEGIN, random_causal_lm, random_decoder, targets_of
from tests.models import VOCABULARY, random_t5

FAMILIES = ("t5", "llama")
OPTIMIZER = OptimizerSettings(
    learning_rate=3e-3, warmup_fraction=0.1, weight_decay=0.01, clip_norm=0.5
)
SETTINGS = PackSettings(OPTIMIZER, log_every=1, start_seed=5, forward_tokens=10)


@dataclass
class DrawnRows:
    """Rows of random tokens, as many and as long as their own seed says."""

    seed: int
    held_out: int = 0
    instances: int = 2
    longest: int = 9
    asked: list[int] = field(default_factory=list)

    def _row(self, *key: int) -> Row:
        drawn = np.random.default_rng([self.seed, *key])

        def ids(least: int, most: int) -> np.ndarray:
            return drawn.integers(3, VOCABULARY, drawn.integers(least, most + 1))

        # To a single token attention has no choice: of a gradient that is zero but for rounding
        # Adam makes steps as long as any.
        return Row(ids(3, self.longest), ids(2, 5))

    def of_step(self, step: int) -> list[Row]:
        self.asked.append(step)
        return [self._row(step % 5, place) for place in range(self.instances)]

    @property
    def valid(self) -> list[Row]:
        return [self._row(100, place) for place in range(self.held_out)]


def teacher(number: int, steps: int = 50, rank: int = 3, **changes: Any) -> Teacher:
    rows = DrawnRows(number, longest=4 + 3 * (number % 4), **changes)
    return Teacher(f"task{number}", rows, steps, rank, alpha=6.0)


def model_of(family: str) -> TagiModel:
    backbone: Backbone = (
        EncoderDecoder(random_t5(), ("q", "v"), "random")
        if family == "t5"
        else random_decoder("llama", torch.float32)
    )
    return TagiModel(backbone, None, None)


def stock_model(family: str) -> Any:
    return random_t5() if family == "t5" else random_causal_lm("llama", torch.float32)


class Trained:
    """What a pack made of some teachers."""

    def __init__(
        self,
        pack: TeacherPack,
        teachers: Sequence[Teacher],
        records: list[dict[str, Any]],
    ) -> None:
        self.pack, self.records = pack, records
        self.outcomes: dict[str, Outcome] = {}
        self.beside: list[list[str]] = []
        queue = iter(teachers)
        while pack.fill(lambda: next(queue, None)):
            self.beside.append(pack.names)
            for outcome in pack.step():
                self.outcomes[outcome.teacher.name] = outcome

    def curve(self, name: str) -> list[float]:
        return [record["loss"] for record in self.records if record["teacher"] == name]

    def factors(self, name: str) -> dict[str, Tensor]:
        bank = self.outcomes[name].bank
        assert bank is not None
        return {f"{site}.{end}": factor[0] for end, half in (("A", bank.a), ("B", bank.b))
                for site, factor in half.items()}  # fmt: skip


def train(
    family: str,
    teachers: Sequence[Teacher],
    width: int,
    settings: PackSettings = SETTINGS,
    rank: int = 4,
) -> Trained:
    records: list[dict[str, Any]] = []
    pack = TeacherPack(model_of(family), settings, width, rank, report=records.append)
    return Trained(pack, teachers, records)


def stock_loss(family: str, model: Any, rows: Sequence[Row]) -> Tensor:
    """Mean over the target tokens, of batches as Transformers' own trainer makes them."""

    def padded(texts: list[list[int]], fill: int) -> Tensor:
        width = max(map(len, texts))
        return torch.tensor([[*text, *[fill] * (width - len(text))] for text in texts])

    sources, targets = [row.source.tolist() for row in rows], [row.target.tolist() for row in rows]
    if family != "t5":
        pairs = list(zip(sources, targets, strict=True))
        sources = [[BEGIN, *source, *target] for source, target in pairs]
        targets = [[*[-100] * (1 + len(source)), *target] for source, target in pairs]
    masks = [[1] * len(source) for source in sources]
    return model(
        input_ids=padded(sources, 0), attention_mask=padded(masks, 0), labels=padded(targets, -100)
    ).loss


def train_alone(family: str, one: Teacher) -> tuple[list[float], dict[str, Tensor]]:
    """Stock PEFT on the stock model, torch's own optimiser and clipping."""
    targets = ["q", "v"] if family == "t5" else list(targets_of("llama"))
    config = LoraConfig(r=one.rank, lora_alpha=one.alpha, target_modules=targets, lora_dropout=0.0)
    model = get_peft_model(stock_model(family), config)
    start = common_start(model_of(family).backbone.sites, one.rank, SETTINGS.start_seed)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for name, parameter in parameters.items():
        if "lora_A" in name:
            parameter.data.copy_(start[_site(name)])
    chosen = SETTINGS.optimizer
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=chosen.learning_rate, weight_decay=chosen.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: rate_factor(step, one.steps, chosen)
    )
    curve: list[float] = []
    for step in range(one.steps):
        optimizer.zero_grad()
        loss = stock_loss(family, model, one.rows.of_step(step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), chosen.clip_norm)
        optimizer.step()
        schedule.step()
        curve.append(loss.item())
    return curve, {
        f"{_site(name)}.{'A' if 'lora_A' in name else 'B'}": parameter.detach()
        for name, parameter in parameters.items()
    }


def _site(name: str) -> str:
    return name.removeprefix("base_model.model.").split(".lora_")[0]


def differs(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("family", FAMILIES)
def test_eight_packed_teachers_equal_their_solo_runs(family: str) -> None:
    """Three slots, so that five are given to another teacher midway; four ranks, all lengths."""
    teachers = [teacher(number, 50 - 4 * (number % 3), rank=1 + number % 4) for number in range(8)]
    packed = train(family, teachers, width=3)
    assert max(map(len, packed.beside)) == 3
    assert len(packed.beside[-1]) < 3  # the pack has narrowed
    for one in teachers:
        curve, factors = train_alone(family, one)
        assert len(curve) == packed.outcomes[one.name].steps == one.steps
        assert packed.curve(one.name) == pytest.approx(curve, abs=1e-5)
        assert curve[-1] < curve[0] - 0.05
        actual = packed.factors(one.name)
        assert actual.keys() == factors.keys()
        for name, expected in factors.items():
            assert differs(actual[name], expected) < 1e-4, name


def test_the_padding_of_smaller_ranks_stays_zero() -> None:
    pack = TeacherPack(model_of("t5"), SETTINGS, 3, rank=4)
    queue = [teacher(number, 8, rank=rank) for number, rank in enumerate((1, 3, 4))]
    while pack.fill(lambda: queue.pop(0) if queue else None):
        bank = pack._layout.bank(pack._factors_KP, torch.ones(len(pack.names), 1, 1))
        for slot, name in enumerate(pack.names):
            rank = {"task0": 1, "task1": 3, "task2": 4}[name]
            for a, b in zip(bank.a.values(), bank.b.values(), strict=True):
                assert not a[slot, rank:].any()
                assert not b[slot, :, rank:].any()
                assert a[slot, :rank].any()
        pack.step()


def not_a_number(one: Teacher) -> Teacher:
    """The teacher, at a step to which no training should have come."""
    pack = TeacherPack(model_of("t5"), SETTINGS, 1, rank=4)
    queue = [one]
    pack.fill(lambda: queue.pop() if queue else None)
    state = pack.state(one.name)
    next(value for name, value in state.tensors.items() if name.endswith("q.lora_B")).fill_(
        math.nan
    )
    return replace(one, state=state)


def test_a_loss_that_is_not_finite_ends_its_own_teacher_alone() -> None:
    teachers = [teacher(0, 12), not_a_number(teacher(1, 12)), teacher(2, 12, rank=2)]
    settings = replace(SETTINGS, forward_tokens=10**6)  # all rows in one forward
    packed = train("t5", [*teachers, teacher(3, 12)], 3, settings)
    failed = packed.outcomes["task1"]
    assert failed.bank is None
    assert failed.steps == 0
    assert failed.failure is not None
    assert "task1: loss is nan at step 1, with learning rate" in failed.failure
    assert not packed.curve("task1")
    assert packed.beside[1] == ["task0", "task3", "task2"]  # its slot went to the next one
    for one in (teacher(0, 12), teacher(2, 12, rank=2), teacher(3, 12)):
        curve, factors = train_alone("t5", one)
        assert packed.curve(one.name) == pytest.approx(curve, abs=1e-5)
        for name, expected in factors.items():
            assert differs(packed.factors(one.name)[name], expected) < 1e-4


def stop_after(steps: int, teachers: Sequence[Teacher], settings: PackSettings) -> list[Teacher]:
    """The teachers where they are after some steps side by side, by way of JSON."""
    pack = TeacherPack(model_of("t5"), settings, len(teachers), rank=4)
    queue = list(teachers)
    for _ in range(steps):
        assert pack.fill(lambda: queue.pop(0) if queue else None)
        assert not pack.step()
    states = {one.name: pack.state(one.name) for one in teachers}
    return [
        replace(one, state=state._replace(progress=json.loads(json.dumps(state.progress))))
        for one in teachers
        for state in [states[one.name]]
    ]


def test_slots_go_on_elsewhere_bit_for_bit() -> None:
    settings = replace(SETTINGS, log_every=5, valid_every=4, patience=9)
    teachers = [teacher(number, 20, rank=1 + number, held_out=3) for number in range(3)]
    whole = train("t5", teachers, 3, settings)
    resumed = train("t5", stop_after(7, teachers, settings), 3, settings)
    assert resumed.records == [record for record in whole.records if record["step"] > 7]
    for one in teachers:
        assert resumed.outcomes[one.name].valid_loss == whole.outcomes[one.name].valid_loss
        for name, expected in whole.factors(one.name).items():
            assert torch.equal(resumed.factors(one.name)[name], expected)


def test_a_slot_goes_on_beside_others_in_a_pack_of_another_rank() -> None:
    teachers = [teacher(number, 20) for number in range(3)]
    moved = stop_after(7, teachers, SETTINGS)[1]
    beside = train("t5", [teacher(5, 6), moved], 2, rank=7)
    curve, factors = train_alone("t5", teachers[1])
    assert beside.curve("task1") == pytest.approx(curve[7:], abs=1e-5)
    for name, expected in factors.items():
        assert differs(beside.factors("task1")[name], expected) < 1e-4


def test_a_teacher_stops_early_and_keeps_its_best_factors() -> None:
    constant = OptimizerSettings(learning_rate=2e-2, schedule="constant", warmup_fraction=0.0)
    settings = PackSettings(constant, valid_every=2, patience=3, log_every=1)
    packed = train("t5", [teacher(0, 400, held_out=4), teacher(1, 9)], 2, settings)
    losses = {r["step"]: r["valid_loss"] for r in packed.records if "valid_loss" in r}
    best = min(losses, key=lambda step: losses[step])
    outcome = packed.outcomes["task0"]
    assert outcome.steps == best + 2 * 3 == max(losses) < 400
    assert outcome.valid_loss == losses[best]
    until_then = train("t5", [teacher(0, best)], 1, settings)
    for name, expected in until_then.factors("task0").items():
        assert differs(packed.factors("task0")[name], expected) < 1e-4


def test_validation_is_the_mean_over_the_held_out_target_tokens() -> None:
    """Of three slots with as many rows as each has, none of them alone in its forward."""
    settings = replace(SETTINGS, forward_tokens=10**6)
    teachers = [teacher(number, 3, held_out=1 + number) for number in range(3)]
    packed = train("t5", teachers, 3, settings)
    backbone = model_of("t5").backbone
    for one in teachers:
        bank, losses = packed.outcomes[one.name].bank, defaultdict(float)
        for row in one.rows.valid:
            source, target = (torch.from_numpy(part)[None, None] for part in row)
            with torch.no_grad(), backbone.bound(bank):
                logits = backbone.logits(source, torch.ones_like(source).bool(), target)
            losses["sum"] -= logits.log_softmax(-1).gather(-1, target[..., None]).sum().item()
            losses["tokens"] += target.numel()
        expected = losses["sum"] / losses["tokens"]
        assert packed.outcomes[one.name].valid_loss == pytest.approx(expected, abs=1e-5)


def test_a_pack_that_has_narrowed_grows_again() -> None:
    pack = TeacherPack(model_of("t5"), SETTINGS, 2, rank=4)
    queue, outcomes = [teacher(0, 2), teacher(1, 6)], []

    def pull() -> Teacher | None:
        return queue.pop(0) if queue else None

    widths: list[int] = []
    while pack.fill(pull):
        widths.append(len(pack.names))
        outcomes += pack.step()
        if len(widths) == 4:
            queue.append(teacher(2, 4))
    assert widths == [2, 2, 1, 1, 2, 2, 1, 1]
    assert [one.teacher.name for one in outcomes] == ["task0", "task1", "task2"]


def test_a_teacher_above_the_packs_rank_is_refused() -> None:
    pack = TeacherPack(model_of("t5"), SETTINGS, 2, rank=4)
    with pytest.raises(ValueError, match="task0 has rank 5, the pack 4"):
        pack.fill(lambda: teacher(0, rank=5))


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_peft_loads_a_teacher_with_the_packs_logits(family: str, tmp_path) -> None:
    teachers = [teacher(number, 6, rank=1 + number) for number in range(3)]
    packed = train(family, teachers, 3)
    backbone, row = packed.pack.model.backbone, teachers[1].rows.of_step(0)[0]
    outcome = packed.outcomes["task1"]
    targets = tuple(sorted({site.module for site in backbone.sites}))
    lora = LoraSettings(rank=2, alpha=6.0, targets=targets)
    write_adapter(
        tmp_path / "task1", outcome.bank, 0, lora=lora, base_model="random",
        task_type=backbone.task_type,
    )  # fmt: skip
    stock: Any = PeftModel.from_pretrained(stock_model(family), tmp_path / "task1").eval()
    source, target = (torch.from_numpy(part)[None, None] for part in row)
    with torch.no_grad(), backbone.bound(outcome.bank):
        ours = backbone.logits(source, torch.ones_like(source).bool(), target)[0]
    with torch.no_grad():
        bare = backbone.logits(source, torch.ones_like(source).bool(), target)[0]
        if family == "t5":
            theirs = stock(input_ids=source[0], labels=target[0]).logits
        else:
            ids = torch.cat([torch.tensor([[BEGIN]]), source[0], target[0]], 1)
            theirs = stock(input_ids=ids).logits[:, source.shape[2] : -1]
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(bare, ours, atol=1e-3)


def test_forwards_cost_least_of_all_divisions() -> None:
    def parts(items: list[int]) -> Any:
        if not items:
            yield []
            return
        first, *rest = items
        for some in parts(rest):
            yield [[first], *some]
            for i in range(len(some)):
                yield [*some[:i], [first, *some[i]], *some[i + 1 :]]

    def cost(groups: list[list[int]], tokens: list[int]) -> int:
        return sum(2 * len(group) * max(tokens[k] for k in group) + 12 for group in groups)

    drawn = np.random.default_rng(0)
    for _ in range(20):
        tokens = drawn.integers(1, 30, 6).tolist()
        groups = forwards(tokens, 2, 12, 10**9)
        assert sorted(k for group in groups for k in group) == list(range(6))
        assert cost(groups, tokens) == min(cost(some, tokens) for some in parts(list(range(6))))


def test_a_forward_has_no_more_tokens_than_it_may_but_of_one_slot() -> None:
    tokens = [5, 50, 5, 5, 5]
    groups = forwards(tokens, 2, 1000, 20)
    assert sorted(map(len, groups)) == [1, 2, 2]
    assert [1] in groups
    assert forwards(tokens, 2, 1000, 10**6) == [[0, 1, 2, 3, 4]]
