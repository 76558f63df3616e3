"""What Prometheus can ask of a run while it trains: metrics on every node's port, named `tagi_*`.

Ray adds `ray_` to the names, and `_total` to counters: `ray_tagi_loss{run="demo",part="kl"}`. Its
processes send theirs every ten seconds and when they end. A gauge that is not set again is gone
after twenty, a counter stays as long as the node: so what is true for a while is a gauge, which the
driver sets again and again, and what was done for good is a counter. Without Ray nothing happens.
`cluster/grafana/tagi.json` shows them.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

PREFIX = "tagi_"
STAGE_TAGS = ("run", "stage", "seed")
LOSS_PARTS = ("loss", "cross_entropy", "kl", "alignment")
"""Values of the tag `part` of the loss; `loss` is the whole, in which the parts are weighted."""
GAUGES = {
    "loss": "Training loss, mean since the last record: the whole, and its parts unweighted",
    "valid_loss": "Loss on the validation tasks",
    "step": "Steps that the stage has trained",
    "steps": "Steps that the stage will train",
    "seconds_left": "Seconds until the stage's last step",
    "tokens_per_second": "Tokens read in a second, by all workers",
    "step_time": "Seconds that a step takes",
    "data_wait": "Share of the time that data was waited for, 0 to 1",
    "learning_rate": "Learning rate",
    "grad_norm": "Norm of the gradient before it is clipped",
    "peak_memory": "Bytes that the fullest worker took: of its GPU, or of its process on a CPU",
    "mfu": "Share of the GPU's peak arithmetic that is used, 0 to 1",
}
"""Of the newest record of metrics.jsonl, by the names there; `loss` has its parts by a tag."""
COUNTERS = {
    "teachers_done": "Teachers of a role in the run's store, found or written by a job",
    "adapters_generated": "Adapters generated from instructions and written",
}

_counted: dict[tuple[object, ...], int] = {}


class Stage:
    """Gauges of the stage of a run that is being trained."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._record: dict[str, Any] = {}

    def take(self, record: Mapping[str, Any]) -> None:
        """Note a record of the metrics; what it lacks stays as it was, unless its stage is new."""
        known = self._record
        same = all(known.get(name) == record[name] for name in ("stage", "seed"))
        self._record = {**known, **record} if same else dict(record)

    def show(self) -> None:
        """Set the gauges, so that they stay for another while."""
        record = self._record
        if not record or not _connected():
            return
        from ray.util.metrics import Gauge

        tags = {"run": self._run, "stage": record["stage"], "seed": str(record["seed"])}
        for name, text in GAUGES.items():
            if name == "loss":
                gauge = Gauge(PREFIX + name, text, (*STAGE_TAGS, "part"))
                for part in LOSS_PARTS:
                    if part in record:
                        gauge.set(record[part], {**tags, "part": part})
            elif name in record:
                Gauge(PREFIX + name, text, STAGE_TAGS).set(record[name], tags)


def count(name: str, more: int = 1, **tags: str) -> None:
    """Add to one of `COUNTERS`, whose tags are always the same ones."""
    if more <= 0 or not _connected():
        return
    from ray.util.metrics import Counter

    Counter(PREFIX + name, COUNTERS[name], tuple(tags)).inc(more, tags)


def count_up_to(name: str, number: int, **tags: str) -> None:
    """Let a counter of this process stand at a number that it has not reached yet.

    The largest of all processes' is the number, however many jobs have told it.
    """
    if not _connected():
        return
    import ray

    key = (ray.get_runtime_context().gcs_address, name, *sorted(tags.items()))
    count(name, number - _counted.get(key, 0), **tags)
    _counted[key] = max(number, _counted.get(key, 0))


def _connected() -> bool:
    ray = sys.modules.get("ray")  # what does without Ray need not wait for its import
    return ray is not None and ray.is_initialized()
