"""What a stage leaves while it trains: checkpoints of its progress, and records in `metrics.jsonl`.

Records beyond the checkpoint that a stage continues from are dropped, so that the file tells of
every step once. One process writes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from tagi_ray import checkpoint
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

    def add(self, losses: Mapping[str, float]) -> None:
        """Count a step."""
        for name, loss in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + loss
        self.summed += 1

    def means(self) -> dict[str, float]:
        """Return the mean losses since the last call."""
        means = {name: total / self.summed for name, total in self.sums.items()}
        self.sums, self.summed = {}, 0
        return means


def newest_step(spec: StageSpec) -> int:
    """Return the step of the newest checkpoint that verifies; 0 without one."""
    path = checkpoint.latest(spec.checkpoints)
    return 0 if path is None else checkpoint.step_of(path)


def is_done(spec: StageSpec, identity: str) -> bool:
    """Say whether the stage has reached its last step."""
    return restore(spec, identity, newest_step(spec))[1].done


def restore(spec: StageSpec, identity: str, step: int) -> tuple[dict[str, Tensor], Progress]:
    """Return state and progress at a step; at 0, those of a new stage.

    Raises CheckpointError unless it was saved with the same `identity`.
    """
    if step == 0:
        return {}, Progress()
    state, meta = checkpoint.load(checkpoint.path_of(spec.checkpoints, step), identity)
    return state, Progress(**meta["progress"])


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


def append(spec: StageSpec, values: Mapping[str, float]) -> None:
    """Add a record of the stage."""
    record = {**_names(spec), "steps": spec.settings.steps, **values}
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

    kept = "".join(json.dumps(record) + "\n" for record in read(path) if stays(record))
    draft = path.with_suffix(".tmp")
    draft.write_text(kept, encoding="utf-8")
    draft.replace(path)


def read(path: Path) -> list[Record]:
    """Return the records of a metrics file, without a last line that is being written."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def _names(spec: StageSpec) -> Record:
    variant = {"variant": spec.variant} if spec.kind == "finetune" else {}
    return {"stage": spec.name, "seed": spec.seed, **variant}
