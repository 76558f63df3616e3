"""The benchmark of distillation: its three steps differ as they should, and so do their rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tagi_ray import objectives
from tagi_ray.benchmarks import distillation
from tagi_ray.benchmarks.distillation import KINDS, Taught, error_rows, peak, step_of, time_rows
from tagi_ray.benchmarks.shapes import Shape

TINY = Shape(d_model=32, layers=1, vocabulary=96, d_kv=16)
TOKENS = (7, 5, 4)


def test_the_three_steps_have_the_losses_that_they_are_named_for(monkeypatch):
    parts = []
    original = objectives.finetune

    def remember(*given):
        objective = original(*given)
        parts.append(objective.reads)
        return objective

    monkeypatch.setattr(objectives, "finetune", remember)
    losses = {kind: step_of(kind, TINY, TOKENS)() for kind in KINDS}
    assert losses["live"] > losses["none"] < losses["cached"]
    assert ["prompt" in reads for reads in parts] == [True, False, False]
    assert ["teacher" in reads for reads in parts] == [False, True, False]
    (first, *_) = time_rows("tiny", TINY, TOKENS, 2)
    assert first.ours > 0
    assert first.unit == "CPU s"


def test_a_step_grows_the_memory_of_its_process():
    # A chunk of logits alone: 16 rows of 64 tokens, 4 bytes for each of 4096 entries.
    size = 4 * 4 * 64 * 4096 * 4
    assert peak("none", Shape(64, 1, 4096), (4, 4, 64)) > size


@pytest.mark.slow
def test_what_a_cache_loses_gets_less_with_what_it_keeps(tmp_path: Path):
    stage = distillation.DEMO["teachers"]
    few = Taught.of_demo(
        tmp_path,
        data={**distillation.DEMO["data"], "train_instances": 4},
        teachers={**stage, "steps": 1},
        finetune={**distillation.DEMO["finetune"], "steps": 2},
    )
    rows = list(error_rows(few, 2))
    kls, cosines = rows[::2], rows[1::2]
    assert [row.ratio for row in kls[:3]] == sorted((row.ratio for row in kls[:3]), reverse=True)
    assert kls[0].ratio > 1.001
    assert kls[2].ratio == pytest.approx(1, abs=2e-3)
    found = [row.ours for row in cosines]
    assert all(0.9 < cosine <= 1 + 1e-9 for cosine in found), found
    assert cosines[2].ours > cosines[0].ours
    # The files themselves, read with the batches.
    assert kls[3].ours == pytest.approx(kls[1].ours, rel=0.1)
    assert torch.is_tensor(next(few.batches(1)).teacher_logp_KNTC)
