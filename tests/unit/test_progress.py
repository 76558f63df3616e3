"""What a person sees of the metrics that workers write, on a terminal and elsewhere."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tagi_ray import history
from tagi_ray.progress import News, TimeLeft, progress_line, shown
from tagi_ray.report import read_records
from tagi_ray.stages import StageSpec
from tagi_ray.tracking import WARNINGS
from tests.tiny_run import tiny_experiment

RECORD = {
    "stage": "finetune_tagi", "seed": 1, "variant": "tagi", "steps": 2000, "step": 50,
    "loss": 1.23456, "kl": 0.5, "valid_loss": 2.0, "grad_norm": 0.123, "learning_rate": 3e-4,
    "tokens_per_second": 12345.6, "step_time": 0.1, "data_wait": 0.031, "seconds_left": 125.4,
}  # fmt: skip


def write(path: Path, *records: dict) -> None:
    """Write a metrics file, with a time of change that differs from the last one's."""
    before = path.stat().st_mtime if path.exists() else 0.0
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    os.utime(path, (before + 1, before + 1))


def test_a_record_is_one_line_for_a_person() -> None:
    assert progress_line(RECORD) == (
        "finetune_tagi seed 1  step 50/2000  loss 1.2346  kl 0.5000  valid 2.0000  lr 3.00e-04"
        "  norm 0.12  12,346 tokens/s  data wait 3%  left 2:05"
    )


def test_only_what_is_new_is_shown_even_when_the_file_is_rewritten(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    one, two = RECORD, {**RECORD, "step": 100}
    write(path, one, two)
    news = News(path)
    assert list(news.read()) == []
    write(path, one)
    assert list(news.read()) == []
    again = {**two, "tokens_per_second": 1.0}
    write(path, one, again)
    assert list(news.read()) == [again]
    assert list(news.read()) == []


def test_records_beyond_the_checkpoint_are_dropped_and_others_kept(tmp_path: Path) -> None:
    spec = StageSpec(tiny_experiment(tmp_path), "finetune", tmp_path, 1)
    path = tmp_path / history.METRICS
    late, other = {**RECORD, "step": 100}, {**RECORD, "step": 100, "seed": 2}
    write(path, RECORD, late, other)
    with path.open("a") as file:
        file.write('{"stage": "fine')
    history.cut(spec, 50)
    assert read_records(path) == [RECORD, other]


def test_cut_texts_are_counted_for_a_person() -> None:
    assert "  cut 3 texts  " in progress_line({**RECORD, "cut_texts": 3})


def test_memory_and_use_of_the_device_are_shown_where_they_are_known() -> None:
    line = progress_line({**RECORD, "peak_memory": 1.2 * 2**30, "mfu": 0.381})
    assert "12,346 tokens/s  peak 1.2 GiB  MFU 38%  data wait" in line


@pytest.mark.parametrize(
    ("seconds", "shown_as"), [(0.4, "0:00"), (59.6, "1:00"), (3599, "59:59"), (90061, "25:01:01")]
)
def test_hours_appear_when_there_are_any(seconds: float, shown_as: str) -> None:
    assert progress_line({**RECORD, "seconds_left": seconds}).endswith(f"  left {shown_as}")


def specs_of(tmp_path: Path) -> list[StageSpec]:
    """One metatrain stage of 8 steps, then two finetune stages."""
    experiment = tiny_experiment(tmp_path, seeds=[1, 2])
    return [
        StageSpec(experiment, "metatrain", tmp_path, 1, learning_rate=1e-3),
        *(StageSpec(experiment, "finetune", tmp_path, seed) for seed in (1, 2)),
    ]


def record_of(spec: StageSpec, step: int, step_time: float = 2.0) -> dict:
    return {
        **RECORD, "stage": spec.name, "seed": spec.seed, "step": step, "steps": 8,
        "step_time": step_time, "seconds_left": step_time * (8 - step),
    }  # fmt: skip


def test_time_left_in_all_is_told_once_each_later_kind_has_been_seen(tmp_path: Path) -> None:
    metatrain, first, second = specs = specs_of(tmp_path)
    left = TimeLeft(specs)
    assert left.after(record_of(metatrain, 4)) is None
    assert left.after(record_of(first, 2, step_time=3.0)) == 6 * 3.0 + 8 * 3.0
    assert left.after(record_of(first, 4, step_time=1.0)) == 4 * 1.0 + 8 * 1.0
    assert left.after(record_of(second, 4)) is None  # its own time left says it


def test_a_pipe_gets_lines_and_a_warning_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, first, _ = specs = specs_of(tmp_path)
    lines: list[str] = []
    with shown(specs, lines.append) as show:
        show()
        write(tmp_path / history.METRICS, record_of(first, 2))
        warnings = tmp_path / WARNINGS
        warnings.parent.mkdir()
        told = {"logger": "test_progress", "text": "a server is down"}
        warnings.write_text(2 * (json.dumps(told) + "\n"))
        show()
        show()
    (line,) = lines
    assert line.startswith("finetune_tagi seed 1  step 2/8  loss 1.2346")
    assert line.endswith("left 0:12, in all 0:28")
    assert [entry.message for entry in caplog.records] == ["a server is down"]


ON_TERMINAL = """
import json, logging, sys
from pathlib import Path
from tagi_ray import history
from tagi_ray.progress import shown
from tagi_ray.recipes import configure_logging
from tests.unit.test_progress import record_of, specs_of

configure_logging()
folder = Path(sys.argv[1])
_, *specs = specs_of(folder)
with shown(specs, print) as show:
    for spec in specs:
        for step in (2, 8):
            with (folder / history.METRICS).open("a") as file:
                file.write(json.dumps(record_of(spec, step)) + "\\n")
            show()
            logging.getLogger("tagi_ray").warning("after step %d", step)
print("the end")
"""


def in_terminal(tmp_path: Path, stderr: int | None) -> str:
    """What the program above writes to a terminal of 160 columns; on a pipe `stderr` is elsewhere."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", ON_TERMINAL, tmp_path],
        stdout=theirs,
        stderr=theirs if stderr is None else stderr,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "160", "NO_COLOR": "1"},
    ):
        os.close(theirs)
        written = bytearray()
        while True:
            try:
                written += os.read(ours, 4096)
            except OSError:  # the terminal has no writer any more
                break
    os.close(ours)
    return written.decode()


def test_a_terminal_shows_a_bar_for_the_stage_and_keeps_its_last_line(tmp_path: Path) -> None:
    screen = in_terminal(tmp_path, None)
    assert re.search(
        r"finetune_tagi seed 1 \(1 of 2\) ━+ +2/8 loss 1\.2346 .* left 0:12, in all 0:28", screen
    )
    assert "\x1b[?25l" in screen  # the cursor is hidden while bars move, and shown again
    assert "\x1b[?25h" in screen
    lines = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line).strip() for line in screen.split("\n")]
    lasting = [line.split("\r")[-1] for line in lines]
    for seed in (1, 2):
        assert sum(line.startswith(f"finetune_tagi seed {seed}  step 8/8") for line in lasting) == 1
    assert not any("seed 1  step 2/8" in line for line in lasting)  # no line for each record
    # A log line has its row to itself, and so has what is printed afterwards.
    assert sum(bool(re.fullmatch(r"[\d:]+ WARNING after step 8", line)) for line in lasting) == 2
    assert lasting[-2] == "the end"


def test_log_lines_for_a_file_stay_there_while_bars_move(tmp_path: Path) -> None:
    log = tmp_path / "stderr.txt"
    with log.open("wb") as file:
        screen = in_terminal(tmp_path, file.fileno())
    assert "WARNING" not in screen
    assert log.read_text().count("WARNING after step") == 4
