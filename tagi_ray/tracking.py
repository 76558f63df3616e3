"""Metrics for TensorBoard, MLflow and Weights & Biases, where `loggers` asks for them.

`metrics.jsonl` is the truth and complete without any of this. A callback on Ray Train's controller
wakes one thread for each logger, which reads the file and sends what is not logged yet: a server
that is slow, down or gone holds up nothing but its own thread, is warned of once, and is tried
again later and when the run is continued. A run is one run there, whatever restarts it: its id and
how far it is logged stand in `<run>/loggers/<logger>.json`. Metrics are named by stage, such as
`finetune_tagi/seed_0/loss`, over the stage's steps; settings are logged flat, as `lora.rank`.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tagi_ray import history
from tagi_ray.json_files import write_whole
from tagi_ray.loggers import CURES, DEFAULTS, ENVIRONMENT, SINKS, Point, Run, flat_settings
from tagi_ray.stages import StageSpec

FOLDER = "loggers"
"""Folder of a run with what is known of each logger's run."""
WARNINGS = "logs/loggers.jsonl"
"""File of a run in which the threads on the controller tell the driver what went wrong."""
FLUSH_SECONDS = 30.0
"""What the end of training waits for loggers at most, all of them together."""
SLOW_SECONDS = 120.0
"""After how long a logger that does not answer is warned of."""
RETRY_SECONDS = 300.0
BATCH = 100
"""Records that are sent at a time."""

logger = logging.getLogger(__name__)


def callbacks(specs: Sequence[StageSpec]) -> list[Any]:
    """Return the callbacks for Ray Train's controller: one that feeds the run's loggers, or none.

    Workers report at each record of metrics.jsonl, after it is written, with at least `stage`,
    `seed` and `step`.
    """
    from ray.train import UserCallback

    experiment, last = specs[0].experiment, specs[-1]
    if not experiment.loggers:
        return []
    run = Run(
        specs[0].run_folder,
        experiment.name,
        flat_settings(experiment),
        {name: value for name, value in os.environ.items() if name.startswith(ENVIRONMENT)},
    )
    feed = Feed(run, experiment.loggers, (last.name, last.seed, last.settings.steps))

    class Loggers(UserCallback):
        def after_report(self, run_context: Any, metrics: Any, checkpoint: Any) -> None:
            with _never_raising():
                feed.report(metrics[0])

        def after_exception(self, run_context: Any, worker_exceptions: Any) -> None:
            with _never_raising():
                feed.finish("FAILED")

    return [Loggers()]


@contextmanager
def _never_raising() -> Iterator[None]:
    try:
        yield
    except Exception:
        logger.exception("the loggers failed")


class Feed:
    """Starts and wakes the loggers' threads; nothing that they do can stop or hold the caller.

    `last` is stage, seed and step of the last record of a fit, after which they are finished.
    """

    def __init__(self, run: Run, loggers: Sequence[str], last: tuple[str, int, int]) -> None:
        self._run = run
        self._loggers = loggers
        self._last = last
        self._ended = False
        self._followers: list[Follower] = []

    def report(self, record: Mapping[str, Any]) -> None:
        """Workers wrote a record; after the last one, wait a while for all to be logged."""
        if self._ended:
            return
        if not self._followers:
            os.environ.update(self._run.environment)
            for name, value in DEFAULTS.items():
                os.environ.setdefault(name, value)
            self._followers = [Follower(self._run, name) for name in self._loggers]
        for follower in self._followers:
            follower.wake()
        if tuple(record.get(name) for name in ("stage", "seed", "step")) == self._last:
            self._ended = True
            self.finish("FINISHED")

    def finish(self, status: str) -> None:
        """End the threads, which may take FLUSH_SECONDS; the next report starts them again."""
        deadline = time.monotonic() + FLUSH_SECONDS
        for follower in self._followers:
            follower.end(status)
        for follower in self._followers:
            follower.wait(deadline)
        self._followers = []


class Follower:
    """A thread that sends to one logger what metrics.jsonl has and the logger has not."""

    def __init__(self, run: Run, name: str) -> None:
        self._run = run
        self._name = name
        self._state_path = run.folder / FOLDER / f"{name}.json"
        self._state: dict[str, Any] = {"id": None, "logged": {}}
        self._news = threading.Event()
        self._end = threading.Event()
        self._status = "FINISHED"
        self._warned = self._given_up = False
        self._busy_since: float | None = None
        self._thread = threading.Thread(target=self._work, daemon=True, name=f"log to {name}")
        self._thread.start()

    def wake(self) -> None:
        """There are new records."""
        since = self._busy_since
        if since is not None and time.monotonic() - since > SLOW_SECONDS:
            self._warn(f"does not answer for {SLOW_SECONDS:g} s")
        self._news.set()

    def end(self, status: str) -> None:
        """Let the thread send what there is, close the logger's run with a status, and end."""
        self._status = status
        self._end.set()
        self._news.set()

    def wait(self, deadline: float) -> None:
        """Wait for the thread's end until a time of the monotonic clock."""
        self._thread.join(max(deadline - time.monotonic(), 0.0))
        if self._thread.is_alive():
            self._given_up = True  # another thread may take its place
            self._warn(f"did not take the last records within {FLUSH_SECONDS:g} s")

    def _work(self) -> None:
        while True:
            self._busy_since = time.monotonic()
            try:
                return self._follow()
            except BaseException as error:  # W&B ends with SystemExit, too
                said = str(error).strip().splitlines() or [""]
                self._warn(f"failed ({type(error).__name__}: {said[0][:300]})")
            self._busy_since = None
            if self._end.wait(RETRY_SECONDS):
                return None

    def _follow(self) -> None:
        self._state_path.parent.mkdir(parents=True, exist_ok=True)
        if self._state_path.exists():
            self._state = json.loads(self._state_path.read_text("utf-8"))
        sink = SINKS[self._name](self._run, self._state, self._save)
        lines = _Lines(self._run.folder / history.METRICS)
        while True:
            ending = self._end.is_set()  # asked before the file is read for the last time
            self._busy_since = time.monotonic()
            points = [point for record in lines.read() if (point := self._new(record))]
            for start in range(0, len(points), BATCH):
                if self._given_up:
                    return
                batch = points[start : start + BATCH]
                sink.write(batch)
                self._state["logged"] |= {name: step for name, step, _ in batch}
                self._save()
            if ending:
                sink.close(self._status)
                return
            self._busy_since = None
            self._news.wait()
            self._news.clear()

    def _new(self, record: Mapping[str, Any]) -> Point | None:
        """Return the metrics of a record, unless its step was logged already.

        A stage that continues from a checkpoint trains the steps after it a second time, to the
        same losses.
        """
        name = f"{record['stage']}/seed_{record['seed']}"
        if record["step"] <= self._state["logged"].get(name, 0):
            return None
        known = {"stage", "seed", "variant", "step", "steps"}
        return name, record["step"], {k: float(v) for k, v in record.items() if k not in known}

    def _save(self) -> None:
        write_whole(self._state_path, json.dumps(self._state))

    def _warn(self, problem: str) -> None:
        if self._warned:
            return
        self._warned = True
        cure = CURES[self._name].replace("<run>", str(self._run.folder))
        text = (
            f"the logger {self._name} {problem}; training goes on, and metrics.jsonl has every"
            f" record. {cure[0].upper()}{cure[1:]}. What is missing is logged as soon as it"
            " answers, or when the run is continued"
        )
        logger.warning("%s", text)
        try:
            path = self._run.folder / WARNINGS
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"logger": self._name, "text": text}) + "\n")
        except OSError as error:
            logger.warning("%s: can't be written to (%s)", WARNINGS, error)


class _Lines:
    """Objects of a JSONL file that were added since the last look, all of them after a rewrite."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: tuple[int, int] | None = None
        self._place = 0

    def read(self) -> Iterator[Mapping[str, Any]]:
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            status = os.fstat(file.fileno())
            if self._file != (status.st_dev, status.st_ino) or status.st_size < self._place:
                self._file, self._place = (status.st_dev, status.st_ino), 0
            file.seek(self._place)
            for line in file:
                if not line.endswith(b"\n"):
                    return  # it is being written
                self._place += len(line)
                yield json.loads(line)


class Warnings:
    """What went wrong with the loggers of a run since this was made, each logger's first words."""

    def __init__(self, run_folder: Path) -> None:
        self._lines = _Lines(run_folder / WARNINGS)
        for _ in self._lines.read():
            pass

    def read(self) -> Iterator[str]:
        """Yield new sentences of loggers that this process has not told of yet."""
        for line in self._lines.read():
            if line["logger"] not in _told:
                _told.add(line["logger"])
                yield line["text"]


_told: set[str] = set()
"""A job trains several groups of stages, and its person is to read of each logger once."""
