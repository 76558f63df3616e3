"""Scores against values computed without the library, and a loop's speed on a fake clock."""

import json
import re
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nltk.stem.porter import PorterStemmer
from transformers import T5Config

from tagi_ray.metrics import (
    Prediction,
    StepMeter,
    aggregate,
    counted_flops,
    exact_match,
    normalize_answer,
    peak_flops,
    peak_of,
    rouge_l,
)
from tests.models import random_backbone, random_t5

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "metrics.json").read_text("utf-8"))

texts = st.text(alphabet="abc ,.Xy-running ", max_size=24)


def lcs_rouge_l(prediction: str, reference: str) -> float:
    """ROUGE-L F1 by the recursive definition of the longest common subsequence."""
    stem = PorterStemmer().stem

    def tokens(text: str) -> list[str]:
        words = re.findall(r"[a-z0-9]+", text.lower())
        return [stem(word) if len(word) > 3 else word for word in words]

    ours, theirs = tokens(prediction), tokens(reference)

    @lru_cache(None)
    def common(i: int, j: int) -> int:
        if i == len(ours) or j == len(theirs):
            return 0
        if ours[i] == theirs[j]:
            return 1 + common(i + 1, j + 1)
        return max(common(i + 1, j), common(i, j + 1))

    length = common(0, 0)
    return 2 * length / (len(ours) + len(theirs)) if length else 0.0


def prediction(task: str, category: str, exact: float, rouge: float) -> Prediction:
    return Prediction(task, category, "id", "x", "y", ("z",), exact, rouge)


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["prediction"] or "empty")
def test_golden_values(case):
    assert exact_match(case["prediction"], case["references"]) == case["exact_match"]
    assert rouge_l(case["prediction"], case["references"]) == pytest.approx(case["rouge_l"])


@given(texts, st.lists(texts, min_size=1, max_size=3))
def test_rouge_l_is_the_best_lcs_score(predicted, references):
    expected = max(lcs_rouge_l(predicted, reference) for reference in references)
    assert rouge_l(predicted, references) == pytest.approx(expected)


@given(st.text(max_size=20))
def test_exact_match_ignores_case_of_punctuation_and_blanks(text):
    assert exact_match(f" {text}. ", [text]) == 1.0
    assert normalize_answer(normalize_answer(text)) == normalize_answer(text)


def test_articles_count_for_exact_match():
    assert exact_match("the cat", ["cat"]) == 0.0


def test_other_scripts_score_zero():
    assert rouge_l("你好 世界", ["你好 世界"]) == 0.0


@pytest.mark.parametrize("score", [exact_match, rouge_l])
@pytest.mark.parametrize("references", [[], "one text"])
def test_references_must_be_a_filled_list(score, references):
    with pytest.raises(ValueError, match="references"):
        score("x", references)


def test_aggregate_weighs_instances():
    scores = aggregate(
        [
            prediction("t1", "c1", 1.0, 1.0),
            prediction("t1", "c1", 0.0, 0.5),
            prediction("t1", "c1", 0.0, 0.0),
            prediction("t2", "c1", 1.0, 1.0),
            prediction("t0", "c2", 0.0, 0.0),
        ]
    )
    assert scores["exact_match"] == pytest.approx(40.0)
    assert scores["rouge_l"] == pytest.approx(50.0)
    assert (scores["n_tasks"], scores["n_instances"]) == (3, 5)
    assert list(scores["per_task"]) == ["t0", "t1", "t2"]
    assert scores["per_task"]["t1"] == {
        "exact_match": pytest.approx(100 / 3),
        "rouge_l": pytest.approx(50.0),
        "category": "c1",
        "n_instances": 3,
    }
    assert scores["per_category"]["c1"] == {
        "exact_match": pytest.approx(50.0),
        "rouge_l": pytest.approx(62.5),
        "n_tasks": 2,
        "n_instances": 4,
    }


def test_nothing_to_aggregate_is_an_error():
    with pytest.raises(ValueError, match="no predictions"):
        aggregate([])


def test_step_meter_reads_windows():
    now = [100.0]
    meter = StepMeter(total_steps=10, done=2, clock=lambda: now[0])
    for _ in range(2):
        with meter.waiting():
            now[0] += 1.0
        now[0] += 3.0
        meter.step(tokens=200)
    assert meter.read() == {
        "tokens_per_second": 50.0,
        "step_time": 4.0,
        "data_wait": 0.25,
        "seconds_left": 24.0,
    }
    now[0] += 2.0
    meter.step(tokens=10)
    assert meter.read() == {
        "tokens_per_second": 5.0,
        "step_time": 2.0,
        "data_wait": 0.0,
        "seconds_left": 10.0,
    }


def test_step_meter_counts_a_wait_that_raises():
    now = [0.0]
    meter = StepMeter(total_steps=1, clock=lambda: now[0])

    def wait_in_vain():
        with meter.waiting():
            now[0] += 2.0
            raise StopIteration

    with pytest.raises(StopIteration):
        wait_in_vain()
    assert meter.read()["data_wait"] == 1.0


def t5_flops(config: T5Config, rows: int, source: int, target: int) -> tuple[int, int]:
    """Operations of one forward by the shapes of all products: of the blocks, and of the head."""
    d, inner, ff = config.d_model, config.num_heads * config.d_kv, config.d_ff

    def attention(queries: int, keys: int) -> int:
        projections = 2 * queries * d * inner + 2 * keys * d * inner
        return projections + 2 * queries * keys * inner

    encoder = attention(source, source) + 2 * source * d * ff
    decoder = attention(target, target) + attention(target, source) + 2 * target * d * ff
    blocks = config.num_layers * encoder + config.num_decoder_layers * decoder
    return 2 * rows * blocks, 2 * rows * target * d * config.vocab_size


def step_flops(checkpointing: bool) -> int:
    """Counted operations of a forward and backward of the small T5 with eager attention."""
    backbone = random_backbone(targets=(), checkpointing=checkpointing)
    model = backbone.model.requires_grad_(True)
    model.set_attn_implementation("eager")  # what the CPU fuses is not counted
    ids, labels = torch.full((4, 7), 3), torch.full((4, 5), 3)
    with counted_flops() as total:
        model(input_ids=ids, labels=labels, use_cache=False).loss.backward()
    model(input_ids=ids, labels=labels, use_cache=False)  # outside: does not count
    return total()


def test_counted_flops_are_those_of_the_shapes():
    blocks, head = t5_flops(random_t5().config, rows=4, source=7, target=5)
    assert step_flops(checkpointing=False) == 3 * (blocks + head)


def test_recomputed_activations_count_as_work():
    blocks, _ = t5_flops(random_t5().config, rows=4, source=7, target=5)
    again = step_flops(checkpointing=True) - step_flops(checkpointing=False)
    # PyTorch stops once it has what the backward wants: a block's last product is left out.
    assert 0.8 * blocks < again <= blocks


def test_mfu_is_the_share_of_all_ranks_peak():
    now = [0.0]
    meter = StepMeter(10, clock=lambda: now[0], world=2, peak=1e6)
    weight = torch.zeros(100, 100)
    for rows in (50, 25):
        with meter.counting():
            weight[:rows] @ weight  # 2 x 50 x 100 x 100 operations of this rank
        now[0] += 2.0
        meter.step(tokens=2 * rows)  # of both ranks
    # 1e6 operations of one rank make 2e4 to a token of both; 150 tokens in 4 seconds; 2 x 1e6.
    assert meter.read()["mfu"] == pytest.approx(2e4 * 150 / 4 / 2e6)


def test_nothing_is_counted_where_the_peak_is_unknown():
    meter = StepMeter(
        1, device=torch.device("cpu"), peak=peak_flops(torch.device("cpu"), "float32")
    )
    with meter.counting(), counted_flops() as total:
        torch.zeros(2, 3) @ torch.zeros(3, 4)
    assert total() == 2 * 2 * 3 * 4
    meter.step(tokens=1)
    assert "mfu" not in meter.read()


def test_peak_memory_of_a_process_is_what_it_ever_held():
    meter = StepMeter(1, device=torch.device("cpu"))
    size = int(meter.read()["peak_memory"])
    torch.ones(size // 4)  # as much again, and freed at once
    peak = meter.read()["peak_memory"]
    assert 1.2 * size < peak < 2.2 * size
    assert meter.read()["peak_memory"] >= peak


@pytest.mark.parametrize(
    ("name", "dtype", "tf32", "teraflops"),
    [
        ("NVIDIA H200", "bfloat16", False, 989.5),
        ("NVIDIA H100 80GB HBM3", "float32", True, 494.7),
        ("NVIDIA H100 PCIe", "bfloat16", False, 756.0),
        ("NVIDIA A100-SXM4-80GB", "float32", False, 19.5),
        ("NVIDIA A100 80GB PCIe", "bfloat16", False, 312.0),
        ("NVIDIA L40S", "bfloat16", False, 362.05),
        ("NVIDIA L4", "bfloat16", False, 121.0),
        ("NVIDIA A10G", "bfloat16", False, 70.0),
        ("Tesla T4", "bfloat16", True, 8.1),
        ("Tesla V100-SXM2-16GB", "float32", True, 15.7),
        ("NVIDIA B200", "bfloat16", False, 2250.0),
    ],
)
def test_peaks_by_the_names_that_drivers_give(name, dtype, tf32, teraflops):
    assert peak_of(name, dtype, tf32) == pytest.approx(teraflops * 1e12)


@pytest.mark.parametrize("name", ["NVIDIA H200 MIG 1g.18gb", "NVIDIA GeForce RTX 4090", "L400"])
def test_no_peak_of_a_share_of_a_gpu_or_an_unknown_one(name):
    assert peak_of(name, "bfloat16") is None
