"""The driver's side: find or start a cluster, run stages on its workers, show how they progress."""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tagi_ray import errors, history
from tagi_ray.config import Experiment
from tagi_ray.errors import ConfigError, TagiError, TrainingError
from tagi_ray.report import read_records
from tagi_ray.sections import ResourceSettings
from tagi_ray.stages import StageSpec, fingerprint
from tagi_ray.zero import sum_over_ranks

OBJECT_STORE_BYTES = 300 * 2**20
"""Of a local cluster: batches of token ids are small."""
SPARE_CPUS = 2
"""Logical CPUs beside the workers', without which Ray Data would wait for ever."""
POLL_SECONDS = 0.3

# Read by Ray Train on the driver. Its own polling lets every stage end two seconds late on average;
# nodes of an autoscaling cluster need longer to start than the minute that it waits for them.
_RAY_TRAIN = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "1200",
    "RAY_TRAIN_METRICS_ENABLED": "0",
}

logger = logging.getLogger(__name__)


def connect(experiment: Experiment) -> None:
    """Connect to the cluster that RAY_ADDRESS names, as `ray job` does, or start a local one.

    Raises ConfigError if it can never have the CPUs and GPUs that are asked for.
    """
    import ray
    import ray.data
    import torch

    if ray.is_initialized():
        _check_capacity(experiment, _most())
        return
    for handler in logging.getLogger("ray.data").handlers:
        if handler.name == "console":
            handler.setLevel(logging.ERROR)  # its plans and progress are in its own log file
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("ray").setLevel(logging.ERROR)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if os.environ.get("RAY_ADDRESS"):
        ray.init(**quiet)
        _check_capacity(experiment, _most())
    else:
        each = experiment.resources.cpus_per_worker
        logical = {
            "CPU": max(count * each for count in _processes(experiment).values()) + SPARE_CPUS,
            "GPU": torch.cuda.device_count(),
        }
        _check_capacity(experiment, logical)
        ray.init(
            address="local",  # never join a cluster of someone else on this machine
            num_cpus=logical["CPU"],
            num_gpus=logical["GPU"],
            object_store_memory=OBJECT_STORE_BYTES,
            dashboard_port=0,
            **quiet,
        )
    logger.info("Ray's logs: %s", _ray_logs())


def fit(
    specs: StageSpec | Sequence[StageSpec], say: Callable[[str], None] = lambda line: None
) -> None:
    """Train stages one after another on one group of workers; those that are done are skipped.

    Starting workers takes longer than a short stage: give what can be trained together at once.
    `say` gets a line for each record of the metrics. Raises TrainingError with the first failed
    worker's own words; an error of this project keeps its type.
    """
    specs = [specs] if isinstance(specs, StageSpec) else list(specs)
    specs = [spec for spec in specs if not history.is_done(spec, fingerprint(spec))]
    if not specs:
        return
    run_folder = specs[0].run_folder
    news = _News(run_folder / history.METRICS)
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
    thread.start()
    while thread.is_alive():
        thread.join(POLL_SECONDS)
        for record in news.read():
            say(progress_line(record))
    if refusal.exists():
        name, *arguments = json.loads(refusal.read_text(encoding="utf-8"))
        raise getattr(errors, name)(*arguments) from (failure[0] if failure else None)
    if failure:
        raise _explained(failure[0], run_folder) from failure[0]


def run_remotely(experiment: Experiment, function: Callable[..., Any], *arguments: object) -> Any:
    """Run a function in the cluster with the resources of one worker, and return its result.

    An error of this project keeps its type.
    """
    import ray
    from ray.exceptions import RayTaskError

    resources = experiment.resources
    task = ray.remote(function).options(
        num_cpus=resources.cpus_per_worker, num_gpus=resources.gpus_per_worker
    )
    try:
        return ray.get(task.remote(*arguments))
    except RayTaskError as error:
        if isinstance(error.cause, TagiError):
            raise error.cause from error
        raise


def progress_line(record: Mapping[str, Any]) -> str:
    """Return a metrics record as a line for a person."""
    known = {
        "stage", "seed", "variant", "step", "steps", "loss", "valid_loss", "grad_norm",
        "learning_rate", "tokens_per_second", "step_time", "data_wait", "seconds_left",
        "cut_texts",
    }  # fmt: skip
    parts = [f"{name} {value:.4f}" for name, value in record.items() if name not in known]
    if "valid_loss" in record:
        parts.append(f"valid {record['valid_loss']:.4f}")
    if "cut_texts" in record:
        parts.append(f"cut {record['cut_texts']} texts")
    minutes, seconds = divmod(round(record["seconds_left"]), 60)
    return "  ".join([
        f"{record['stage']} seed {record['seed']}",
        f"step {record['step']}/{record['steps']}",
        f"loss {record['loss']:.4f}",
        *parts,
        f"lr {record['learning_rate']:.2e}",
        f"norm {record['grad_norm']:.2f}",
        f"{record['tokens_per_second']:,.0f} tokens/s",
        f"data wait {record['data_wait']:.0%}",
        f"left {minutes}:{seconds:02d}",
    ])  # fmt: skip


def train_on_worker(config: Mapping[str, Any]) -> None:
    """Run by every Ray Train worker: train the stages of `config["specs"]` in turn."""
    import gc

    import ray.train
    import ray.train.torch
    import torch

    from tagi_ray.batches import iterate_batches
    from tagi_ray.train_loop import Worker, run_stage

    specs: Sequence[StageSpec] = config["specs"]
    torch.set_num_threads(specs[0].experiment.resources.cpus_per_worker)
    context = ray.train.get_context()
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
    threads = {"OMP_NUM_THREADS": str(resources.cpus_per_worker)}
    return TorchTrainer(
        train_on_worker,
        train_loop_config={"specs": list(specs)},
        scaling_config=ray.train.ScalingConfig(
            num_workers=resources.workers,
            use_gpu=resources.gpus_per_worker > 0,
            resources_per_worker=_per_worker(resources),
        ),
        run_config=ray.train.RunConfig(
            name=f"seed_{specs[0].seed}_{specs[0].name}",
            storage_path=str(specs[0].run_folder / "logs"),
            failure_config=ray.train.FailureConfig(max_failures=resources.max_failures),
            worker_runtime_env={"env_vars": {**threads, "TOKENIZERS_PARALLELISM": "false"}},
        ),
    )


def _per_worker(resources: ResourceSettings) -> dict[str, float]:
    gpus = {"GPU": resources.gpus_per_worker} if resources.gpus_per_worker else {}
    return {"CPU": resources.cpus_per_worker, **gpus}


def _processes(experiment: Experiment) -> dict[str, int]:
    """Processes that hold a worker's resources at a time, by the setting that says how many."""
    return {
        "resources.workers": experiment.resources.workers,
        "evaluation.actors": experiment.evaluation.actors,
    }


def _most() -> Mapping[str, float]:
    """Return what the cluster has when its autoscaler has done what it can."""
    import ray
    from ray._private.state import state

    return state.get_max_resources_from_cluster_config() or ray.cluster_resources()


def _check_capacity(experiment: Experiment, most: Mapping[str, float]) -> None:
    """Refuse what would wait for resources for ever."""
    problems: list[str] = []
    for setting, count in _processes(experiment).items():
        for name, each in _per_worker(experiment.resources).items():
            spare = 1 if (setting, name) == ("resources.workers", "CPU") else 0
            needed, found = count * each + spare, most.get(name, 0)
            if found < needed:
                beside = " and 1 for reading data" if spare else ""
                problems.append(
                    f"{setting}={count} needs {needed:g} {name}s ({each:g} each{beside}), and the"
                    f" cluster has {found:g}: ask for fewer, or enlarge the cluster"
                )
    if problems:
        raise ConfigError(problems)


def _ray_logs() -> Path:
    from ray._private.worker import _global_node  # no public name tells the session's folder

    return Path("unknown") if _global_node is None else Path(_global_node.get_logs_dir_path())


class _News:
    """Records that were written to a metrics file since the last look.

    A stage that continues from a checkpoint rewrites the file, so a place in it means nothing.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._changed = 0.0
        self._seen: dict[tuple[Any, ...], Any] = {}
        for _ in self.read():
            pass

    def read(self) -> Iterator[Mapping[str, Any]]:
        changed = self._path.stat().st_mtime if self._path.exists() else 0.0
        if changed == self._changed:
            return
        self._changed = changed
        for record in read_records(self._path):
            key = (record["stage"], record["seed"], record["step"])
            if self._seen.get(key) != record:
                self._seen[key] = record
                yield record


def _explained(error: BaseException, run_folder: Path) -> BaseException:
    """Return the worker's own error, or a sentence that names where its traceback is."""
    from ray.train import TrainingFailedError

    if not isinstance(error, TrainingFailedError):
        return error
    failures: dict[int, Any] = getattr(error, "worker_failures", {})
    causes = {rank: getattr(one, "_base_exc", one) for rank, one in sorted(failures.items())}
    for cause in causes.values():
        if isinstance(cause, TagiError):
            return cause
    path = run_folder / "logs" / "failure.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(str(error), encoding="utf-8")
    if not causes:
        return TrainingError(f"training could not be run; see {path} and {_ray_logs()}")
    rank, cause = next(iter(causes.items()))
    said = str(cause).strip().splitlines() or [""]
    return TrainingError(
        f"worker {rank} failed: {type(cause).__name__}: {said[0]}; the traceback is in {path}"
    )
