"""Files of records, one instance a record: JSONL, JSON, Parquet, and datasets of the hub.

Each is read through once, and then again at the places that were found, so that nobody ever holds
more than a line, a row group or (JSON) one file.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import accumulate, groupby
from typing import Any, Protocol

from tagi_ray import hub
from tagi_ray.errors import DataError
from tagi_ray.json_files import (
    MAX_LINE_BYTES,
    Record,
    as_object,
    line_record,
    lines_of,
    opened_lines,
    read_json_file,
)
from tagi_ray.remote_files import opened
from tagi_ray.sections import DataSettings

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet")
COLUMNS = ("task", "category", "instruction", "input", "output", "outputs")
NEEDED = (
    "task, instruction, input, and output (a text) or outputs (a list of texts); or Alpaca's"
    " instruction, input and output"
)


class Records(Protocol):
    """A file of records that can be read through, and again at the places found then."""

    @property
    def path(self) -> str:
        """Return the file's name in messages."""
        ...

    def scan(self) -> Iterator[tuple[int, str, Callable[[], Record]]]:
        """Yield the place of each record, its name in messages, and what gives or refuses it."""
        ...

    def read(self, places: Sequence[int]) -> Iterator[tuple[str, Record]]:
        """Yield the records at some places, which ascend."""
        ...


def records_of(path: str) -> Records:
    """Return a file by its suffix; one without a known suffix is taken for JSONL."""
    if path.endswith(".parquet"):
        return ParquetRows(path)
    return JsonList(path) if path.endswith(".json") else JsonLines(path)


def hub_rows(settings: DataSettings) -> HubRows:
    """Return the rows of a hub dataset at one commit, which every reader then takes."""
    path = str(settings.path)
    commit = hub.commit_of("data.path", path, settings.revision, "dataset")
    return HubRows(path, commit, settings.subset, settings.hub_split)


@dataclass(frozen=True, slots=True)
class JsonLines:
    """A JSONL file; a place is the offset of a line in bytes, in the unpacked file."""

    path: str

    def scan(self) -> Iterator[tuple[int, str, Callable[[], Record]]]:
        """Yield every line that is not blank."""
        for place, number, line in lines_of(self.path):
            where = f"{self.path}:{number}"
            yield place, where, partial(line_record, line, where)

    def read(self, places: Sequence[int]) -> Iterator[tuple[str, Record]]:
        """Yield the lines that begin at some places."""
        with opened_lines(self.path) as file:
            for place in places:
                file.seek(place)
                where = f"{self.path} (byte {place})"
                yield where, line_record(file.readline(MAX_LINE_BYTES + 1), where)


@dataclass(frozen=True, slots=True)
class JsonList:
    """A JSON file that is one list, as Alpaca was published; read whole."""

    path: str

    def scan(self) -> Iterator[tuple[int, str, Callable[[], Record]]]:
        """Yield every element."""
        for place, record in enumerate(_json_list(self.path)):
            where = f"{self.path}: record {place + 1}"
            yield place, where, partial(as_object, record, where)

    def read(self, places: Sequence[int]) -> Iterator[tuple[str, Record]]:
        """Yield the elements at some indices."""
        for place in places:
            yield f"{self.path}: record {place + 1}", _json_list(self.path)[place]


@dataclass(frozen=True, slots=True)
class ParquetRows:
    """A Parquet file; a place is a row number, and one row group is held at a time."""

    path: str

    def scan(self) -> Iterator[tuple[int, str, Callable[[], Record]]]:
        """Yield every row."""
        with opened_parquet(self.path) as file:
            _check_columns(self.path, file.schema_arrow.names)
            place = 0
            for group in range(file.num_row_groups):
                for row in _rows(file, group):
                    yield place, self._where(place), partial(dict, row)
                    place += 1

    def read(self, places: Sequence[int]) -> Iterator[tuple[str, Record]]:
        """Yield some rows."""
        with opened_parquet(self.path) as file:
            sizes = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
            ends = list(accumulate(sizes))
            for group, members in groupby(places, lambda place: bisect.bisect_right(ends, place)):
                rows = _rows(file, group)
                first = ends[group] - sizes[group]
                for place in members:
                    yield self._where(place), rows[place - first]

    def _where(self, place: int) -> str:
        return f"{self.path}: row {place + 1}"


@dataclass(frozen=True, slots=True)
class HubRows:
    """The rows of one split of a hub dataset; a place is a row number."""

    path: str
    commit: str
    subset: str | None
    split: str

    def scan(self) -> Iterator[tuple[int, str, Callable[[], Record]]]:
        """Yield every row."""
        for place, row in enumerate(self._rows()):
            yield place, f"{self.path}: row {place + 1}", partial(dict, row)

    def read(self, places: Sequence[int]) -> Iterator[tuple[str, Record]]:
        """Yield some rows."""
        rows = self._rows()
        for place in places:
            yield f"{self.path}: row {place + 1}", rows[place]

    def _rows(self) -> Any:
        return _hub_dataset(self.path, self.commit, self.subset, self.split)


@contextmanager
def opened_parquet(path: str) -> Iterator[Any]:
    """Open a Parquet file; raises DataError where it can't be opened, or be read in the block."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with opened(path) as source:
        try:
            with pq.ParquetFile(source) as file:
                yield file
        except (pa.ArrowException, OSError) as error:
            reason = str(error).partition("\n")[0]
            raise DataError(
                f"{path}: is not a Parquet file, or a damaged one ({reason}); write it again"
            ) from error


def _rows(file: Any, group: int) -> list[Record]:
    names = [name for name in file.schema_arrow.names if name in COLUMNS]
    return file.read_row_group(group, columns=names).to_pylist()


def _check_columns(where: str, names: Sequence[str]) -> None:
    needed = {"instruction", "input"}
    absent = sorted(needed.difference(names))
    if not {"output", "outputs"}.intersection(names):
        absent.append("output")
    if absent:
        raise DataError(
            f"{where}: has no column {' and no column '.join(map(repr, absent))}, but"
            f" {', '.join(names)}; rows need {NEEDED}"
        )


@lru_cache(maxsize=1)
def _json_list(path: str) -> list[Any]:
    content = read_json_file(path)
    if not isinstance(content, list):
        raise DataError(f"{path}: is not a JSON list; name a JSONL file .jsonl")
    return content


@lru_cache(maxsize=1)
def _hub_dataset(path: str, commit: str, subset: str | None, split: str) -> Any:
    import sys

    from datasets import disable_progress_bars, load_dataset

    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        rows = load_dataset(path, name=subset, revision=commit, split=split)
    # Whatever the hub, the network or the cache raises, it is the data that can't be had.
    except Exception as error:
        raise DataError(hub_refusal("data", path, subset, split, error)) from error
    _check_columns(f"data.path={path}", rows.column_names)
    return rows.select_columns([name for name in rows.column_names if name in COLUMNS])


def hub_refusal(section: str, path: str, subset: str | None, split: str, error: Exception) -> str:
    """Say why a hub dataset can't be read; `section` of the settings names it."""
    reason = " ".join((str(error) or type(error).__name__).split())
    if "ataset scripts are no longer supported" in reason:
        return (
            f"{section}.path={path} is made by a script of its own, which is never run: set"
            f" {section}.revision=refs/convert/parquet, where the hub keeps its rows as Parquet"
        )
    if "Config name is missing" in reason or "BuilderConfig" in reason:
        wrong = (
            f"{section}.subset={subset} is no subset" if subset else f"{section}.subset is not set"
        )
        return f"{wrong}, and {section}.path={path} has several ({reason[:300]}): name one of them"
    if "Unknown split" in reason:
        field = "" if section == "pretrain" else f"{section}.hub_split="
        return f"{field}{split} is no split of {section}.path={path} ({reason[:300]})"
    return (
        f"{section}.path={path}: can't be loaded from the hub ({reason[:300]}); check the id, the"
        " revision and the connection"
    )
