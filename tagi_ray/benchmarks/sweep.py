"""A sweep's trials side by side, beside the same runs one after another."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tagi_ray.benchmarks.measure import Row, row

if TYPE_CHECKING:  # torch would make `--help` slow
    from tagi_ray.config import Experiment
    from tagi_ray.shared_runs import Part
    from tagi_ray.space import Space

ROUNDS = 3
"""At most: one takes minutes."""
WEIGHTS = (1, 2, 10)
"""Of the KL loss, besides the recipe's own."""
SETTINGS = [
    "name=sweep", "finetune.steps=60", "finetune.valid_every=30", "finetune.save_every=0",
    "finetune.log_every=30", "teachers.steps=6", "resources.workers=1",
]  # fmt: skip


def rows(rounds: int) -> Iterator[Row]:
    """Training of 4 settings of the demo: trials of a sweep, or runs one after another."""
    import ray

    from tagi_ray import recipes

    was_running = ray.is_initialized()
    with tempfile.TemporaryDirectory() as folder:
        base = recipes.load("demo", [*SETTINGS, f"storage={folder}"])
        try:
            yield from sweep_rows("demo", base, min(rounds, ROUNDS))
        finally:
            if not was_running:
                ray.shutdown()


def sweep_rows(name: str, base: Experiment, rounds: int) -> Iterator[Row]:
    """Train the same settings as trials of a sweep and as runs of their own, in turns.

    One of the others finds the shards and the teachers that the sweep finds too, as runs in one
    folder would; the other makes its own each time. All come to the same validation losses.
    """
    from tagi_ray import shared_runs
    from tagi_ray.cluster import connect
    from tagi_ray.space import Domain, Space

    storage = Path(base.storage).absolute()
    space = Space(
        name="weights",
        search="grid",
        scheduler="none",
        seeds=(0,),
        space={"distillation.lambda_kl": Domain(choice=WEIGHTS)},
    )
    concurrent = connect(base, "auto")
    parts = storage / "parts"
    _made(base, parts, shared_runs.trial_run(base, parts, "own", {}, space.seeds))
    sides: dict[str, Callable[[Path], dict[str, float]]] = {
        "ours": lambda folder: _swept(base, space, folder, parts, concurrent),
        "shared": lambda folder: _one_by_one(base, space, folder, shared=parts),
        "alone": lambda folder: _one_by_one(base, space, folder, shared=None),
    }
    times = {side: list[float]() for side in sides}
    losses: set[str] = set()
    for turn in range(rounds):
        for side in sorted(sides, reverse=turn % 2 == 1):
            folder = storage / f"{side}_{turn}"
            folder.mkdir()
            started = time.perf_counter()
            found = sides[side](folder)
            times[side].append(time.perf_counter() - started)
            losses.add(str({key: f"{loss:.4g}" for key, loss in sorted(found.items())}))
    if len(losses) > 1:
        raise RuntimeError(f"{name}: the sides came to validation losses {sorted(losses)}")
    what = f"{name}: {1 + len(WEIGHTS)} trials, {concurrent} at a time"
    yield row(f"{what}; other: one after another", "wall s", times["ours"], times["shared"])
    yield row(f"{what}; other: and nothing shared", "wall s", times["ours"], times["alone"])


def _made(base: Experiment, folder: Path, trial: Experiment) -> dict[Part, Experiment]:
    """Make what a trial shares, or what is missing of it, in a sweep's folder."""
    from tagi_ray import shared_runs

    made: dict[Part, Experiment] = {}
    for part, run in shared_runs.parts(base, folder, trial).items():
        shared_runs.make(part, run, made)
        made[part] = run
    return made


def _swept(
    base: Experiment, space: Space, folder: Path, parts: Path, concurrent: int
) -> dict[str, float]:
    from tagi_ray.sweep import try_all
    from tagi_ray.trials import loss_of, read_trials
    from tagi_ray.tuning import TRIALS

    (folder / "shared").symlink_to(parts / "shared")
    try_all(base, space, folder, concurrent, lambda line: None)
    return {row.folder: loss_of(row) for row in read_trials(folder / TRIALS)}


def _one_by_one(
    base: Experiment, space: Space, folder: Path, shared: Path | None
) -> dict[str, float]:
    """Train the settings one after another in this process, and return their losses by key.

    shared: the sweep's folder whose parts they find; None: each makes its own.
    """
    from tagi_ray import checkpoint, pipeline, shared_runs
    from tagi_ray.launch import fit
    from tagi_ray.space import METHOD
    from tagi_ray.stages import StageSpec, last_checkpoint
    from tagi_ray.tuning import key_of, points

    def quiet(line: str) -> None:
        """Say nothing."""

    losses: dict[str, float] = {}
    for point in points(space, base):
        key = key_of(space, base, point)
        trial = shared_runs.trial_run(base, folder, key, point, space.seeds)
        if shared:
            shared_runs.link_parts(trial, _made(base, shared, trial))
        else:
            pipeline.train_teachers(trial, quiet)
        trial, run_folder = pipeline.begin(trial, quiet)
        spec = StageSpec(trial, "finetune", run_folder, trial.seeds[0], METHOD)
        fit(spec)
        losses[key] = checkpoint.best_loss(last_checkpoint(spec))
    return losses
