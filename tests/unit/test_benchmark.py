"""Benchmarks: both sides do the same work, and what is written has the documented form."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tagi_ray import benchmarks
from tagi_ray.batches import local_batches
from tagi_ray.benchmarks import generation, ingest, train_step
from tagi_ray.benchmarks import measure as measuring
from tagi_ray.benchmarks.measure import CLOCKS, WARM_UP, Case, Row, measure, row, table
from tagi_ray.benchmarks.shapes import Shape
from tagi_ray.lora import Site
from tagi_ray.model import TagiModel
from tagi_ray.shards import read_manifest
from tests.models import random_batch

ROOT = Path(__file__).parents[2]
TINY = Shape(d_model=32, layers=1, vocabulary=96, d_kv=16)


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[TagiModel]]:
    """The models that benchmarks make meanwhile."""
    made: list[TagiModel] = []
    make = train_step.random_model

    def remember(shape: Shape) -> TagiModel:
        made.append(make(shape))
        return made[-1]

    monkeypatch.setattr(train_step, "random_model", remember)
    return made


def tiny_case() -> Case:
    return train_step.train_step_case("tiny", TINY, tasks=3, instances=2, tokens=(7, 5, 4))


def gradients(model: TagiModel) -> dict[str, torch.Tensor]:
    found = {name: p.grad for name, p in model.trainable().items() if p.grad is not None}
    assert found
    return found


def test_both_sides_of_a_train_step_have_the_same_loss_and_gradient(models):
    case = tiny_case()
    (model,) = models
    ours = case.ours()
    expected = gradients(model)
    assert any(gradient.abs().max() > 1e-3 for gradient in expected.values())
    assert case.other() == pytest.approx(ours, rel=1e-5)
    actual = gradients(model)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-3, atol=1e-5)


def test_ours_generates_once_for_each_task_the_other_side_for_each_row(models):
    case = tiny_case()
    (model,) = models
    case.ours()
    assert model.generated_tasks == 3
    case.other()
    assert model.generated_tasks == 3 + 3 * 2


def test_the_loss_of_a_train_step_depends_on_its_bank(models):
    case = tiny_case()
    before = case.ours()
    for head in models[0].hypernetwork.heads_b:
        torch.nn.init.zeros_(head.mix.weight)
    assert abs(case.ours() - before) > 1e-2


def test_row_wise_keeps_each_row_beside_its_instruction():
    batch = random_batch(tasks=3, instances=2)
    rows = train_step.row_wise(batch)
    assert rows.input_ids_KNS.shape == (6, 1, 7)
    for number, (task, instance) in enumerate(itertools.product(range(3), range(2))):
        assert torch.equal(rows.instruction_ids_KI[number], batch.instruction_ids_KI[task])
        assert torch.equal(rows.instruction_mask_KI[number], batch.instruction_mask_KI[task])
        assert torch.equal(rows.target_ids_KNT[number, 0], batch.target_ids_KNT[task, instance])
        assert rows.tasks[number] == batch.tasks[task]
        assert rows.slots_K[number] == batch.slots_K[task]


def test_a_run_writes_the_documented_rows(monkeypatch, tmp_path):
    monkeypatch.setitem(
        benchmarks.BENCHMARKS, "train_step", lambda rounds: measure(tiny_case(), rounds)
    )
    rows, path = benchmarks.run("train_step", tmp_path, rounds=2)
    assert path == tmp_path / "benchmark" / "train_step.json"
    written = json.loads(path.read_text("utf-8"))
    assert list(written) == ["name", "machine", "rows"]
    assert written["name"] == "train_step"
    assert "torch 2." in written["machine"]
    assert [(one["case"], one["unit"]) for one in written["rows"]] == [
        ("tiny lengths (7, 5, 4), 3 tasks x 2 instances", "CPU s"),
        ("tiny lengths (7, 5, 4), 3 tasks x 2 instances", "wall s"),
    ]
    for one in written["rows"]:
        assert list(one) == ["case", "unit", "ours", "other", "ratio", "iqr"]
        assert one["ours"] > 0
        assert one["other"] > 0
    lines = table(rows).splitlines()
    assert len(lines) == 3
    assert len({len(line) for line in lines}) == 1


def test_ratio_and_spread_are_of_the_rounds(monkeypatch):
    """Rounds of 1:2, 2:2, 6:3, 4:1: medians 3 and 2, but ratios 2, 1, 0.5, 0.25."""
    now, ours, other = [0.0], iter([0, 0, 1, 2, 6, 4]), iter([0, 0, 2, 2, 3, 1])

    def side(spends: Iterator[int]) -> float:
        now[0] += next(spends)
        return 1.0

    assert WARM_UP == 2
    monkeypatch.setattr(measuring, "CLOCKS", dict.fromkeys(CLOCKS, lambda: now[0]))
    rows = list(measure(Case("known", lambda: side(ours), lambda: side(other), 2), rounds=4))
    assert [one.unit for one in rows] == ["CPU s", "wall s"]
    for one in rows:
        assert replace(one, unit="") == Row("known", "", 1.5, 1, 0.75, 1.25 - 0.4375)


def test_a_single_round_has_no_spread():
    assert row("one", "s", [2.0], [3.0]) == Row("one", "s", 2.0, 3.0, 1.5, 0.0)


def test_the_sides_take_turns():
    order: list[str] = []

    def side(name: str) -> float:
        order.append(name)
        return 1.0

    list(measure(Case("turns", lambda: side("ours"), lambda: side("other")), rounds=3))
    rounds = [set(pair) for pair in zip(order[::2], order[1::2], strict=True)]
    assert rounds == [{"ours", "other"}] * (WARM_UP + 3)
    firsts = order[2 * WARM_UP :: 2]
    assert firsts[0] == firsts[2] != firsts[1]


def test_sides_with_different_results_are_not_timed():
    with pytest.raises(RuntimeError, match=r"unequal: ours came to 1\.0, the other side to 1\.01"):
        list(measure(Case("unequal", lambda: 1.0, lambda: 1.01), rounds=1))


SITES = tuple(
    Site(f"decoder.block.{layer}.layer.0.SelfAttention.{last}", 24, 24)
    for layer in range(2)
    for last in ("q", "v")
)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_sides_of_generation_write_the_same_adapters(dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for case in generation.adapter_cases("tiny", SITES, tasks=3, tokens=5, dtype=dtype):
        assert case.ours() == pytest.approx(case.other(), rel=1e-4)
        assert case.ours() > 0
        found = {path.parent.parent.name + path.parent.name: load_file(path)
                 for path in tmp_path.rglob("adapter_model.safetensors")}  # fmt: skip
        if "files" not in case.name:
            assert not found
            continue
        assert len(found) == 6
        for slot in range(3):
            ours, other = found[f"ours{slot}"], found[f"other{slot}"]
            assert ours.keys() == other.keys()
            for name, value in ours.items():
                assert value.dtype == getattr(torch, dtype)
                torch.testing.assert_close(value, other[name], rtol=1e-2, atol=1e-3)
        assert not torch.equal(*(found[f"ours{slot}"][name] for slot in (0, 1)))


def test_both_sides_encode_the_same_instructions():
    case = generation.encoding_case("tiny", TINY, tasks=3, tokens=5)
    assert case.ours() == pytest.approx(case.other(), rel=1e-5)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> ingest.Corpus:
    return ingest.write_corpus(tmp_path_factory.mktemp("corpus"), tasks=6, instances=6 * 128)


def test_the_corpus_has_as_many_instances_as_it_says(corpus):
    index = read_manifest(corpus.folder / "shards").splits["train"]
    assert corpus.instances == index.count.sum() == 768
    assert len(index.tasks) == 6
    batches = list(corpus.batches(local_batches, 2, 3))
    assert [batch.position for batch in batches] == [16, 24, 32]
    assert batches[0].input_ids_KNS.shape[:2] == (ingest.GROUPS, ingest.EACH)


def test_the_corpus_has_texts_as_long_as_real_tasks(corpus):
    (batch,) = corpus.batches(local_batches, 0, 1)
    lengths = batch.instruction_mask_KI.sum(-1), batch.input_mask_KNS.sum(-1)
    for length, real in zip(lengths, train_step.MEDIAN, strict=False):
        assert real / 2 < length.float().mean() < real * 2


def test_help_lists_the_benchmarks_without_loading_torch():
    script = (
        "import runpy, sys\n"
        "sys.argv = ['benchmark.py', '--help']\n"
        "try:\n    runpy.run_path('jobs/benchmark.py', run_name='__main__')\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        "heavy = {'torch', 'ray', 'transformers', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    for name, made in benchmarks.BENCHMARKS.items():
        assert made.__doc__
        assert [name, *made.__doc__.splitlines()[0].split()] in lines
