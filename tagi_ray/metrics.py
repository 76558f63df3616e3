"""Scores of predictions, as Tk-Instruct computes them, and the speed of a training loop.

ROUGE-L is rouge-score's F1 with the Porter stemmer; exact match compares texts without case,
punctuation and surplus blanks. Both take the best of an instance's references.
"""

from __future__ import annotations

import string
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

METRICS = ("exact_match", "rouge_l")

_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Text in lower case without ASCII punctuation and surplus blanks; articles stay."""
    return " ".join(text.lower().translate(_WITHOUT_PUNCTUATION).split())


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1.0 if the normalised prediction equals one of the normalised references, else 0.0."""
    _refuse_no_reference(references)
    wanted = normalize_answer(prediction)
    return float(any(normalize_answer(reference) == wanted for reference in references))


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """Best ROUGE-L F1 over the references, 0 to 1.

    rouge-score keeps a-z and 0-9 only, so text in another script scores 0.
    """
    _refuse_no_reference(references)
    scorer = _rouge_scorer()
    scores = (scorer.score(target=reference, prediction=prediction) for reference in references)
    return max(float(score["rougeL"].fmeasure) for score in scores)


@cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # slow import: it brings nltk

    return RougeScorer(["rougeL"], use_stemmer=True)


def _refuse_no_reference(references: Sequence[str]) -> None:
    if isinstance(references, str) or not references:
        raise ValueError(f"references must be a non-empty sequence of texts, not {references!r}")


@dataclass(frozen=True, slots=True)
class Prediction:
    """One scored output of a system; both scores are 0 to 1."""

    task: str
    category: str
    id: str
    input: str
    prediction: str
    references: tuple[str, ...]
    exact_match: float
    rouge_l: float


def aggregate(predictions: Iterable[Prediction]) -> dict[str, Any]:
    """Scores of one system in percent: over all instances, per task and per category.

    Every mean is over instances, so that a task with more of them weighs more.
    """
    everything = list(predictions)
    if not everything:
        raise ValueError("no predictions to aggregate")
    by_task = _grouped(everything, lambda prediction: prediction.task)
    by_category = _grouped(everything, lambda prediction: prediction.category)
    return {
        **_means(everything),
        "n_tasks": len(by_task),
        "n_instances": len(everything),
        "per_task": {
            task: {**_means(group), "category": group[0].category, "n_instances": len(group)}
            for task, group in by_task.items()
        },
        "per_category": {
            category: {
                **_means(group),
                "n_tasks": len({prediction.task for prediction in group}),
                "n_instances": len(group),
            }
            for category, group in by_category.items()
        },
    }


def _grouped(
    predictions: list[Prediction], key: Callable[[Prediction], str]
) -> dict[str, list[Prediction]]:
    groups: dict[str, list[Prediction]] = {}
    for prediction in predictions:
        groups.setdefault(key(prediction), []).append(prediction)
    return dict(sorted(groups.items()))


def _means(predictions: list[Prediction]) -> dict[str, float]:
    return {
        metric: 100.0 * sum(getattr(one, metric) for one in predictions) / len(predictions)
        for metric in METRICS
    }


class StepMeter:
    """Speed of a training loop between two log lines.

    `with meter.waiting(): batch = next(batches)` counts the time that data was waited for,
    `meter.step(tokens)` ends a step, `meter.read()` tells the speed and starts the next window.
    """

    def __init__(
        self, total_steps: int, done: int = 0, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._total_steps = total_steps
        self._done = done
        self._clock = clock
        self._start_window()

    def _start_window(self) -> None:
        self._window_start = self._clock()
        self._steps = 0
        self._tokens = 0
        self._waited = 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time spent inside as waiting for data."""
        start = self._clock()
        try:
            yield
        finally:
            self._waited += self._clock() - start

    def step(self, tokens: int) -> None:
        """A step ended that worked on this many tokens."""
        self._steps += 1
        self._done += 1
        self._tokens += tokens

    def read(self) -> dict[str, float]:
        """Means since the last reading.

        `tokens_per_second`, `step_time` in seconds, `data_wait` as a share of the time (0 to 1),
        and `seconds_left` until the last step at this speed.
        """
        elapsed = max(self._clock() - self._window_start, 1e-9)
        step_time = elapsed / max(self._steps, 1)
        reading = {
            "tokens_per_second": self._tokens / elapsed,
            "step_time": step_time,
            "data_wait": min(self._waited / elapsed, 1.0),
            "seconds_left": step_time * max(self._total_steps - self._done, 0),
        }
        self._start_window()
        return reading
