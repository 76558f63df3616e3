"""Raw text: every format read alike, refused in one sentence, and kept as shards of one task."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tagi_ray.corpus import HELD_OUT, LONGEST, hash_of, read_texts, split_of, write_corpus
from tagi_ray.errors import DataError
from tagi_ray.sections import BackboneSettings, PretrainSettings
from tagi_ray.shards import read_manifest, read_tasks_of
from tagi_ray.vocabulary import TextTokenizer, prepare_tokenizer
from tests.hub_server import HubServer, Repository, commit, hub_server
from tests.object_store import object_store
from tests.unit.test_hub import start

TEXTS = [f"Text {n} tells of {n * n} things ." for n in range(40)]
LINES = "".join(json.dumps({"text": text, "url": "x"}) + "\n" for text in TEXTS).encode()


def settings(path: Path | str, **fields: object) -> PretrainSettings:
    return PretrainSettings.model_validate({"enabled": True, "path": str(path), **fields})


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    prepare_tokenizer(BackboneSettings(path="demo"), folder, folder)
    return folder


def write(path: Path) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"text": TEXTS, "unread": [b"\xff"] * 40}), path, row_group_size=7)
    else:
        path.write_bytes(gzip.compress(LINES) if path.suffix == ".gz" else LINES)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet"])
def test_every_format_of_records_gives_its_texts(tmp_path, suffix):
    assert list(read_texts(settings(write(tmp_path / f"c4{suffix}")))) == TEXTS


def test_a_folder_is_read_in_the_order_of_its_files(tmp_path):
    (tmp_path / "1.txt").write_text("First .\n")
    (tmp_path / "3.txt.gz").write_bytes(gzip.compress(b"Last ."))
    (tmp_path / "notes.md").write_text("Not read .")
    write(tmp_path / "2.parquet")
    assert list(read_texts(settings(tmp_path))) == ["First .", *TEXTS, "Last ."]


def test_texts_in_a_bucket(tmp_path, monkeypatch):
    with object_store() as server:
        for name, value in {
            "AWS_ENDPOINT_URL": server.url,
            "AWS_ACCESS_KEY_ID": "someone",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_EC2_METADATA_DISABLED": "true",
        }.items():
            monkeypatch.setenv(name, value)
        server.objects["raw/texts/1.jsonl.gz"] = write(tmp_path / "1.jsonl.gz").read_bytes()
        server.objects["raw/texts/2.txt"] = b"Last ."
        assert list(read_texts(settings("s3://raw/texts"))) == [*TEXTS, "Last ."]


def test_paragraphs_are_joined_and_long_ones_divided_between_lines(tmp_path):
    path = tmp_path / "books.txt"
    lines = [f"{'word ' * 7}{n:03d} ." for n in range(50)]  # 40 characters each
    path.write_text("\n".join(lines))
    texts = list(read_texts(settings(path, max_tokens=100)))  # 300 characters
    assert "\n".join(texts) == "\n".join(lines)
    assert all(150 <= len(text) <= 300 for text in texts[:-1])
    assert len(texts) == 8
    # Short paragraphs fill a text up; one that is half full ends with its paragraph.
    path.write_text("a .\n\nb .\n\n\n" + "\n".join(lines[:5]) + "\n\n" + "\n".join(lines[5:8]))
    assert list(read_texts(settings(path, max_tokens=100))) == [
        "\n".join(["a .", "b .", *lines[:5]]),
        "\n".join(lines[5:8]),
    ]


def test_a_book_in_a_record_is_not_stored_whole(tmp_path):
    path = tmp_path / "books.jsonl"
    path.write_text(json.dumps({"text": "x" * 10_000}))
    assert list(read_texts(settings(path, max_tokens=8))) == ["x" * LONGEST * 8]


def no_text(path: Path) -> None:
    path.write_text("")


def no_json(path: Path) -> None:
    path.write_bytes(LINES[:200] + b"\n{'text'\n")


def no_field(path: Path) -> None:
    path.write_text('{"content": "x", "url": "y"}\n')


def a_number(path: Path) -> None:
    path.write_text('{"text": 7}\n')


def half_a_character(path: Path) -> None:
    path.write_text('{"text": "ab\\ud800"}\n')


def latin(path: Path) -> None:
    path.write_bytes(b"One .\n\nZw\xf6lf .\n")


def cut(path: Path) -> None:
    path.write_bytes(gzip.compress(LINES)[:-20])


def no_parquet(path: Path) -> None:
    path.write_bytes(LINES)


def no_column(path: Path) -> None:
    pq.write_table(pa.table({"content": ["x"], "url": ["y"]}), path)


def a_null(path: Path) -> None:
    pq.write_table(pa.table({"text": ["x", None]}), path)


@pytest.mark.parametrize(
    ("name", "make", "sentence"),
    [
        ("x.txt", no_text, r"pretrain\.path=.*x\.txt: holds no text of 4 tokens or more to train"),
        ("x.txt", latin, r"x\.txt:3: is not UTF-8 at byte 2; convert the file"),
        ("x.jsonl", no_text, r"pretrain\.path=.*x\.jsonl: holds no text of 4 tokens or more"),
        ("x.jsonl", no_json, r"x\.jsonl:4: is (not JSON|cut off)"),
        ("x.jsonl", no_field, r"x\.jsonl:1: has no field 'text', but content, url; name the texts"),
        ("x.jsonl", a_number, r"x\.jsonl:1: text can't be 7; give a text"),
        ("x.jsonl", half_a_character, r"x\.jsonl:1: text can't be .*half a character at 2"),
        ("x.json.gz", cut, r"x\.json\.gz: is damaged or cut off, and nothing of it was read"),
        ("x.parquet", no_parquet, r"x\.parquet: is not a Parquet file, or a damaged one"),
        ("x.parquet", no_column, r"x\.parquet: has no column 'text', but content, url; name"),
        ("x.parquet", a_null, r"x\.parquet: row 2: text can't be None; give a text"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, tokenizer, name, make, sentence):
    make(tmp_path / name)
    with pytest.raises(DataError, match=sentence) as caught:
        write_corpus(settings(tmp_path / name), tokenizer, tmp_path / "corpus")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "corpus").exists()


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (
            {"path": "none/texts/en"},
            r"pretrain\.path=none/texts/en: no such file or folder; give a",
        ),
        ({"path": "none.txt"}, r"pretrain\.path=none\.txt: no such file or folder; give a file or"),
        ({"path": "./none"}, r"pretrain\.path=\./none: no such file or folder"),
        (
            {"path": "empty"},
            r"pretrain\.path=empty: holds no text; give a file or folder of \.txt,",
        ),
        ({"path": "empty", "subset": "en"}, r"pretrain\.subset=en would not be read: pretrain\.p"),
    ],
)
def test_a_path_without_texts_is_refused(tmp_path, monkeypatch, fields, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "x.csv").write_text("text\nx\n")
    with pytest.raises(DataError, match=sentence):
        list(read_texts(settings(**fields)))


def test_shards_hold_each_text_once_and_the_same_file_gives_the_same(tmp_path, tokenizer):
    path = tmp_path / "texts.jsonl"
    texts = [f"Text {n} tells of {n * n} things ." for n in range(600)]
    path.write_text("\n".join(json.dumps({"text": text}) for text in [*texts, "", "One two ."]))
    written, too_short = write_corpus(settings(path), tokenizer, tmp_path / "corpus")
    assert too_short == 2
    manifest = read_manifest(tmp_path / "corpus")
    assert manifest.fingerprint == written.fingerprint
    assert {name for name, index in manifest.splits.items() if index.tasks} == {"train", "valid"}
    splits = {}
    for split in ("train", "valid"):
        (task,) = read_tasks_of(tmp_path / "corpus", split)
        assert task.task.name == "corpus"
        assert all(split_of(one.id) == split for one in task.instances)
        splits[split] = [one.input for one in task.instances]
    assert sorted(splits["train"] + splits["valid"]) == sorted(texts)
    # A text stays where it is, whatever else is read.
    path.write_text("\n".join(json.dumps({"text": text}) for text in reversed(texts[:300])))
    other, _ = write_corpus(settings(path), tokenizer, tmp_path / "other")
    (valid,) = read_tasks_of(tmp_path / "other", "valid")
    assert {one.input for one in valid.instances} == set(splits["valid"]) & set(texts[:300])
    assert other.fingerprint != written.fingerprint


def test_about_one_text_in_a_hundred_is_held_out():
    held_out = sum(split_of(hash_of(f"{n}")) == "valid" for n in range(20_000))
    assert held_out == pytest.approx(HELD_OUT * 20_000, abs=4 * (HELD_OUT * 20_000) ** 0.5)


def test_no_more_is_read_than_is_drawn(tmp_path, tokenizer):
    (tmp_path / "1.jsonl").write_bytes(LINES * 10)  # texts are read a few hundred at a time
    (tmp_path / "2.jsonl").write_text("this line is never met")
    given = settings(tmp_path, steps=4, groups=8, micro_groups=8)
    manifest, _ = write_corpus(given, tokenizer, tmp_path / "corpus")
    assert manifest.splits["train"].count.sum() == 32


def test_lengths_are_those_of_the_runs_tokenizer(tmp_path, tokenizer):
    words = "a b c", "a b c d"
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in words))
    assert [n - 1 for n in TextTokenizer(tokenizer).lengths(words)] == [3, 4]
    manifest, too_short = write_corpus(settings(path), tokenizer, tmp_path / "corpus")
    assert (manifest.splits["train"].count.sum(), too_short) == (1, 1)


ROWS = """
import sys
from itertools import islice
from tagi_ray.errors import DataError, ConfigError
from tagi_ray.sections import PretrainSettings
from tagi_ray.corpus import read_texts
fields = dict(one.split("=") for one in sys.argv[1:])
try:
    print(list(islice(read_texts(PretrainSettings(**fields)), 3)))
except (DataError, ConfigError) as error:
    sys.exit(str(error))
"""


@pytest.fixture
def server() -> Iterator[HubServer]:
    card = """---
configs:
- config_name: en
  data_files: [{split: train, path: [one.jsonl, two.jsonl]}]
- config_name: de
  data_files: [{split: train, path: two.jsonl}]
---
"""
    files = {"README.md": card.encode(), "one.jsonl": LINES, "two.jsonl": LINES[:200]}
    wrong = {"rows.jsonl": b'{"content": "x"}\n'}
    repository = Repository(
        {commit(1): files, commit(2): wrong}, {"main": commit(1), "wrong": commit(2)}
    )
    with hub_server() as running:
        running.repositories["datasets/owner/texts"] = repository
        yield running


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (("path=owner/texts", "subset=en"), str(TEXTS[:3])),
        (("path=owner/texts",), "pretrain.subset is not set, and pretrain.path=owner/texts has"),
        (("path=owner/texts", "revision=wrong"), "row 1: has no field 'text', but content; name"),
        (("path=owner/nothing",), "pretrain.path=owner/nothing is no repository of the hub"),
    ],
)
def test_texts_of_a_hub_dataset(server, tmp_path, fields, said):
    out, err = start(server, tmp_path, ROWS, *fields).communicate(timeout=120)
    assert said in (out or err.strip().splitlines()[-1]), (out, err)
    assert server.fetched("two.jsonl") == 0  # a file that is not reached is not fetched
