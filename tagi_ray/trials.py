"""The trials of a sweep: their table on disk, their order, and a leaderboard as plain text."""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from io import StringIO
from pathlib import Path
from typing import Any, Literal, cast, get_args

from tagi_ray.errors import DataError
from tagi_ray.json_files import refuse, write_whole
from tagi_ray.remote_files import read_bytes

Status = Literal["waiting", "running", "done", "stopped", "failed"]
ENDED: tuple[Status, ...] = ("done", "stopped")
"""Statuses of trials that have a result."""
STATUS_WORDS = {"stopped": "stopped early"}


@dataclass(frozen=True, slots=True)
class TrialRow:
    """One trial of a sweep as its tables show it."""

    number: int
    """Order of start; 0 has the recipe's own settings."""
    folder: str
    """Name below `trials/` of the sweep's folder."""
    status: Status
    """`stopped` is one that the scheduler ended early, in favour of better ones."""
    step: int
    valid_loss: float | None
    """Best so far: the cross-entropy on validation tasks, which loss weights don't scale."""
    adapter_parameters: int | None
    seconds: float
    attempts: int
    """1, or more after failures."""
    changes: Mapping[str, str]
    """Dotted field of the settings -> its value as YAML text, which is never empty."""
    error: str
    """One line, empty without an error."""


COLUMNS = tuple(one.name for one in fields(TrialRow) if one.name != "changes")


def write_trials(path: Path, rows: Sequence[TrialRow]) -> None:
    """Write the rows as CSV, at once: fixed columns, then one for each changed field.

    An empty cell of a field says that the trial doesn't change it.
    """
    names = list(dict.fromkeys(name for row in rows for name in row.changes))
    table = StringIO(newline="")
    # Texts in quotes: only so does a carriage return in one survive.
    writer = csv.writer(table, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
    writer.writerow([*COLUMNS, *names])
    for row in rows:
        assert all(row.changes.values()), "a value in YAML is never empty"
        fixed = [getattr(row, column) for column in COLUMNS]
        writer.writerow([*fixed, *(row.changes.get(name, "") for name in names)])
    write_whole(path, table.getvalue())


def read_trials(path: Path) -> list[TrialRow]:
    """Return the rows of a file of `write_trials`.

    Raises DataError with file and line for one that is damaged.
    """
    try:
        text = read_bytes(str(path)).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 at byte {error.start}; convert the file") from error
    if not text.endswith("\n"):
        raise DataError(f"{path}:{text.count(chr(10)) + 1}: the last line is cut off; restore it")
    reader = csv.reader(StringIO(text, newline=""), strict=True)
    rows: list[TrialRow] = []
    line = 1
    try:
        head = next(reader)
        names = _field_names(head, f"{path}:1")
        line = reader.line_num + 1
        for cells in reader:
            rows.append(_row(cells, names, f"{path}:{line}"))
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}:{line}: is not CSV ({error}); restore the file") from error
    return rows


def _field_names(head: Sequence[str], where: str) -> list[str]:
    fixed, names = tuple(head[: len(COLUMNS)]), list(head[len(COLUMNS) :])
    if fixed != COLUMNS or len(set(names)) != len(names) or not all(names):
        refuse(where, "the columns", ",".join(head), f"begin with {','.join(COLUMNS)}")
    return names


def _row(cells: Sequence[str], names: Sequence[str], where: str) -> TrialRow:
    if len(cells) != len(COLUMNS) + len(names):
        count = len(COLUMNS) + len(names)
        raise DataError(f"{where}: holds {len(cells)} cells, not {count}; restore the line")
    fixed = dict(zip(COLUMNS, cells, strict=False))
    if fixed["status"] not in get_args(Status):
        refuse(where, "status", fixed["status"], f"give one of {', '.join(get_args(Status))}")

    def number(column: str, kind: Callable[[str], Any]) -> Any:
        try:
            return kind(fixed[column])
        except ValueError:
            refuse(where, column, fixed[column], "give a number")

    def number_or_none(column: str, kind: Callable[[str], Any]) -> Any:
        return number(column, kind) if fixed[column] else None

    values = zip(names, cells[len(COLUMNS) :], strict=True)
    return TrialRow(
        number=number("number", int),
        folder=fixed["folder"],
        status=cast(Status, fixed["status"]),
        step=number("step", int),
        valid_loss=number_or_none("valid_loss", float),
        adapter_parameters=number_or_none("adapter_parameters", int),
        seconds=number("seconds", float),
        attempts=number("attempts", int),
        changes={name: value for name, value in values if value},
        error=fixed["error"],
    )


def loss_of(row: TrialRow) -> float:
    """Return the validation loss, infinite where the trial has none that is finite."""
    loss = row.valid_loss
    return loss if loss is not None and math.isfinite(loss) else math.inf


def ranked(rows: Sequence[TrialRow]) -> list[TrialRow]:
    """Return the trials that ended with a finite loss, early or not: best first."""
    ended = [row for row in rows if row.status in ENDED and loss_of(row) < math.inf]
    return sorted(ended, key=lambda row: (loss_of(row), row.number))


def done(rows: Sequence[TrialRow]) -> list[TrialRow]:
    """Return the trials that took all their steps and have a finite loss: best first."""
    return [row for row in ranked(rows) if row.status == "done"]


def best(rows: Sequence[TrialRow]) -> TrialRow | None:
    """Return the best of the trials that took all their steps."""
    return next(iter(done(rows)), None)


def pareto(rows: Sequence[TrialRow]) -> list[TrialRow]:
    """Return the done trials of which none other has both no more loss and no more adapter
    parameters, and one of them less: best loss first.
    """
    sized = [(loss_of(row), row.adapter_parameters, row) for row in done(rows)]
    points = [(loss, size, row) for loss, size, row in sized if size is not None]
    return [
        row
        for loss, size, row in points
        if not any(
            other <= loss and small <= size and (other, small) != (loss, size)
            for other, small, _ in points
        )
    ]


def counted(rows: Sequence[TrialRow]) -> str:
    """Say how many trials there are of each status."""
    counts = Counter(row.status for row in rows)
    order = ("done", "stopped", "failed", "running", "waiting")
    parts = [f"{counts[one]} {STATUS_WORDS.get(one, one)}" for one in order if counts[one]]
    return f"{len(rows)} trial{'s' * (len(rows) != 1)}{': ' * bool(parts)}{', '.join(parts)}"


def short_count(number: int | None) -> str:
    """Return a count with three digits at most: 442, 3.5 k, 12 M."""
    if number is None:
        return "-"
    for size, unit in ((10**9, " G"), (10**6, " M"), (10**3, " k")):
        # What rounds to 1000 of a unit is 1 of the next.
        if number >= size * 0.9995:
            return f"{number / size:.3g}{unit}"
    return str(number)


def shown_loss(row: TrialRow) -> str:
    """Return the validation loss as tables show it."""
    return "-" if row.valid_loss is None else f"{row.valid_loss:.4f}"


def shown_changes(row: TrialRow) -> str:
    """Return the changes of a trial in one line."""
    told = ", ".join(f"{name}={value}" for name, value in row.changes.items())
    return told or "the recipe's own settings"


def leaderboard(rows: Sequence[TrialRow], top: int = 10) -> str:
    """Return a plain text table: what ended, best first, then what runs, failed or waits."""
    order = {"running": 0, "failed": 1}
    first = ranked(rows)
    shown = {row.number for row in first}
    rest = [row for row in rows if row.number not in shown]
    rest.sort(key=lambda row: (order.get(row.status, 2), row.number))
    head = (
        f"{'trial':>5}  {'status':<13} {'step':>7} {'valid loss':>10} {'parameters':>10}  changes"
    )
    lines = [counted(rows), "", head, "-" * len(head)]
    for row in [*first, *rest][:top]:
        status = STATUS_WORDS.get(row.status, row.status)
        lines.append(
            f"{row.number:>5}  {status:<13} {row.step:>7} {shown_loss(row):>10}"
            f" {short_count(row.adapter_parameters):>10}  {shown_changes(row)}"
        )
    if len(rows) > top:
        lines.append(f"and {len(rows) - top} more in trials.csv")
    return "\n".join(lines)
