"""The driver's side: run stages on the cluster's workers, and show how they progress."""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tagi_ray import errors, history, tracking
from tagi_ray.cluster import Room, per_worker, ray_logs
from tagi_ray.config import Experiment
from tagi_ray.errors import TagiError, TrainingError
from tagi_ray.json_files import write_whole
from tagi_ray.progress import shown
from tagi_ray.stages import StageSpec, fingerprint
from tagi_ray.zero import sum_over_ranks

POLL_SECONDS = 0.3

# Read by Ray Train on the driver. Its own polling lets every stage end two seconds late on average;
# nodes of an autoscaling cluster need longer to start than the minute that it waits for them.
_RAY_TRAIN = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "1200",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",  # fills the dashboard's page of training runs
}

logger = logging.getLogger(__name__)


def fit(
    specs: StageSpec | Sequence[StageSpec],
    say: Callable[[str], None] = lambda line: None,
    seen: Callable[[Mapping[str, Any]], None] = lambda record: None,
) -> None:
    """Train stages one after another on one group of workers; those that are done are skipped.

    Starting workers takes longer than a short stage: give what can be trained together at once.
    `say` gets a line for each record of the metrics, `seen` the record. Raises TrainingError with
    the first failed worker's own words; an error of this project keeps its type.
    """
    specs = [specs] if isinstance(specs, StageSpec) else list(specs)
    specs = [spec for spec in specs if not history.is_done(spec, fingerprint(spec))]
    if not specs:
        return
    run_folder = specs[0].run_folder
    failure: list[BaseException] = []
    refusal = _refusal_of(specs)
    refusal.parent.mkdir(parents=True, exist_ok=True)
    refusal.unlink(missing_ok=True)

    def train() -> None:
        try:
            _trainer(specs).fit()
        except BaseException as error:
            failure.append(error)

    # Ray's own call blocks, and this thread has something to show meanwhile.
    thread = threading.Thread(target=train, daemon=True, name="fit")
    room = Room(specs[0].experiment.resources)
    with shown(specs, say, seen) as show:
        thread.start()
        while thread.is_alive():
            thread.join(POLL_SECONDS)
            show()
            if line := room.lack():
                say(line)
    if refusal.exists():
        name, *arguments = json.loads(refusal.read_text(encoding="utf-8"))
        raise getattr(errors, name)(*arguments) from (failure[0] if failure else None)
    if failure:
        raise _explained(failure[0], run_folder) from failure[0]


def release(run_folder: Path) -> None:
    """Take from a run's workers what they hold, after the process that called `fit` was ended.

    They end with it. Ray Train does the same when it learns of the end, which takes it a while, and
    on a machine with several clusters for ever.
    """
    from ray._raylet import PlacementGroupID
    from ray.util import placement_group_table, remove_placement_group
    from ray.util.placement_group import PlacementGroup

    path = _held_by(run_folder)
    if path.exists():
        group = PlacementGroup(PlacementGroupID(bytes.fromhex(path.read_text("utf-8"))))
        if placement_group_table(group).get("state", "REMOVED") != "REMOVED":
            remove_placement_group(group)


def _held_by(run_folder: Path) -> Path:
    """Return the file in which workers say what they hold."""
    return run_folder / "logs" / "placement_group"


def run_remotely(experiment: Experiment, function: Callable[..., Any], *arguments: object) -> Any:
    """Run a function in the cluster with the resources of one worker, and return its result.

    An error of this project keeps its type.
    """
    import ray

    resources = experiment.resources
    task = ray.remote(function).options(
        num_cpus=resources.cpus_per_worker, num_gpus=resources.gpus_per_worker
    )
    return answer(task.remote(*arguments))


def answer(reference: Any) -> Any:
    """Return what a task or an actor gives; an error of this project keeps its type."""
    import ray
    from ray.exceptions import RayTaskError

    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, TagiError):
            raise error.cause from error
        raise


def train_on_worker(config: Mapping[str, Any]) -> None:
    """Run by every Ray Train worker: train the stages of `config["specs"]` in turn."""
    import gc

    import ray.train
    import ray.train.torch
    import ray.util
    import torch

    from tagi_ray.batches import iterate_batches
    from tagi_ray.train_loop import Worker, run_stage

    specs: Sequence[StageSpec] = config["specs"]
    torch.set_num_threads(specs[0].experiment.resources.cpus_per_worker)
    context = ray.train.get_context()
    group = ray.util.get_current_placement_group()
    if group is not None and context.get_world_rank() == 0:
        write_whole(_held_by(specs[0].run_folder), group.id.hex())
    worker = Worker(
        rank=context.get_world_rank(),
        world=context.get_world_size(),
        device=ray.train.torch.get_device(),
        batches=iterate_batches,
        report=ray.train.report,
    )
    # Ray starts the workers again after any error, and these would end the same way. All ranks
    # must agree, wherever the file is seen first.
    refusal = _refusal_of(specs)
    (refused,) = sum_over_ranks([torch.tensor(float(refusal.exists()), device=worker.device)])
    if refused:
        return
    try:
        for spec in specs:
            run_stage(spec, worker)
            gc.collect()  # engines hold cycles, and with them the last stage's model
    except TagiError as error:
        draft = refusal.with_name(f".{refusal.name}.{worker.rank}.tmp")
        draft.write_text(json.dumps([type(error).__name__, *error.args]), encoding="utf-8")
        draft.replace(refusal)
        raise


def _refusal_of(specs: Sequence[StageSpec]) -> Path:
    """Return the file in which workers say what another start would not cure."""
    return specs[0].run_folder / "logs" / "refusal.json"


def _trainer(specs: Sequence[StageSpec]) -> Any:
    import ray.train
    from ray.train.torch import TorchTrainer

    for name, value in _RAY_TRAIN.items():
        os.environ.setdefault(name, value)
    resources = specs[0].experiment.resources
    variables = {
        "OMP_NUM_THREADS": str(resources.cpus_per_worker),
        "TOKENIZERS_PARALLELISM": "false",
    }
    if resources.zero_stage == 3 and not resources.gpus_per_worker:
        # Gathered weights come and go all the time, and the C library would keep what they leave.
        variables["MALLOC_MMAP_THRESHOLD_"] = str(2**20)
    return TorchTrainer(
        train_on_worker,
        train_loop_config={"specs": list(specs)},
        scaling_config=ray.train.ScalingConfig(
            num_workers=resources.workers,
            use_gpu=resources.gpus_per_worker > 0,
            resources_per_worker=per_worker(resources),
        ),
        run_config=ray.train.RunConfig(
            name=f"seed_{specs[0].seed}_{specs[0].name}",
            storage_path=str(specs[0].run_folder / "logs"),
            failure_config=ray.train.FailureConfig(max_failures=resources.max_failures),
            callbacks=tracking.callbacks(specs),
            worker_runtime_env={"env_vars": variables},
        ),
    )


def _explained(error: BaseException, run_folder: Path) -> BaseException:
    """Return the worker's own error, or a sentence that names where its traceback is."""
    from ray.train import TrainingFailedError

    if not isinstance(error, TrainingFailedError):
        return error
    failures: Mapping[int, Exception] = getattr(error, "worker_failures", {})
    path = run_folder / "logs" / "failure.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(str(error), encoding="utf-8")
    if not failures:
        return TrainingError(f"training could not be run; see {path} and {ray_logs()}")
    rank, first = min(failures.items())
    return TrainingError(f"worker {rank} failed: {_last_words(first)}; the traceback is in {path}")


def _last_words(error: Exception) -> str:
    """Return type and first line of an error, of which Ray Train keeps the text of a traceback."""
    _, header, frames = str(error).rpartition("Traceback (most recent call last):\n")
    if header:
        return next((line for line in frames.splitlines() if line[:1].strip()), "")
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
