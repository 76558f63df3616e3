"""What the jobs say of bad input: a sentence and exit code 2, before any cluster is started."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tagi_ray import recipes
from tagi_ray.errors import AdapterError, DataError
from tagi_ray.generate import read_instructions
from tagi_ray.pipeline import open_run
from tagi_ray.teachers import finished

ROOT = Path(__file__).parents[2]
ROW = {"task": "a", "instruction": "Do.", "input": "1", "output": "x"}


def job(tmp_path: Path, name: str, *arguments: str) -> str:
    """What a job that must end with 2, and start no Ray, leaves in its error stream."""
    ray_folder = tmp_path / "ray"
    env = {**os.environ, "RAY_TMPDIR": str(ray_folder), "HF_HOME": str(tmp_path / "home")}
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, f"jobs/{name}.py", *arguments, f"storage={tmp_path}"],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert not ray_folder.exists()
    assert time.monotonic() - started < 60  # seconds; a few where the machine is idle
    return done.stderr


def records(path: Path) -> list[str]:
    return ["data.source=records", f"data.path={path}", "data.test_tasks=[b]"]


def test_missing_data(tmp_path):
    said = job(tmp_path, "prepare_data", "demo", *records(tmp_path / "none"))
    assert f"data.path={tmp_path / 'none'}: no such file or folder; give a file or folder" in said


def test_a_bad_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(ROW)}\n{{'task'\n")
    said = job(tmp_path, "finetune", "demo", *records(path))
    assert f"{path}:2: is not JSON (Expecting property name" in said


@pytest.mark.parametrize("job_name", ["pretrain", "finetune"])
def test_a_bad_line_of_raw_text(tmp_path, job_name):
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "one two three four five"}\n{"text": 7}\n')
    said = job(tmp_path, job_name, "demo", "pretrain.enabled=true", f"pretrain.path={path}")
    assert f"{path}:2: text can't be 7; give a text" in said


def test_pretraining_that_is_not_enabled(tmp_path):
    said = job(tmp_path, "pretrain", "demo")
    assert "pretrain.enabled=false: finetuning would not start from what is pretrained" in said
    assert not (tmp_path / "demo").exists()


def test_a_hub_model_that_cannot_be_had(tmp_path):
    said = job(tmp_path, "train_teachers", "demo", "backbone.path=owner/model")
    assert "backbone.path=owner/model is no folder here, it is not in " in said
    assert "HF_HUB_OFFLINE=1 forbids to fetch it" in said
    assert not (tmp_path / "demo").exists()


def test_a_tokenizer_that_cannot_be_had(tmp_path):
    said = job(tmp_path, "finetune", "demo", "backbone.tokenizer=owner/model")
    assert "backbone.tokenizer=owner/model is no folder here, it is not in " in said


def test_a_damaged_store_of_teachers(tmp_path):
    store = tmp_path / "demo" / "teachers"
    store.mkdir(parents=True)
    (store / "index.json").write_text('{"version": 2, ')
    said = job(tmp_path, "finetune", "demo")
    assert f"{store / 'index.json'} is damaged (" in said
    assert f"remove {store} and train the teachers again" in said


def test_a_bad_line_of_instructions(tmp_path):
    open_run(recipes.load("demo", [f"storage={tmp_path}"]))
    path = tmp_path / "some.jsonl"
    path.write_text('{"instruction": ""}\n')
    said = job(tmp_path, "generate", "demo", "--path", str(path))
    assert f"{path}:1: the instruction is empty: describe the task" in said


@pytest.mark.parametrize(
    "content",
    ["", "[]", '{"version": 2}', '{"version": 2, "teachers": 3}',
     '{"version": 2, "teachers": {"a": {"per": "task"}}}', '{"version": 1, "teachers": {}}'],
)  # fmt: skip
def test_every_damage_of_a_teacher_index_is_an_adapter_error(tmp_path, content):
    (tmp_path / "index.json").write_text(content)
    with pytest.raises(AdapterError, match="train the teachers again"):
        finished(tmp_path)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ('{"instruction": "Do', r":2: is cut off, or not JSON \(Unterminated string"),
        (b'{"instruction": "caf\xe9"}', r":2: is not UTF-8 at byte 20; convert the file"),
        ('{"instruction": "Do.", "instruction": "Go."}', r":2: holds the key 'instruction' twice"),
        ('{"instruction": NaN}', r":2: holds NaN, which is not JSON"),
        ('"Do."', r":2: a record can't be 'Do\.'; give a JSON object"),
        ('{"task": "b"}', r':2: write {"instruction": "\.\.\.", "task": "\.\.\."} on each line'),
        ('{"instruction": "Do.", "inputs": []}', r":2: write {"),
        ('{"instruction": 3}', r":2: instruction and task must be strings"),
        ('{"instruction": "Do.", "task": 3}', r":2: instruction and task must be strings"),
        ('{"instruction": " "}', r":2: the instruction is empty: describe the task"),
        ('{"instruction": "Do.", "task": "../a"}', r":2: task name '\.\./a' can't be a file name"),
        ('{"instruction": "Do.", "task": "a"}', r":2: task 'a' stands there twice; rename one"),
        ('{"instruction": "Do.", "positive_examples": [3]}', r":2: positive_examples must be a"),
        ('{"instruction": "Do.", "positive_examples": 3}', r":2: positive_examples must be a"),
        (
            '{"instruction": "Do.", "positive_examples": [{"input": 1, "output": "x"}]}',
            r":2: positive_examples must be a",
        ),
    ],
)
def test_bad_lines_of_instructions_name_file_and_line(tmp_path, line, sentence):
    path = tmp_path / "some.jsonl"
    content = line if isinstance(line, bytes) else line.encode()
    path.write_bytes(b'\xef\xbb\xbf{"instruction": "Do.", "task": "a"}\r\n' + content)
    with pytest.raises(DataError, match=sentence):
        read_instructions(path)


def test_instructions_that_are_none(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n \n")
    with pytest.raises(DataError, match=r"empty\.jsonl: holds no instruction; write one JSON"):
        read_instructions(tmp_path / "empty.jsonl")
    with pytest.raises(DataError, match=r"none\.jsonl: can't be read \(No such file"):
        read_instructions(tmp_path / "none.jsonl")
