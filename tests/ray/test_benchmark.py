"""Benchmarks of what Ray adds: both sides train the same, and every row is there."""

from __future__ import annotations

from pathlib import Path

import pytest

from tagi_ray import recipes
from tagi_ray.benchmarks import ingest, memory, ray_overhead, sweep
from tagi_ray.benchmarks.shapes import Shape
from tests.tiny_run import tiny_experiment

pytestmark = pytest.mark.ray


def test_both_sides_of_the_loop_come_to_the_same_losses(ray_session: None, tmp_path: Path) -> None:
    tiny = tiny_experiment(tmp_path, log_every=1, save_every=0)
    rows = list(ray_overhead.overhead_rows("tiny", tiny, rounds=1))
    assert [(row.case, row.unit) for row in rows] == [
        ("tiny: step", "wall s"),
        ("tiny: start and end", "wall s"),
    ]
    assert all(row.ours > 0 and row.other > 0 for row in rows)
    folders = {folder.name for folder in tmp_path.iterdir()}
    assert folders == {"tiny", "ours_0", "ours_1", "other_0", "other_1"}


def test_sides_that_come_to_different_losses_are_refused(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = ray_overhead.step_records

    def shifted(spec):
        records = read(spec)
        return [{**one, "loss": one["loss"] + ("ours" in str(spec.run_folder))} for one in records]

    monkeypatch.setattr(ray_overhead, "step_records", shifted)
    tiny = tiny_experiment(tmp_path, log_every=1, save_every=0)
    with pytest.raises(RuntimeError, match="tiny: the two sides came to losses"):
        list(ray_overhead.overhead_rows("tiny", tiny, rounds=1))


def test_ingest_tells_waiting_speed_and_memory(ray_session: None, tmp_path: Path) -> None:
    corpus = ingest.write_corpus(tmp_path, tasks=8, instances=8 * 256)
    shape = Shape(d_model=32, layers=1, vocabulary=4096, d_kv=16)
    waiting = list(ingest.waiting_rows(corpus, shape, rounds=2, steps=3))
    assert [row.unit for row in waiting] == ["% of it waiting", "wall s", "wall s"]
    assert 0 < waiting[0].ours < 100
    assert 0 < waiting[0].other < 100
    streamed = list(ingest.stream_rows(corpus, parts=2))
    assert [row.unit for row in streamed] == ["wall ms", "MB", "MB"]
    assert streamed[0].case == "2048 instances streamed: an instance"
    assert "training process" in streamed[1].case
    assert streamed[1].ours > 50


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("ray_session")
def test_a_sweep_and_its_runs_one_after_another_come_to_the_same_losses(tmp_path: Path) -> None:
    tiny = str(Path(__file__).parents[1] / "recipes" / "tiny.yaml")
    base = recipes.load(tiny, ["finetune.valid_every=2", f"storage={tmp_path}"])
    rows = list(sweep.sweep_rows("tiny", base, rounds=1))
    assert [row.case.rpartition("; ")[2] for row in rows] == [
        "other: one after another",
        "other: and nothing shared",
    ]
    assert rows[0].ours == rows[1].ours > 0
    stores = list((tmp_path / "ours_0" / "shared").glob("teachers_*"))
    assert len(stores) == 1


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("ray_session")
def test_a_sharded_t5_base_takes_the_memory_that_was_planned() -> None:
    (found,) = memory.rows(rounds=1)
    assert found.ours > 0.5  # GiB
    assert abs(found.ratio - 1) < 0.25
