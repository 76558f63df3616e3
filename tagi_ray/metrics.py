"""Scores of predictions, as Tk-Instruct computes them, and what a training loop takes.

ROUGE-L is rouge-score's F1 with the Porter stemmer; exact match compares texts without case,
punctuation and surplus blanks. Both take the best of an instance's references.
"""

from __future__ import annotations

import re
import resource
import string
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

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
    """What a training loop takes between two log lines: time, memory, and the device's arithmetic.

    `with meter.waiting(): batch = next(batches)` counts the time that data was waited for,
    `with meter.counting(): ...` holds the arithmetic of a step, `meter.step(tokens)` ends one, and
    `meter.read()` tells what was taken and starts the next window.

    `device` is this rank's, `peak` what it can do (`peak_flops`); None leaves out what it is for.
    """

    def __init__(
        self,
        total_steps: int,
        done: int = 0,
        clock: Callable[[], float] = time.perf_counter,
        *,
        device: torch.device | None = None,
        world: int = 1,
        peak: float | None = None,
    ) -> None:
        self._total_steps = total_steps
        self._done = done
        self._clock = clock
        self._device = device
        self._world = world
        self._peak = peak
        self._flops = 0
        """Of this rank's share of the step that was counted."""
        self._flops_per_token = 0.0
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

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count the operations inside, the first time; they are a step's forward and backward.

        Does nothing later, and on a device whose peak is unknown: counting is slow.
        """
        if self._peak is None or self._flops:
            yield
            return
        with counted_flops() as total:
            yield
        self._flops = total()

    def step(self, tokens: int) -> None:
        """A step ended that worked on this many tokens, of all ranks."""
        self._steps += 1
        self._done += 1
        self._tokens += tokens
        if self._flops and not self._flops_per_token:
            self._flops_per_token = self._flops * self._world / max(tokens, 1)

    def read(self) -> dict[str, float]:
        """Means since the last reading. All ranks call this.

        `tokens_per_second`, `step_time` in seconds, `data_wait` as a share of the time (0 to 1),
        `seconds_left` until the last step at this speed; with a device `peak_memory` in bytes, the
        largest of all ranks: on a GPU what tensors took since the last reading, elsewhere what the
        process ever held. With a peak `mfu`, the share of it that was used (0 to 1), for as many
        operations to a token as in the step that was counted: recomputed ones are among them.
        """
        elapsed = max(self._clock() - self._window_start, 1e-9)
        step_time = elapsed / max(self._steps, 1)
        reading = {
            "tokens_per_second": self._tokens / elapsed,
            "step_time": step_time,
            "data_wait": min(self._waited / elapsed, 1.0),
            "seconds_left": step_time * max(self._total_steps - self._done, 0),
        }
        if self._device is not None:
            reading["peak_memory"] = _largest_of_ranks(_peak_memory(self._device), self._device)
        if self._peak and self._flops_per_token:
            done = reading["tokens_per_second"] * self._flops_per_token
            reading["mfu"] = done / (self._world * self._peak)
        self._start_window()
        return reading


@contextmanager
def counted_flops() -> Iterator[Callable[[], int]]:
    """Count the floating point operations of all matrix products inside, backward included.

    Gives a function that tells the number so far. PyTorch knows no count of its fused attention on
    a CPU, and leaves it out; those of the GPU are counted.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        yield counter.get_total_flops


_PEAKS = (
    ("B200", 2250.0, 1125.0, 75.0),
    ("H200 NVL", 835.5, 417.5, 60.0),
    ("H200", 989.5, 494.7, 67.0),
    ("H100 NVL", 835.5, 417.5, 60.0),
    ("H100 PCIe", 756.0, 378.0, 51.0),
    ("H100", 989.5, 494.7, 67.0),
    ("L40S", 362.05, 183.0, 91.6),
    ("A100", 312.0, 156.0, 19.5),
    ("L4", 121.0, 60.0, 30.3),
    ("A10G", 70.0, 35.0, 31.5),
    ("T4", None, None, 8.1),
    ("V100-PCIE", None, None, 14.0),
    ("V100", None, None, 15.7),
)
"""Peak TFLOP/s without sparsity in bfloat16, TF32 and float32, from NVIDIA's data sheets of these
products; None where the tensor cores lack the type. The first name that fits counts."""


def peak_flops(device: torch.device, dtype: str) -> float | None:
    """Return what a GPU can do at best, in operations per second, or None where that is unknown.

    dtype: of the weights, `bfloat16` or `float32`; float32 counts as TF32 where PyTorch may use it.
    """
    import torch

    if device.type != "cuda":
        return None
    tf32 = torch.get_float32_matmul_precision() != "highest"
    return peak_of(torch.cuda.get_device_name(device), dtype, tf32)


def peak_of(name: str, dtype: str, tf32: bool = False) -> float | None:
    """Return the peak of a GPU by its name; None for a share of one (MIG), and unknown ones."""
    if "MIG" in name:
        return None
    for part, bfloat16, tensor_float, float32 in _PEAKS:
        if re.search(rf"\b{part}\b", name):
            fast = bfloat16 if dtype == "bfloat16" else tensor_float if tf32 else None
            # Without tensor cores for the type, PyTorch computes on those for float32.
            return (fast or float32) * 1e12
    return None


def _peak_memory(device: torch.device) -> float:
    """Return the most bytes in use: of tensors since the last call, or of this process ever."""
    if device.type == "cuda":
        import torch

        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return float(peak)
    status = Path("/proc/self/status")
    if status.exists():
        # Unlike getrusage, this is not inherited from the process that started this one.
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text("ascii", "replace"))
        if found:
            return float(found[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * unit


def _largest_of_ranks(value: float, device: torch.device) -> float:
    import torch
    import torch.distributed as dist

    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return value
    tensor = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return float(tensor)
