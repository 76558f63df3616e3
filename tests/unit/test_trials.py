"""Trials of a sweep: their file, their order, and the table for a terminal."""

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tagi_ray.errors import DataError
from tagi_ray.trials import (
    TrialRow,
    best,
    counted,
    leaderboard,
    pareto,
    ranked,
    read_trials,
    short_count,
    write_trials,
)

TEXTS = st.text(st.characters(codec="utf-8"))
ROWS = st.builds(
    TrialRow,
    number=st.integers(0),
    folder=TEXTS,
    status=st.sampled_from(["waiting", "running", "done", "stopped", "failed"]),
    step=st.integers(0),
    valid_loss=st.none() | st.floats(allow_nan=False),
    adapter_parameters=st.none() | st.integers(0),
    seconds=st.floats(0),
    attempts=st.integers(1),
    changes=st.dictionaries(TEXTS.filter(bool), TEXTS.filter(bool), max_size=4),
    error=TEXTS,
)


def trial(number, loss=None, status="done", size=None, **changes):
    return TrialRow(
        number=number,
        folder=f"trial_{number}",
        status=status,
        step=400,
        valid_loss=loss,
        adapter_parameters=size,
        seconds=12.5,
        attempts=1,
        changes=changes,
        error="",
    )


def numbers(rows):
    return [row.number for row in rows]


@settings(deadline=None)  # a busy machine is no fault
@given(st.lists(ROWS, max_size=5))
def test_a_file_gives_back_the_rows(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("sweep") / "trials.csv"
    write_trials(path, rows)
    assert read_trials(path) == rows


def test_a_file_is_a_table_with_a_column_for_each_field(tmp_path):
    path = tmp_path / "trials.csv"
    changed = replace(trial(1, 0.25, size=10), changes={"lora.rank": "8", "lora.targets": "[q, v]"})
    write_trials(path, [trial(0, 0.5), changed])
    head, own, other = path.read_text().splitlines()
    assert head.endswith('"attempts","error","lora.rank","lora.targets"')
    assert own == '0,"trial_0","done",400,0.5,"",12.5,1,"","",""'
    assert other == '1,"trial_1","done",400,0.25,10,12.5,1,"","8","[q, v]"'
    assert [one.name for one in tmp_path.iterdir()] == ["trials.csv"]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ('"done",400', '"dnoe",400', r"trials\.csv:3: status can't be 'dnoe'; give one of waiting"),
        ("400,0.25", "many,0.25", r"trials\.csv:3: step can't be 'many'; give a number"),
        ("0.25", "low", r"trials\.csv:3: valid_loss can't be 'low'"),
        ('"8"', '"8","9"', r"trials\.csv:3: holds 11 cells, not 10"),
        ('"8"', '"8"x', r"trials\.csv:3: is not CSV"),
        ('"8"\n', '"8', r"trials\.csv:3: the last line is cut off"),
        ('"8"\n', '"8\n', r"trials\.csv:3: is not CSV \(unexpected end of data\)"),
        ('"number"', '"nr"', r"trials\.csv:1: the columns can't be 'nr,folder"),
        ('"lora.rank"', '""', r"trials\.csv:1: the columns can't be"),
    ],
)
def test_a_damaged_file_is_refused_with_its_line(tmp_path, old, new, expected):
    path = tmp_path / "trials.csv"
    # The first row's error has a line of its own.
    rows = [replace(trial(0, 0.5, status="failed"), error="lost"), trial(1, 0.25)]
    write_trials(path, [rows[0], replace(rows[1], changes={"lora.rank": "8"})])
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))
    with pytest.raises(DataError, match=expected):
        read_trials(path)


def test_lines_count_as_an_editor_counts_them(tmp_path):
    path = tmp_path / "trials.csv"
    write_trials(path, [replace(trial(0, 0.5), error="two\nlines"), trial(1, 0.25)])
    path.write_text(path.read_text().replace("0.25", "low"))
    with pytest.raises(DataError, match=r"trials\.csv:4: valid_loss"):
        read_trials(path)


def test_a_file_that_is_missing_empty_or_not_text_is_refused(tmp_path):
    path = tmp_path / "trials.csv"
    with pytest.raises(DataError, match=r"trials\.csv"):
        read_trials(path)
    path.write_bytes(b"")
    with pytest.raises(DataError, match=r"trials\.csv:1"):
        read_trials(path)
    path.write_bytes(b"\xff\n")
    with pytest.raises(DataError, match="not UTF-8"):
        read_trials(path)


def test_trials_that_ended_are_ranked_by_loss_then_number():
    rows = [
        trial(0, 0.5),
        trial(1, math.nan),
        trial(2, 0.4, "stopped"),
        trial(3, 0.1, "running"),
        trial(5, 0.45),
        trial(4, 0.45),
        trial(6, None),
        trial(7, 0.2, "failed"),
        trial(8, math.inf),
    ]
    assert numbers(ranked(rows)) == [2, 4, 5, 0]
    first = best(rows)
    assert first is not None
    assert first.number == 4
    assert best(rows[1:4]) is None


def test_pareto_keeps_what_no_other_beats_in_both():
    rows = [
        trial(0, 0.5, size=100),
        trial(1, 0.4, size=200),
        trial(2, 0.45, size=300),  # 1 is smaller and better
        trial(3, 0.5, size=120),  # 0 is smaller
        trial(4, 0.4, size=200),  # as 1
        trial(5, 0.6, size=100),  # 0 is better
        trial(6, 0.1, size=None),
        trial(7, 0.1, "stopped", size=1),
    ]
    assert numbers(pareto(rows)) == [1, 4, 0]


def test_leaderboard_begins_with_the_best_and_lines_up():
    rows = [
        trial(0, 0.5, size=442_368),
        trial(1, None, "failed"),
        trial(2, 0.25, "stopped", size=3_538_944, rank="8", targets="[q, v]"),
        trial(3, 0.75, "running"),
        trial(4, None, "waiting"),
    ]
    count, blank, head, rule, *lines = leaderboard(rows, top=4).splitlines()
    assert count == "5 trials: 1 done, 1 stopped early, 1 failed, 1 running, 1 waiting"
    assert blank == ""
    assert [line.split()[0] for line in lines] == ["2", "0", "3", "1", "and"]
    assert lines[-1] == "and 1 more in trials.csv"
    assert lines[0].split(maxsplit=6) == [
        "2", "stopped", "early", "400", "0.2500", "3.54", "M  rank=8, targets=[q, v]",
    ]  # fmt: skip
    assert len(rule) == len(head)
    start = head.index("changes")
    assert lines[0][start:] == "rank=8, targets=[q, v]"
    assert lines[1][start:] == "the recipe's own settings"


def test_counts_are_told_in_words():
    assert counted([]) == "0 trials"
    assert counted([trial(0, 0.5)]) == "1 trial: 1 done"
    assert leaderboard([]).startswith("0 trials\n")


@pytest.mark.parametrize(
    ("number", "shown"),
    [
        (None, "-"),
        (0, "0"),
        (442, "442"),
        (3456, "3.46 k"),
        (999_499, "999 k"),
        (999_500, "1 M"),
        (11_000_000_000, "11 G"),
    ],
)
def test_counts_are_short(number, shown):
    assert short_count(number) == shown
