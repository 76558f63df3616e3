"""What a person sees of training: bars on a terminal, and elsewhere one line for each record."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tagi_ray import history, telemetry, tracking
from tagi_ray.report import read_records
from tagi_ray.stages import StageSpec

Record = Mapping[str, Any]
Say = Callable[[str], None]

logger = logging.getLogger(__name__)


@contextmanager
def shown(
    specs: Sequence[StageSpec], say: Say, seen: Callable[[Record], None] = lambda record: None
) -> Iterator[Callable[[], None]]:
    """Give a function that shows what is new of stages that are trained one after another.

    Each record of metrics.jsonl goes to `seen` and becomes a line for `say`; where `say` is print on
    a terminal, bars move instead, and a stage leaves its last line. Warnings of loggers are logged.
    Prometheus sees the newest record for as long as this is called.
    """
    run_folder = specs[0].run_folder
    news, warnings = News(run_folder / history.METRICS), tracking.Warnings(run_folder)
    remaining, stage = TimeLeft(specs), telemetry.Stage(specs[0].experiment.name)

    def show(tell: Callable[[Record, float | None], None]) -> None:
        for record in news.read():
            seen(record)
            tell(record, remaining.after(record))
            stage.take(record)
        stage.show()
        for warning in warnings.read():
            logger.warning("%s", warning)

    if say is print and _on_terminal():
        with _bars(specs) as tell:
            yield lambda: show(tell)
    else:
        yield lambda: show(lambda record, whole: say(progress_line(record, whole)))


def progress_line(record: Record, whole: float | None = None) -> str:
    """Return a metrics record as a line for a person; `whole`: seconds that all stages take yet."""
    known = {
        "stage", "seed", "variant", "step", "steps", "loss", "valid_loss", "grad_norm",
        "learning_rate", "tokens_per_second", "step_time", "data_wait", "seconds_left",
        "cut_texts", "peak_memory", "mfu",
    }  # fmt: skip
    parts = [f"{name} {value:.4f}" for name, value in record.items() if name not in known]
    if "valid_loss" in record:
        parts.append(f"valid {record['valid_loss']:.4f}")
    if "cut_texts" in record:
        parts.append(f"cut {record['cut_texts']} texts")
    device: list[str] = []
    if "peak_memory" in record:
        device.append(f"peak {record['peak_memory'] / 2**30:.1f} GiB")
    if "mfu" in record:
        device.append(f"MFU {record['mfu']:.0%}")
    in_all = "" if whole is None else f", in all {_clock(whole)}"
    return "  ".join([
        f"{record['stage']} seed {record['seed']}",
        f"step {record['step']}/{record['steps']}",
        f"loss {record['loss']:.4f}",
        *parts,
        f"lr {record['learning_rate']:.2e}",
        f"norm {record['grad_norm']:.2f}",
        f"{record['tokens_per_second']:,.0f} tokens/s",
        *device,
        f"data wait {record['data_wait']:.0%}",
        f"left {_clock(record['seconds_left'])}{in_all}",
    ])  # fmt: skip


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class News:
    """Records that were written to a metrics file since the last look.

    A stage that continues from a checkpoint rewrites the file, so a place in it means nothing.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._changed = 0.0
        self._seen: dict[tuple[Any, ...], Any] = {}
        for _ in self.read():
            pass

    def read(self) -> Iterator[Record]:
        """Yield records that are new, or were written again with other values."""
        changed = self._path.stat().st_mtime if self._path.exists() else 0.0
        if changed == self._changed:
            return
        self._changed = changed
        for record in read_records(self._path):
            key = (record["stage"], record["seed"], record["step"])
            if self._seen.get(key) != record:
                self._seen[key] = record
                yield record


class TimeLeft:
    """How long stages take yet that are trained one after another.

    A stage that has not begun is taken to be as fast as the last one of its kind.
    """

    def __init__(self, specs: Sequence[StageSpec]) -> None:
        self._specs = specs
        self._places = {(spec.name, spec.seed): place for place, spec in enumerate(specs)}
        self._step_times: dict[str, float] = {}

    def after(self, record: Record) -> float | None:
        """Return the seconds from a record to the end of the last stage.

        None for a stage that is no other's: then they are the stage's own, or where nothing is
        known of one yet.
        """
        place = self._places.get((record["stage"], record["seed"]))
        if place is None:
            return None
        self._step_times[self._specs[place].kind] = record["step_time"]
        later = self._specs[place + 1 :]
        if not later or any(spec.kind not in self._step_times for spec in later):
            return None
        rest = sum(self._step_times[spec.kind] * spec.settings.steps for spec in later)
        return record["seconds_left"] + rest


def _on_terminal() -> bool:
    if not sys.stdout.isatty():
        return False
    from rich.console import Console

    return Console().is_interactive


@contextmanager
def _bars(specs: Sequence[StageSpec]) -> Iterator[Callable[[Record, float | None], None]]:
    """Show a bar for the stage that trains, below the lines of those that are done."""
    from rich.progress import BarColumn, Progress, TextColumn

    columns = ("{task.description}", "{task.completed:.0f}/{task.total:.0f}", "{task.fields[said]}")
    first, *others = [TextColumn(column, markup=False) for column in columns]
    bars = Progress(
        first, BarColumn(bar_width=20), *others,
        refresh_per_second=4, transient=True, redirect_stderr=sys.stderr.isatty(),
    )  # fmt: skip
    places = {(spec.name, spec.seed): f" ({i} of {len(specs)})" for i, spec in enumerate(specs, 1)}
    starting = bars.add_task("starting workers", total=specs[0].settings.steps, said="")
    shown_now = starting
    stage: tuple[str, int] | None = None

    def tell(record: Record, whole: float | None) -> None:
        nonlocal shown_now, stage
        here = (record["stage"], record["seed"])
        if here != stage:
            bars.remove_task(shown_now)
            place = places.get(here, "") if len(specs) > 1 else ""
            name = f"{here[0]} seed {here[1]}{place}"
            shown_now, stage = bars.add_task(name, total=record["steps"], said=""), here
        in_all = "" if whole is None else f", in all {_clock(whole)}"
        said = (
            f"loss {record['loss']:.4f}  {record['tokens_per_second']:,.0f} tokens/s"
            f"  left {_clock(record['seconds_left'])}{in_all}"
        )
        bars.update(shown_now, completed=record["step"], said=said, refresh=True)
        if record["step"] == record["steps"]:
            bars.console.print(
                progress_line(record, whole), highlight=False, markup=False, soft_wrap=True
            )

    with bars, _logging_above():
        yield tell


@contextmanager
def _logging_above() -> Iterator[None]:
    """Let log lines for stderr pass through what rich put in its place, which prints above bars."""
    handlers = [
        handler
        for handler in logging.getLogger().handlers
        if isinstance(handler, logging.StreamHandler) and handler.stream is sys.__stderr__
    ]
    for handler in handlers:
        handler.setStream(sys.stderr)
    try:
        yield
    finally:
        for handler in handlers:
            handler.setStream(sys.__stderr__)
