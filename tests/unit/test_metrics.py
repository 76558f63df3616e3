"""Scores against values computed without the library, and a loop's speed on a fake clock."""

import json
import re
from functools import lru_cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nltk.stem.porter import PorterStemmer

from tagi_ray.metrics import (
    Prediction,
    StepMeter,
    aggregate,
    exact_match,
    normalize_answer,
    rouge_l,
)

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
