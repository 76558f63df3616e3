from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
JOBS = sorted(path.name for path in (ROOT / "jobs").glob("*.py"))
RECIPE_JOBS = [
    "prepare_data.py", "train_teachers.py", "pretrain.py", "finetune.py", "evaluate.py",
    "generate.py", "sweep.py",
]  # fmt: skip


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "COLUMNS": "120"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def test_dry_run_answers_within_a_second():
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        done = run("jobs/finetune.py", "demo", "--dry-run")
        seconds.append(time.perf_counter() - started)
        assert done.returncode == 0, done.stderr
    assert statistics.median(seconds) < 1.0


@pytest.mark.parametrize("job", RECIPE_JOBS)
def test_dry_run_shows_the_settings_and_loads_nothing_heavy(job):
    script = f"""
import runpy, sys
sys.argv = ["{job}", "demo", "lora.rank=3", "--dry-run"]
try:
    runpy.run_path("jobs/{job}", run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
heavy = {{"torch", "ray", "transformers", "pyarrow", "numpy"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = run("-c", script)
    assert done.returncode == 0, done.stderr
    assert "\n  rank: 3\n" in done.stdout


@pytest.mark.parametrize("job", JOBS)
def test_help(job):
    done = run(f"jobs/{job}", "--help")
    assert done.returncode == 0, done.stderr
    if job in RECIPE_JOBS:
        assert "ray job submit" in done.stdout
        assert re.search(r"demo_controls +The demo with", done.stdout)
        assert "section.field=value" in done.stdout


def test_wrong_settings_are_sentences_and_exit_code_2():
    done = run("jobs/finetune.py", "demo", "lora.rnak=3", "--dry-run", "lora.alpha=-1")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "2 problems:",
        "command line: lora.alpha=-1 should be greater than 0.",
        "command line: 'rnak' is not a field of lora. Did you mean 'rank'?",
        "Failed (exit code 2): see above.",
    ]


def test_dry_run_of_a_sweep_shows_the_space_too(tmp_path):
    (tmp_path / "mine.yaml").write_text("search: tpe\nspace:\n  lora.rank: [4, 8]\n")
    done = run("jobs/sweep.py", "demo", "--dry-run", "--space", str(tmp_path / "mine.yaml"))
    assert done.returncode == 0, done.stderr
    settings, space = done.stdout.split("---\n")
    assert settings.startswith("name: demo\n")
    assert space.startswith("name: mine\nsearch: tpe\ntrials: 20\n")
    assert space.endswith("space:\n  lora.rank:\n    choice:\n    - 4\n    - 8\n")


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_a_wrong_space_is_a_sentence_before_anything_is_started(tmp_path, more):
    (tmp_path / "mine.yaml").write_text("space:\n  lora.rank: [4, 0]\n")
    mine = ["--space", str(tmp_path / "mine.yaml"), f"storage={tmp_path / 'runs'}"]
    done = run("jobs/sweep.py", "demo", *mine, *more)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"Failed (exit code 2): {tmp_path}/mine.yaml:2: space: lora.rank=0 should be greater than"
        " 0.\n"
    )
    assert not (tmp_path / "runs").exists()


def test_help_of_a_sweep_lists_the_spaces():
    assert "one of adapter_size, fusion, lambda1_rank" in " ".join(
        run("jobs/sweep.py", "--help").stdout.split()
    )


def test_generate_needs_an_instruction():
    done = run("jobs/generate.py", "demo")
    assert done.returncode == 2
    assert done.stderr == (
        "Failed (exit code 2): command line: give --instruction TEXT or --path FILE\n"
    )
