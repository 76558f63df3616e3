"""Packed, columnar and remote files: read like plain ones, and refused in one sentence."""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tagi_ray.errors import DataError
from tagi_ray.remote_files import list_files, read_bytes
from tagi_ray.sections import DataSettings
from tagi_ray.shard_writer import write_shards
from tagi_ray.task_files import read_tasks
from tagi_ray.tasks import read_names
from tests.object_store import ObjectStore, object_store

ROWS = [
    {"task": "ab"[n % 2], "instruction": "Do.", "input": str(n), "output": f"x{n}"}
    for n in range(10)
]
ALPACA = [{"instruction": "Add.", "input": "1 2", "output": "3"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def settings(path: Path | str, **fields: object) -> DataSettings:
    given = {"source": "records", "path": str(path), "test_tasks": ("b",), **fields}
    return DataSettings.model_validate(given)


def read(path: Path | str, **fields: object) -> dict[str, list[tuple[str, ...]]]:
    """Outputs of each task."""
    return {
        source.task.name: [one.outputs for one in source.instances()]
        for source in read_tasks(settings(path, **fields))
    }


EXPECTED = {"a": [(f"x{n}",) for n in (0, 2, 4, 6, 8)], "b": [(f"x{n}",) for n in (1, 3, 5, 7, 9)]}


def write_parquet(path: Path, columns: dict | None = None, rows: int = 3) -> Path:
    table = pa.table(columns) if columns else pa.Table.from_pylist(ROWS)
    pq.write_table(table, path, row_group_size=rows)
    return path


def written(path: Path) -> Path:
    if path.suffix == ".parquet":
        return write_parquet(path)
    if path.suffix == ".json":
        path.write_text(json.dumps(ROWS))
    else:
        path.write_bytes(gzip.compress(LINES) if path.suffix == ".gz" else LINES)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json", ".parquet"])
def test_every_format_gives_the_same_rows(tmp_path, suffix):
    assert read(written(tmp_path / f"rows{suffix}")) == EXPECTED


def test_a_folder_of_mixed_formats_and_columns_is_read_whole(tmp_path):
    for name in ("1.jsonl", "2.jsonl.gz", "3.json", "4.parquet"):
        written(tmp_path / name)
    # Sorted first, and in other columns.
    (tmp_path / "0.json").write_text(json.dumps(ALPACA))
    (tmp_path / "notes.txt").write_text("not read")
    (alpaca, *_), found = list(read(tmp_path)), read(tmp_path)
    assert alpaca.startswith("alpaca_")
    assert found.pop(alpaca) == [("3",)]
    assert found == {name: rows * 4 for name, rows in EXPECTED.items()}


def test_a_file_that_changes_its_columns_is_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(ALPACA[0]).encode() + b"\n" + LINES[: LINES.index(b"\n")])
    with pytest.raises(DataError, match=r"rows\.jsonl:2: has a task, and the file's first record"):
        read(path)


def test_lists_of_outputs_in_parquet(tmp_path):
    columns = {"task": ["a"], "instruction": ["Do."], "input": ["1"], "outputs": [["x", "y"]]}
    path = write_parquet(tmp_path / "rows.parquet", {**columns, "unread": [b"\xff"]})
    assert read(path) == {"a": [("x", "y")]}


def cut_gzip(path: Path) -> None:
    path.write_bytes(gzip.compress(LINES)[:-20])


def bad_crc(path: Path) -> None:
    content = bytearray(gzip.compress(LINES))
    content[-6] ^= 1
    path.write_bytes(content)


def no_gzip(path: Path) -> None:
    path.write_bytes(LINES)


def no_parquet(path: Path) -> None:
    path.write_bytes(LINES)


def cut_parquet(path: Path) -> None:
    content = write_parquet(path).read_bytes()
    path.write_bytes(content[: len(content) // 2])


def broken_page(path: Path) -> None:
    write_parquet(path)
    content = bytearray(path.read_bytes())
    content[4:60] = b"\xff" * 56
    path.write_bytes(content)


def missing_columns(path: Path) -> None:
    write_parquet(path, {"task": ["a"], "prompt": ["Do."]})


def nulls(path: Path) -> None:
    columns = {"task": ["a"] * 2, "instruction": ["Do."] * 2, "output": ["x"] * 2}
    write_parquet(path, {**columns, "input": ["1", None]})


def numbers(path: Path) -> None:
    columns = {"task": ["a"], "instruction": ["Do."], "output": [7], "input": ["1"]}
    write_parquet(path, columns)


@pytest.mark.parametrize(
    ("name", "make", "sentence"),
    [
        ("x.jsonl.gz", cut_gzip, r"x\.jsonl\.gz: is damaged or cut off, and nothing .* \(Compress"),
        ("x.jsonl.gz", bad_crc, r"x\.jsonl\.gz: is damaged or cut off, .* \(CRC check failed"),
        ("x.jsonl.gz", no_gzip, r"x\.jsonl\.gz: is damaged or cut off, .* \(Not a gzipped file"),
        ("x.parquet", no_parquet, r"x\.parquet: is not a Parquet file, or a damaged one \(Parquet"),
        ("x.parquet", cut_parquet, r"x\.parquet: is not a Parquet file, or a damaged one"),
        ("x.parquet", broken_page, r"x\.parquet: is not a Parquet file, or a damaged one"),
        (
            "x.parquet",
            missing_columns,
            r"x\.parquet: has no column 'input' and no column 'instruction' and no column 'output',"
            r" but task, prompt; rows need task, instruction, input, and output \(a text\)",
        ),
        ("x.parquet", nulls, r"x\.parquet: row 2: input can't be None; give a text"),
        ("x.parquet", numbers, r"x\.parquet: row 1: output can't be 7; give a text"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, make, sentence):
    make(tmp_path / name)
    with pytest.raises(DataError, match=sentence) as caught:
        read(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ObjectStore]:
    with object_store() as server:
        environment = {
            "AWS_ENDPOINT_URL": server.url,
            "AWS_ACCESS_KEY_ID": "someone",
            "AWS_SECRET_ACCESS_KEY": "secret_canary",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
            "AWS_CONFIG_FILE": str(tmp_path / "none"),
        }
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        yield server


@pytest.fixture
def bucket(request: pytest.FixtureRequest) -> str:
    """A bucket of the test's own: connections to a bucket are kept."""
    return f"b{abs(hash(request.node.name))}"


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json", ".parquet"])
def test_rows_in_a_bucket(store, bucket, tmp_path, suffix):
    content = written(tmp_path / f"rows{suffix}").read_bytes()
    store.objects[f"{bucket}/rows/part 1{suffix}"] = content
    store.objects[f"{bucket}/rows/notes.txt"] = b""
    assert read(f"s3://{bucket}/rows") == EXPECTED
    assert read(f"s3://{bucket}/rows/part 1{suffix}") == EXPECTED


def test_of_a_large_file_in_a_bucket_parts_are_fetched(store, bucket):
    rows = LINES * 20000
    store.objects[f"{bucket}/rows.jsonl"] = rows
    (a, _) = read_tasks(settings(f"s3://{bucket}/rows.jsonl"))
    store.requests.clear()
    assert next(iter(a.instances())).outputs == ("x0",)
    assert len(rows) > 10_000_000
    assert len(store.requests) <= 3


def test_sni_tasks_and_lists_in_a_bucket(store, bucket, tmp_path):
    for name in ("a", "b"):
        record = {
            "Categories": ["Sums"],
            "Definition": ["Add."],
            "Instances": [{"id": f"{n}", "input": f"{n}", "output": ["x"]} for n in range(9)],
        }
        store.objects[f"{bucket}/tasks/{name}.json"] = json.dumps(record).encode()
    store.objects[f"{bucket}/train.txt"] = b"a\n"
    store.objects[f"{bucket}/test.txt"] = b"\xef\xbb\xbfb\r\n"
    given = {
        "source": "sni",
        "test_tasks": (),
        "train_tasks_file": f"s3://{bucket}/train.txt",
        "test_tasks_file": f"s3://{bucket}/test.txt",
        "test_instances": 4,
        "oracle_instances": 2,
    }
    path = f"s3://{bucket}/tasks"
    manifest = write_shards(settings(path, **given), tmp_path / "shards", 0, parallel=False)
    assert manifest.splits["train"].tasks == ("a",)
    assert manifest.splits["test"].tasks == ("b",)


def test_what_is_not_in_a_bucket_is_named(store, bucket):
    store.objects[f"{bucket}/rows.jsonl"] = LINES
    with pytest.raises(DataError, match=rf"data.path=s3://{bucket}/row: no such file or folder"):
        read(f"s3://{bucket}/row")
    with pytest.raises(DataError, match=rf"s3://{bucket}/names.txt: no such file or bucket"):
        read_names(f"s3://{bucket}/names.txt")
    with pytest.raises(DataError, match="http://x/y: only local paths, s3:// and gs:// are read"):
        read_bytes("http://x/y")


def refused_within(seconds: float, path: str) -> str:
    started = time.monotonic()
    with pytest.raises(DataError) as caught:
        list_files(path, (".jsonl",))
    assert time.monotonic() - started < seconds
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_credentials_are_named(store, bucket, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    store.objects[f"{bucket}/rows.jsonl"] = LINES
    said = refused_within(30, f"s3://{bucket}/rows.jsonl")
    assert "ACCESS_DENIED" in said
    assert said.endswith(
        "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_PROFILE) on every node, and"
        " AWS_ENDPOINT_URL for a store that is not Amazon's"
    )
    assert "secret_canary" not in said


def test_a_store_that_cannot_be_reached_is_told_soon(store, bucket, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert "can't be read" in refused_within(30, f"s3://{bucket}/rows.jsonl")


@pytest.mark.parametrize("credentials", ["none.json", None])
def test_a_google_bucket_without_credentials_is_told_soon(tmp_path, monkeypatch, credentials):
    if credentials:
        monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / credentials))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("GCE_METADATA_HOST", "127.0.0.1:9")
    said = refused_within(30, f"gs://some-bucket-{credentials}/rows.jsonl")
    assert f"/rows.jsonl: can't be read ({'Cannot open' if credentials else ''}" in said
    assert said.endswith("set GOOGLE_APPLICATION_CREDENTIALS, on every node")
