"""What a stage leaves while it trains: checkpoints of its progress, and records in `metrics.jsonl`.

Records beyond the checkpoint that a stage continues from are dropped, so that the file tells of
every step once. One process writes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from tagi_ray import checkpoint
from tagi_ray.json_files import write_whole
from tagi_ray.report import read_records
from tagi_ray.stages import StageSpec

METRICS = "metrics.jsonl"
Record = dict[str, Any]


@dataclass(slots=True)
class Progress:
    """How far a stage is."""

    step: int = 0
    done: bool = False
    best: Record | None = None
    """Step and `valid_loss` of the best validation."""
    sums: dict[str, float] = field(default_factory=dict)
    """Losses summed since the last record, over `summed` steps."""
    summed: int = 0
    cut_texts: int = 0
    """Texts that were longer than allowed, since the last record."""

    def add(self, losses: Mapping[str, float], cut_texts: int) -> None:
        """Count a step."""
        for name, loss in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + loss
        self.summed += 1
        self.cut_texts += cut_texts

    def improved(self, valid: Mapping[str, float]) -> bool:
        """Note a validation, if there was one; say whether it is the best so far."""
        if not valid or (self.best and valid["valid_loss"] >= self.best["valid_loss"]):
            return False
        self.best = {"step": self.step, **valid}
        return True

    def take(self) -> dict[str, float]:
        """Return the mean losses since the last call, and the number of cut texts if any were."""
        values = {name: total / self.summed for name, total in self.sums.items()}
        if self.cut_texts:
            values["cut_texts"] = self.cut_texts
        self.sums, self.summed, self.cut_texts = {}, 0, 0
        return values


def newest_step(spec: StageSpec) -> int:
    """Return the step of the newest checkpoint that verifies; 0 without one."""
    path = checkpoint.latest(spec.checkpoints)
    return 0 if path is None else checkpoint.step_of(path)


def is_done(spec: StageSpec, identity: str) -> bool:
    """Say whether the stage has reached its last step."""
    return progress_at(spec, identity, newest_step(spec)).done


def progress_at(spec: StageSpec, identity: str, step: int) -> Progress:
    """Return the progress that a checkpoint tells of; at step 0, that of a new stage.

    Raises CheckpointError unless it was saved with the same `identity`.
    """
    if step == 0:
        return Progress()
    meta = checkpoint.meta(checkpoint.path_of(spec.checkpoints, step), identity)
    return Progress(**meta["progress"])


def state_at(spec: StageSpec, step: int) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint."""
    return checkpoint.load(checkpoint.path_of(spec.checkpoints, step))[0]


def save(spec: StageSpec, identity: str, progress: Progress, state: Mapping[str, Tensor]) -> None:
    """Write a checkpoint of the stage."""
    meta = {
        **_names(spec),
        "position": progress.step * spec.settings.groups,
        "fingerprint": identity,
        "progress": asdict(progress),
    }
    best = progress.best["step"] if progress.best else None
    checkpoint.save(spec.checkpoints, progress.step, state, meta, best=best)


def record(spec: StageSpec, values: Mapping[str, float]) -> Record:
    """Return a record of the metrics: which stage it tells of, and the values of a step."""
    return {**_names(spec), "steps": spec.settings.steps, **values}


def append(spec: StageSpec, record: Record) -> None:
    """Add a record to the metrics of the run."""
    with (spec.run_folder / METRICS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def cut(spec: StageSpec, step: int) -> None:
    """Drop the stage's records beyond a step, and lines that a crash left torn."""
    path = spec.run_folder / METRICS
    if not path.exists():
        return

    def stays(record: Record) -> bool:
        same = (record["stage"], record["seed"]) == (spec.name, spec.seed)
        return not same or record["step"] <= step

    kept = "".join(json.dumps(record) + "\n" for record in read_records(path) if stays(record))
    write_whole(path, kept)


def _names(spec: StageSpec) -> Record:
    variant = {"variant": spec.variant} if spec.kind == "finetune" else {}
    return {"stage": spec.name, "seed": spec.seed, **variant}
