"""Readers: every format, and the place named in every refusal."""

import json
import re
from pathlib import Path

import pytest

from tagi_ray.errors import DataError
from tagi_ray.json_files import MAX_LINE_BYTES, lines_of, read_json_lines
from tagi_ray.sections import DataSettings
from tagi_ray.task_files import read_tasks
from tagi_ray.tasks import Instance, PositiveExample

SNI = Path(__file__).parents[3] / "shared" / "data" / "sni"


def reading(source: str, path: Path) -> list:
    return list(read_tasks(DataSettings(source=source, path=str(path), test_tasks=("held_out",))))


def sni_record(**fields) -> dict:
    return {
        "Categories": ["Sums", "Other"],
        "Definition": ["Add them.", "Sum up."],
        "Positive Examples": [{"input": "1 1", "output": "2", "explanation": "so"}],
        "Instances": [
            {"id": "x-0", "input": "1 2", "output": ["3", "three"]},
            {"id": "x-1", "input": "2 2", "output": ["4"]},
        ],
        **fields,
    }


def write_lines(path: Path, *records: dict | str | bytes) -> Path:
    lines = [
        record if isinstance(record, str | bytes) else json.dumps(record) for record in records
    ]
    path.write_bytes(b"\n".join(x if isinstance(x, bytes) else x.encode() for x in lines))
    return path


def test_sni_file(tmp_path):
    (tmp_path / "task1_sum.json").write_text(json.dumps(sni_record()), encoding="utf-8-sig")
    (tmp_path / "task0_one.json").write_text(json.dumps(sni_record(Definition="Just one.")))
    first, second = reading("sni", tmp_path)
    assert first.task.definitions == ("Just one.",)
    assert second.task.name == "task1_sum"
    assert second.task.category == "Sums"
    assert second.task.definitions == ("Add them.", "Sum up.")
    assert second.task.positive_examples == (PositiveExample("1 1", "2"),)
    assert list(second.instances()) == [
        Instance("x-0", "1 2", ("3", "three")),
        Instance("x-1", "2 2", ("4",)),
    ]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"Instances": []}, r"task1\.json: Instances can't be \[\]"),
        ({"Instances": [{"id": "x-9", "input": "a", "output": []}]}, r"instance x-9: output can't"),
        ({"Instances": [{"id": "x-9", "input": "a", "output": "b"}]}, r"x-9: output can't be 'b'"),
        ({"Instances": [{"id": "x-9", "input": 3, "output": ["b"]}]}, r"x-9: input can't be 3"),
        ({"Instances": [{"id": "a", "input": "", "output": ["b"]}] * 2}, r"id of instance 2.*'a'"),
        ({"Definition": [" "]}, r"Definition can't be \[' '\]"),
        ({"Categories": []}, r"Categories can't be \[\]"),
        ({"Positive Examples": [{"input": "a"}]}, r"positive example 1"),
    ],
)
def test_sni_faults_name_file_and_instance(tmp_path, fields, message):
    (tmp_path / "task1.json").write_text(json.dumps(sni_record(**fields)))
    with pytest.raises(DataError, match=message):
        reading("sni", tmp_path)


def test_sni_fields_that_nobody_reads_may_hold_nan(tmp_path):
    example = {"input": "1 1", "output": "2", "explanation": float("nan")}
    instance = {"id": "x-0", "input": "1 2", "output": ["3"], "score": float("inf")}
    record = sni_record(**{"Positive Examples": [example], "Instances": [instance]})
    path = tmp_path / "task1.json"
    path.write_text(json.dumps({**record, "Instruction Source": float("nan")}))
    (source,) = reading("sni", tmp_path)
    assert list(source.instances()) == [Instance("x-0", "1 2", ("3",))]
    for field, message in (("input", "input can't be nan"), ("output", "output can't be nan")):
        faulty = {**record, "Instances": [{**instance, field: float("nan")}]}
        path.write_text(json.dumps(faulty))
        with pytest.raises(DataError, match=rf"instance x-0: {message}"):
            reading("sni", tmp_path)
    path.write_text(json.dumps({**record, "Definition": float("nan")}))
    with pytest.raises(DataError, match="Definition can't be nan"):
        reading("sni", tmp_path)


def test_lines_end_where_jsonl_ends_them(tmp_path):
    path = write_lines(
        tmp_path / "any.jsonl",
        b"\xef\xbb\xbf" + '{"a": "one\u2028line\u0085"}\r'.encode(),
        "",
        {"a": 2},
    )
    assert list(read_json_lines(path)) == [(1, {"a": "one\u2028line\u0085"}), (3, {"a": 2})]
    write_lines(path, {"a": 2}, '{"a": 1, "a": 2}')
    with pytest.raises(DataError, match=r"any\.jsonl:2: holds the key 'a' twice"):
        list(read_json_lines(path))
    with pytest.raises(DataError, match="can't be read"):
        list(read_json_lines(tmp_path / "absent.jsonl"))


def test_sni_files_outside_both_lists_are_not_even_parsed(tmp_path, caplog):
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "used.json").write_text(json.dumps(sni_record()))
    (tmp_path / "train.txt").write_text("used\n")
    settings = DataSettings(
        source="sni",
        path=str(tmp_path),
        train_tasks_file=str(tmp_path / "train.txt"),
        test_tasks=("held_out",),
    )
    with caplog.at_level("INFO"):
        assert [source.task.name for source in read_tasks(settings)] == ["used"]
    assert "1 task files are in neither list" in caplog.text


def test_file_name_must_be_a_safe_task_name(tmp_path):
    (tmp_path / "bad name.json").write_text(json.dumps(sni_record()))
    with pytest.raises(DataError, match="'bad name' can't be a file name"):
        reading("sni", tmp_path)


def test_jsonl_interleaved_tasks_with_paraphrases(tmp_path):
    path = write_lines(
        tmp_path / "tasks.jsonl",
        b"\xef\xbb\xbf" + b'{"task": "a", "instruction": "Do.", "input": "1", "output": "x"}\r',
        "",
        {"task": "b", "instruction": "Go.", "input": "é", "outputs": ["y", "z"], "category": "c"},
        {"task": "a", "instruction": "Do it.", "input": "2", "output": "w"},
    )
    a, b = reading("records", path)
    assert a.task.definitions == ("Do.", "Do it.")
    assert b.task.category == "c"
    assert list(a.instances()) == [Instance("a-1", "1", ("x",)), Instance("a-2", "2", ("w",))]
    assert list(b.instances()) == [Instance("b-1", "é", ("y", "z"))]


GOOD = {"task": "a", "instruction": "Do.", "input": "1", "output": "x"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"task": a}', r"is not JSON \(Expecting value, column 10\); correct it"),
        ('{"task": "a", ', r"is cut off, or not JSON \(.*, column 14\); correct it"),
        ('{"task": "a", "instruction": "D', r"is cut off, or not JSON \(Unterminated string"),
        (
            b'{"task": "a", "input": "' + b"x" * MAX_LINE_BYTES,
            rf"is longer than {MAX_LINE_BYTES} bytes; divide or remove it",
        ),
        (b'{"task": "caf\xe9"}', r"is not UTF-8 at byte 13"),
        ('{"task": "a", "task": "b"}', r"holds the key 'task' twice"),
        ({**GOOD, "input": float("nan")}, r"holds NaN"),
        ("[1]", r"can't be \[1\]; give a JSON object"),
        ({k: v for k, v in GOOD.items() if k != "input"}, r"has no field 'input'"),
        ({**GOOD, "input": 5}, r"input can't be 5"),
        ({**GOOD, "output": None}, r"output can't be None"),
        ({**GOOD, "instruction": ["Do."]}, r"instruction can't be \['Do\.'\]"),
        ({**GOOD, "outputs": ["x"]}, r"either 'output' or 'outputs'"),
        (
            {"task": "a", "instruction": "Do.", "input": "1", "outputs": []},
            r"outputs can't be \[\]",
        ),
        ({**GOOD, "instruction": " "}, r"instruction can't be ' '"),
        ({**GOOD, "task": "../a"}, r"task name '../a' can't be a file name"),
        ({**GOOD, "category": "other"}, r"category can't be 'other'; task a began as"),
    ],
)
def test_jsonl_faults_name_file_and_line(tmp_path, line, message):
    path = write_lines(tmp_path / "tasks.jsonl", GOOD, "", line)
    with pytest.raises(DataError, match=rf"tasks\.jsonl:3: .*{message}|tasks\.jsonl:3: {message}"):
        reading("records", path)


def test_all_problems_of_a_file_are_counted_and_the_first_are_told(tmp_path):
    faulty = [{**GOOD, "input": number} for number in range(7)]
    path = write_lines(tmp_path / "tasks.jsonl", GOOD, *faulty, GOOD)
    with pytest.raises(DataError) as caught:
        reading("records", path)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{path}: 7 problems, the first 5:"
    assert lines[1:] == [f"{path}:{n + 2}: input can't be {n}; give a text" for n in range(5)]


def test_all_faulty_files_of_a_folder_are_told_together(tmp_path):
    for number, fields in enumerate(({"Instances": []}, {}, {"Definition": ""})):
        (tmp_path / f"task{number}.json").write_text(json.dumps(sni_record(**fields)))
    with pytest.raises(DataError) as caught:
        reading("sni", tmp_path)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"data.path={tmp_path}: 2 problems:"
    assert "task0.json: Instances can't be []" in lines[1]
    assert "task2.json: Definition can't be ['']" in lines[2]


def test_what_follows_an_overlong_line_is_numbered_right(tmp_path):
    path = tmp_path / "any.jsonl"
    path.write_bytes(b"x" * (2 * MAX_LINE_BYTES + 7) + b"\n\n{}\n")
    (first, second) = lines_of(str(path))
    assert (first[:2], len(first[2])) == ((0, 1), MAX_LINE_BYTES + 1)
    assert second == (2 * MAX_LINE_BYTES + 9, 3, b"{}\n")


def test_empty_file(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="holds no records"):
        reading("records", tmp_path / "empty.jsonl")


@pytest.mark.parametrize(
    ("source", "cure"),
    [
        ("sni", "clone https://github.com/allenai/natural-instructions and give its folder tasks"),
        ("records", "with task, instruction, input, and output (a text) or outputs (a list of"),
    ],
)
def test_an_absent_or_empty_path_says_what_is_needed(tmp_path, source, cure):
    with pytest.raises(DataError, match=rf"nothing: no such file or folder; .*{re.escape(cure)}"):
        reading(source, tmp_path / "nothing")
    with pytest.raises(DataError, match=rf"holds no \.json.* file; .*{re.escape(cure)}"):
        reading(source, tmp_path)


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_alpaca_each_instruction_is_a_task(tmp_path, suffix):
    records = [
        {"instruction": "Name one.", "input": "", "output": "a"},
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Add.", "input": "2 2", "output": "4"},
    ]
    path = tmp_path / f"alpaca{suffix}"
    if suffix == ".json":
        path.write_text(json.dumps(records))
    else:
        write_lines(path, *records)
    one, add = reading("records", path)
    assert one.task.name.startswith("alpaca_")
    assert add.task.definitions == ("Add.",)
    assert [instance.input for instance in add.instances()] == ["1 2", "2 2"]


@pytest.mark.skipif(not SNI.exists(), reason="the SNI sample is not at ../shared")
def test_real_sni_sample_is_read_whole():
    lists = SNI / "splits_official_default"
    settings = DataSettings(
        source="sni",
        path=str(SNI / "tasks"),
        train_tasks_file=str(lists / "train_tasks.txt"),
        test_tasks_file=str(lists / "test_tasks.txt"),
    )
    sources = list(read_tasks(settings))
    assert len(sources) > 100
    assert all(next(iter(source.instances())).outputs for source in sources)
