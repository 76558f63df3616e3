"""The width of a pack: where doubling gains nothing, or does not fit; and the benchmark of packs."""

from __future__ import annotations

import numpy as np
import pytest

from tagi_ray import pack_width as module
from tagi_ray.benchmarks.shapes import Shape
from tagi_ray.benchmarks.teachers import teacher_case
from tagi_ray.model import TagiModel
from tagi_ray.pack_width import PackWidth, pack_width
from tagi_ray.sections import OptimizerSettings
from tagi_ray.teacher_pack import PackSettings
from tagi_ray.teacher_rows import Row
from tests.models import random_backbone

SETTINGS = PackSettings(OptimizerSettings(), most_tokens=28)
GIB = 2**30


def row(length: int) -> Row:
    return Row(np.arange(3, 3 + length, dtype=np.int32), np.asarray([4, 1], np.int32))


def chosen(memory: int = GIB, most: int = 64, longest: int = 5) -> PackWidth:
    model = TagiModel(random_backbone(), None, None)
    return pack_width(
        model, SETTINGS, [row(5)], [row(longest)], rank=4, memory=memory, most=most, rounds=1
    )


@pytest.fixture
def curve(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each doubling gains less: 80, 40, 20, 10, 4 and 2 %."""
    gained = np.cumprod([1, 1.8, 1.4, 1.2, 1.1, 1.04, 1.02]) * 10
    rates = {2**place: float(rate) for place, rate in enumerate(gained)}
    monkeypatch.setattr(
        module, "_rates", lambda packs, *_: {width: rates[width] for width in packs}
    )


@pytest.mark.usefixtures("curve")
def test_doubling_ends_where_it_gains_nothing() -> None:
    found = chosen()
    assert found.width == 16
    assert found.reason.startswith("pack 16: 32 would give 4 % more; memory 0.0 of 1.0 GiB")
    assert list(found.rates) == [1, 2, 4, 8, 16, 32]


@pytest.mark.usefixtures("curve")
def test_doubling_ends_where_memory_does() -> None:
    need = chosen().bytes
    found = chosen(memory=(need[8] + need[16]) // 2)
    assert found.width == 8
    assert found.reason.startswith("pack 8: 16 would take 0.0 GiB")
    assert chosen(memory=0).width == 1
    assert chosen(most=4).reason.startswith("pack 4: at most 4 are tried")


@pytest.mark.usefixtures("curve")
def test_memory_is_that_of_factors_and_of_what_one_forward_holds() -> None:
    """Four rows of seven tokens are the most in a forward: wider packs need but their factors."""
    need = chosen().bytes
    sites = random_backbone().sites
    slot = 4 * 4 * sum(4 * (site.d_in + site.d_out) for site in sites)
    assert need[16] - need[8] == 8 * slot
    assert need[2] - need[1] > slot
    longer = chosen(longest=50).bytes
    assert longer[1] > 2 * need[1]


def test_a_measured_curve_names_every_width_it_tried() -> None:
    found = chosen(most=2)
    assert set(found.rates) == {1, 2}
    assert all(rate > 0 for rate in found.rates.values())
    assert found.width in (1, 2)


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_both_sides_of_the_benchmark_train_the_same_teachers(kind) -> None:
    shape = Shape(d_model=32, layers=1, vocabulary=96, d_kv=16)
    case = teacher_case(kind, shape, teachers=3, instances=2, tokens=9)
    losses = [(case.ours(), case.other()) for _ in range(3)]
    for ours, other in losses:
        assert ours == pytest.approx(other, rel=1e-4)
    assert losses[0][0] > losses[2][0] + 1e-3
