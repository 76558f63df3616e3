"""The cluster of a run: joined or started, and whether it has or can have what is asked for."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from tagi_ray.config import Experiment
from tagi_ray.errors import ConfigError
from tagi_ray.sections import ResourceSettings

OBJECT_STORE_BYTES = 300 * 2**20
"""Of a local cluster: batches of token ids are small."""
SPARE_CPUS = 2
"""Logical CPUs beside the workers', without which Ray Data would wait for ever."""
LOOK_SECONDS = 3.0
"""Between two looks at whether workers wait for room."""
WAIT_SECONDS = 30.0
"""Between two lines about workers that the cluster has no room for yet."""
PROBE_SECONDS = 15.0
"""In which a cluster has to answer; one that is there does in two."""
UNBOUNDED = 10**6
"""Nodes of a kind whose number the autoscaler does not limit."""

NODE_GROUP = "ray.io/node-group"
"""Label that `ray up` and KubeRay give to the nodes of a cluster whose autoscaler starts others."""

_COUNTED = ("CPU", "GPU")

logger = logging.getLogger(__name__)


def connect(experiment: Experiment, side_by_side: int | Literal["auto"] = 1) -> int:
    """Connect to the cluster that RAY_ADDRESS names, as `ray job` does, or start a local one.

    side_by_side: runs of these settings at a time; `auto`, as many as fit, is returned as a number.
    Raises ConfigError if the cluster does not let this process in, or can never have the CPUs and
    GPUs that are asked for.
    """
    import ray
    import ray.data
    import torch

    if ray.is_initialized():
        return _checked_runs(experiment, side_by_side)
    for handler in logging.getLogger("ray.data").handlers:
        if handler.name == "console":
            handler.setLevel(logging.ERROR)  # its plans and progress are in its own log file
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("ray").setLevel(logging.ERROR)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    address = os.environ.get("RAY_ADDRESS") or "local"
    if address != "local":
        _probe(address)
        try:
            ray.init(**quiet)
        except (RuntimeError, ConnectionError) as error:
            raise _refused(address, str(error)) from error
        side_by_side = _checked_runs(experiment, side_by_side)
    else:
        each, gpus = experiment.resources.cpus_per_worker, torch.cuda.device_count()
        if side_by_side == "auto":
            here = {"CPU": float(os.cpu_count() or 1), "GPU": float(gpus)}
            side_by_side = max(1, _room(per_worker(experiment.resources), [(here, 1)])
                               // experiment.resources.workers)  # fmt: skip
        processes = max(_processes(experiment).values())
        logical = {"CPU": side_by_side * (processes * each + SPARE_CPUS), "GPU": gpus}
        check_capacity(experiment, [(logical, 1)])
        if side_by_side > 1:
            # Ray expects as many processes as there are cores, and would warn of those of a sweep.
            name, count = "RAY_worker_maximum_startup_concurrency", str(int(logical["CPU"]))
            os.environ.setdefault(name, count)
        ray.init(
            address="local",  # never join a cluster of someone else on this machine
            num_cpus=logical["CPU"],
            num_gpus=logical["GPU"],
            object_store_memory=OBJECT_STORE_BYTES,
            dashboard_port=0,
            **quiet,
        )
    logger.info("Ray's logs: %s", ray_logs())
    return side_by_side


def _checked_runs(experiment: Experiment, side_by_side: int | Literal["auto"]) -> int:
    """Check that runs of these settings fit the cluster, and return how many at a time."""
    import ray

    nodes = _nodes()
    check_capacity(experiment, nodes)
    if side_by_side != "auto":
        return side_by_side
    # Where nobody knows what the autoscaler may start, what is there now has to do.
    now = [(node["Resources"], 1) for node in ray.nodes() if node["Alive"]]
    return runs_that_fit(experiment, now if nodes is None else nodes)


def runs_that_fit(experiment: Experiment, nodes: Sequence[tuple[Mapping[str, float], int]]) -> int:
    """Return how many runs have room side by side, each with a CPU for reading data; at least 1.

    nodes: what a node of each kind has, and how many of them there can be.
    """
    resources = experiment.resources
    each, workers = per_worker(resources), resources.workers
    cpus = sum(node.get("CPU", 0) * count for node, count in nodes)
    fit = min(_room(each, nodes) // workers, int(cpus // (workers * each["CPU"] + 1)))
    return max(1, fit)


def _room(each: Mapping[str, float], nodes: Sequence[tuple[Mapping[str, float], int]]) -> int:
    """Return how many processes fit that need so much `each`."""
    return sum(
        # Of a GPU there are five fifths, though 1 // 0.2 is 4.
        count * int(min(node.get(name, 0) / need for name, need in each.items()) + 1e-6)
        for node, count in nodes
    )


def per_worker(resources: ResourceSettings) -> dict[str, float]:
    """Return what one worker holds."""
    gpus = {"GPU": resources.gpus_per_worker} if resources.gpus_per_worker else {}
    return {"CPU": resources.cpus_per_worker, **gpus}


def _processes(experiment: Experiment) -> dict[str, int]:
    """Processes that hold a worker's resources at a time, by the setting that says how many."""
    return {
        "resources.workers": experiment.resources.workers,
        "evaluation.actors": experiment.evaluation.actors,
    }


def _probe(address: str) -> None:
    """Raise ConfigError unless the cluster lets this process in: `ray.init` would try for long."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "status", "--address", address]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise ConfigError([
            f"RAY_ADDRESS={address}: no Ray cluster answered there within {PROBE_SECONDS:g} s: check"
            " the address and that this machine reaches it, or unset RAY_ADDRESS for a local cluster"
        ]) from error  # fmt: skip
    if done.returncode:
        raise _refused(address, done.stderr or done.stdout)


def _refused(address: str, said: str) -> ConfigError:
    """Return Ray's words about a cluster that cannot be joined as one sentence with its cure."""
    if "InvalidAuthToken" in said or "authentication token" in said:
        why = (
            "the token is missing or not that of the cluster: set RAY_AUTH_MODE=token, and"
            " RAY_AUTH_TOKEN_PATH to a file that holds the cluster's token"
        )
    elif "ersion mismatch" in said:
        versions = " ".join(said[said.index("ersion mismatch") :].split()).partition(": ")[2]
        why = f"{versions.rstrip('.')}: install the cluster's versions here, or submit the job"
    else:
        last = (said.strip().splitlines() or ["no answer"])[-1]
        why = f"Ray cannot connect ({last}): check the address, or unset it for a local cluster"
    return ConfigError([f"RAY_ADDRESS={address}: {why}"])


def _nodes() -> list[tuple[Mapping[str, float], int]] | None:
    """Return what a node of each kind has, and how many there are at most.

    None where an autoscaler may start nodes and does not say which.
    """
    import ray
    from ray._private.state import state  # no public name tells what the autoscaler may start

    config = state.get_cluster_config()
    kinds = [] if config is None else [kind for kind in config.node_group_configs if kind.max_count]
    if kinds:
        return [
            (dict(kind.resources), kind.max_count if kind.max_count > 0 else UNBOUNDED)
            for kind in kinds
        ]
    alive = [node for node in ray.nodes() if node["Alive"]]
    if any(node["Labels"].get(NODE_GROUP) for node in alive):
        return None
    return [(node["Resources"], 1) for node in alive]


def check_capacity(
    experiment: Experiment, nodes: Sequence[tuple[Mapping[str, float], int]] | None
) -> None:
    """Refuse what would wait for resources for ever; None: what there can be is not known.

    nodes: what a node of each kind has, and how many of them there can be. Raises ConfigError with
    the largest number of processes that would fit.
    """
    if nodes is None:
        return
    each = per_worker(experiment.resources)
    total = {name: sum(node.get(name, 0) * count for node, count in nodes) for name in _COUNTED}
    room = _room(each, nodes)
    problems: list[str] = []
    for setting, count in _processes(experiment).items():
        spare = 1 if setting == "resources.workers" else 0
        fit = min(room, int((total["CPU"] - spare) // each["CPU"]))
        if count <= fit:
            continue
        asked = {name: count * need for name, need in each.items()}
        beside = " and 1 CPU for reading data" if spare else ""
        machines = sum(count for _, count in nodes)
        problems.append(
            f"{setting}={count} needs {_words(asked)} ({_words(each)} each){beside}, and the"
            f" cluster has at most {_words(total)} on {machines} node{'s' * (machines != 1)}: "
            + (f"set {setting}={fit}" if fit > 0 else "not even one fits; ask for less of each")
            + ", or enlarge the cluster"
        )
    if problems:
        raise ConfigError(problems)


def _words(resources: Mapping[str, float]) -> str:
    return " and ".join(
        f"{resources[name]:g} {name}{'s' * (resources[name] != 1)}"
        for name in _COUNTED
        if name in resources
    )


class Room:
    """Whether the cluster has room for the workers: Ray Train waits for it without a word."""

    def __init__(self, resources: ResourceSettings) -> None:
        self._workers, self._each = resources.workers, per_worker(resources)
        self._since: float | None = None
        self._told = 0.0
        self._looked = time.monotonic()

    def lack(self) -> str | None:
        """Return a line about what is lacking, at most one in `WAIT_SECONDS`."""
        import ray

        now = time.monotonic()
        if now - self._looked < LOOK_SECONDS:
            return None
        self._looked = now
        if not self._pending():
            self._since = None
            return None
        if self._since is None:
            self._since = self._told = now
        if now - self._told < WAIT_SECONDS:
            return None
        self._told = now
        return (
            f"waiting for room for {self._workers} workers ({_words(self._each)} each) for"
            f" {now - self._since:.0f} s: the cluster has {_words(_both(ray.cluster_resources()))},"
            f" free are {_words(_both(ray.available_resources()))}"
        )

    def _pending(self) -> bool:
        from ray.util import placement_group_table

        return any(
            group["state"] in ("PENDING", "RESCHEDULING")
            and list(group["bundles"].values()) == [self._each] * self._workers
            for group in placement_group_table().values()
        )


def _both(resources: Mapping[str, float]) -> dict[str, float]:
    return {name: resources.get(name, 0.0) for name in _COUNTED}


def ray_logs() -> Path:
    """Return the folder of Ray's own logs on this machine, of the cluster that is connected to."""
    import ray

    context: Any = ray.init(ignore_reinit_error=True, logging_level=logging.ERROR)
    return Path(context.address_info["session_dir"]) / "logs"
