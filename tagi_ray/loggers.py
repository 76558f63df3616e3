"""TensorBoard, MLflow and Weights & Biases, each as something that metrics are written to.

Each takes its own environment variables, of the process that starts the run:

- tensorboard: none. Look at it with `tensorboard --logdir <run>/tensorboard`.
- mlflow: MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME (`tagi_ray`), MLFLOW_TRACKING_USERNAME,
  MLFLOW_TRACKING_PASSWORD, MLFLOW_TRACKING_TOKEN. Without an address the metrics go to files, which
  `MLFLOW_ALLOW_FILE_STORE=true mlflow ui --backend-store-uri <run>/mlruns` shows.
- wandb: WANDB_API_KEY, or WANDB_MODE=offline (then `wandb sync <run>/wandb/offline-run-*`),
  WANDB_PROJECT (`tagi_ray`), WANDB_ENTITY, WANDB_BASE_URL.
"""

from __future__ import annotations

import json
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from tagi_ray.config import Experiment
from tagi_ray.errors import ConfigError

ENVIRONMENT = ("MLFLOW_", "WANDB_")
# They would wait for minutes, and tell their makers of the use; what a person set stays.
DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "WANDB_ERROR_REPORTING": "false",
}
CURES = {
    "tensorboard": "make <run>/tensorboard a folder that can be written to",
    "mlflow": "check MLFLOW_TRACKING_URI and that its server is up; if the run was deleted there,"
    " delete <run>/loggers/mlflow.json",
    "wandb": "set WANDB_API_KEY, or WANDB_MODE=offline to log into <run>/wandb",
}
_MODULES = {"tensorboard": "tensorboardX", "mlflow": "mlflow", "wandb": "wandb"}

Values = Mapping[str, float]
Point = tuple[str, int, Values]
"""Name of a stage as metrics have it, its step, and the metrics there."""


def require_packages(loggers: Sequence[str]) -> None:
    """Raise ConfigError for loggers whose packages are not installed."""
    problems = [
        f"loggers has {name!r}, and its package is not installed: run"
        f" `pip install 'tagi-ray[{name}]'`, or leave it out"
        for name in loggers
        if (spec := find_spec(_MODULES[name])) is None or spec.origin is None  # a folder's name
    ]
    if problems:
        raise ConfigError(problems)


def flat_settings(experiment: Experiment) -> dict[str, str]:
    """Return all settings by their dotted names, as JSON where they are no texts.

    User names and passwords in addresses are left out.
    """

    def flat(section: Mapping[str, Any], start: str = "") -> Iterator[tuple[str, str]]:
        for name, value in section.items():
            if isinstance(value, dict):
                yield from flat(value, f"{start}{name}.")
            else:
                text = value if isinstance(value, str) else json.dumps(value)
                yield f"{start}{name}", re.sub(r"://[^/@\s]+@", "://", text)

    return dict(flat(experiment.model_dump(mode="json")))


@dataclass(frozen=True, slots=True)
class Run:
    """The run that is logged."""

    folder: Path
    name: str
    settings: Mapping[str, str]
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    """The loggers' own variables, which the controller's process need not have."""


class Sink(Protocol):
    """A logger's run, opened."""

    def write(self, points: Sequence[Point]) -> None:
        """Log metrics."""
        ...

    def close(self, status: str) -> None:
        """End the run with `FINISHED` or `FAILED`."""
        ...


class _TensorBoard:
    """Event files, written at once: the package's own writer tells of no failure, nor waits."""

    def __init__(self, run: Run, state: dict[str, Any], save: Callable[[], None]) -> None:
        from tensorboardX import summary
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event  # pyright: ignore (made at run time)

        self._event, self._summary = Event, summary
        folder = run.folder / "tensorboard"
        folder.mkdir(exist_ok=True)
        # A name of its own: within a second, the package would overwrite the last file.
        self._writer = EventsWriter(str(folder / "events"), f".{uuid.uuid4().hex[:8]}")
        if state["id"] is None:
            rows = "\n".join(f"| {name} | {value} |" for name, value in run.settings.items())
            self._add(summary.text("settings", f"| setting | value |\n|---|---|\n{rows}"), 0)
            state["id"] = run.name
            save()

    def _add(self, content: Any, step: int) -> None:
        self._writer.write_event(self._event(wall_time=time.time(), step=step, summary=content))

    def write(self, points: Sequence[Point]) -> None:
        for name, step, values in points:
            for metric, value in values.items():
                self._add(self._summary.scalar(f"{name}/{metric}", value), step)
        self._writer.flush()

    def close(self, status: str) -> None:
        self._writer.close()


class _MLflow:
    def __init__(self, run: Run, state: dict[str, Any], save: Callable[[], None]) -> None:
        address = os.environ.get("MLFLOW_TRACKING_URI")
        if not address:
            address = (run.folder / "mlruns").as_uri()
            os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._metric = Metric
        self._client = MlflowClient(address)
        if state["id"] is None:
            created = self._client.create_run(self._experiment(), run_name=run.name)
            state["id"] = created.info.run_id
            save()
        self._id = state["id"]
        known = self._client.get_run(self._id).data.params
        new = [Param(k, v[:6000]) for k, v in run.settings.items() if k not in known]
        for start in range(0, len(new), 100):  # as many as a server takes at once
            self._client.log_batch(self._id, params=new[start : start + 100])
        self._client.update_run(self._id, status="RUNNING")

    def _experiment(self) -> str:
        if known := os.environ.get("MLFLOW_EXPERIMENT_ID"):
            return known
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "tagi_ray")
        found = self._client.get_experiment_by_name(name)
        return self._client.create_experiment(name) if found is None else found.experiment_id

    def write(self, points: Sequence[Point]) -> None:
        now = int(time.time() * 1000)
        metrics = [
            self._metric(f"{name}/{metric}", value, now, step)
            for name, step, values in points
            for metric, value in values.items()
        ]
        for start in range(0, len(metrics), 1000):
            self._client.log_batch(self._id, metrics=metrics[start : start + 1000])

    def close(self, status: str) -> None:
        self._client.set_terminated(self._id, status)


class _WandB:
    def __init__(self, run: Run, state: dict[str, Any], save: Callable[[], None]) -> None:
        import wandb

        if state["id"] is None:
            state["id"] = uuid.uuid4().hex[:12]
            save()
        self._run = wandb.init(
            id=state["id"],
            resume="allow",
            name=run.name,
            project=os.environ.get("WANDB_PROJECT", "tagi_ray"),
            dir=str(run.folder),
            settings=wandb.Settings(
                console="off", silent=True, disable_git=True, disable_code=True, init_timeout=20
            ),
        )
        self._run.config.update(dict(run.settings), allow_val_change=True)
        self._named: set[str] = set()

    def write(self, points: Sequence[Point]) -> None:
        for name, step, values in points:
            if name not in self._named:  # W&B's own step has to grow over all stages
                self._run.define_metric(f"{name}/step")
                self._run.define_metric(f"{name}/*", step_metric=f"{name}/step")
                self._named.add(name)
            logged = {f"{name}/{metric}": value for metric, value in values.items()}
            self._run.log({**logged, f"{name}/step": step})

    def close(self, status: str) -> None:
        self._run.finish(exit_code=0 if status == "FINISHED" else 1)


SINKS: dict[str, Callable[[Run, dict[str, Any], Callable[[], None]], Sink]] = {
    "tensorboard": _TensorBoard,
    "mlflow": _MLflow,
    "wandb": _WandB,
}
