"""Raw text for pretraining: read in the order of its files, and kept as shards of one task.

About as many texts are read as the stage draws: of a large corpus the rest is never fetched.
A text's split is a hash of itself, so that it can't be trained on and validated on.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from tagi_ray import hub, synthetic
from tagi_ray.errors import DataError
from tagi_ray.groups import SHORTEST_TEXT
from tagi_ray.json_files import line_text, lines_of, refuse
from tagi_ray.record_files import JsonLines, hub_refusal, opened_parquet
from tagi_ray.remote_files import list_files
from tagi_ray.sections import PretrainSettings
from tagi_ray.shard_writer import BUCKETS, STREAM, write_stream
from tagi_ray.shards import Manifest, bucket_row
from tagi_ray.tasks import Instance, Task
from tagi_ray.vocabulary import TextTokenizer

FOLDER = "corpus"
"""Folder of a run that holds its shards."""
NAME = "corpus"
"""The task that all texts belong to, and its category."""
HELD_OUT = 0.01
"""Share of the texts that are validated on."""
BUCKET_TEXTS = 16
"""Texts in a bucket: a draw reads a row group, which texts fill faster than instances do."""
READ_AHEAD = 256
"""Texts that are read and tokenised together."""
CHARACTERS = 3
"""Of a token, rather too few (English has 3.8 for one of T5's): lines of a text file are joined to
texts of at most max_tokens times as many, of which hardly one is cut then."""
LONGEST = 64
"""Characters that are kept of a record for each of max_tokens; a book is not stored whole."""

TEXT, PARQUET = (".txt", ".txt.gz"), (".parquet",)
# C4 names its JSON lines .json.gz.
JSON_LINES = (".jsonl", ".jsonl.gz", ".json", ".json.gz")
SUFFIXES = (*TEXT, *JSON_LINES, *PARQUET)


@dataclass(slots=True)
class Corpus:
    """Texts as the instances of one task: their input; nothing is their output.

    Those of fewer than 4 tokens, which can't be divided, are left out and counted.
    """

    settings: PretrainSettings
    tokenizer: TextTokenizer
    task: Task = field(default=Task(NAME, NAME, ("",)))
    too_short: int = 0

    def instances(self) -> Iterator[Instance]:
        """Yield the texts, named by their hash."""
        self.too_short = 0
        texts = read_texts(self.settings)
        while some := list(islice(texts, READ_AHEAD)):
            for text, tokens in zip(some, self.tokenizer.lengths(some), strict=True):
                if tokens - self.tokenizer.ends_texts < SHORTEST_TEXT:
                    self.too_short += 1
                    continue
                yield Instance(hash_of(text), text, ("",))


def write_corpus(
    settings: PretrainSettings, tokenizer_folder: Path, folder: Path
) -> tuple[Manifest, int]:
    """Write the shards of a corpus; return their manifest, and how many texts were too short.

    The folder appears when all of it is there; whatever stood there is replaced. One bucket of each
    split is held at a time. Raises DataError for what can't be read, or holds no text.
    """
    corpus = Corpus(settings, TextTokenizer(tokenizer_folder))
    partial = folder.with_name(folder.name + ".partial")
    for leftover in (partial, folder):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    manifest = write_stream(_buckets(corpus), [(corpus, "train")], partial)
    partial.replace(folder)
    return manifest, corpus.too_short


def hash_of(text: str) -> str:
    """Return what names a text."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def split_of(digest: str) -> Literal["train", "valid"]:
    """Return the split of the text with this hash."""
    return "valid" if int(digest[:16], 16) < HELD_OUT * 2**64 else "train"


def _buckets(corpus: Corpus) -> Iterator[pa.Table]:
    """Yield tables of one bucket, until the stage has a text of its own for each draw."""
    wanted = corpus.settings.steps * corpus.settings.groups
    waiting: dict[Literal["train", "valid"], list[Instance]] = {"train": [], "valid": []}
    numbers = {"train": 0, "valid": 0}
    trained = 0
    for text in corpus.instances():
        split = split_of(text.id)
        waiting[split].append(text)
        trained += split == "train"
        if len(waiting[split]) == BUCKET_TEXTS:
            yield _table(corpus.task, waiting[split], split, numbers[split])
            waiting[split] = []
            numbers[split] += 1
        if trained == wanted:
            break
    if not trained:
        raise DataError(
            f"pretrain.path={corpus.settings.path}: holds no text of {SHORTEST_TEXT} tokens or"
            " more to train on; give other texts"
        )
    for split, rest in waiting.items():
        if rest:
            yield _table(corpus.task, rest, split, numbers[split])


def _table(
    task: Task, texts: list[Instance], split: Literal["train", "valid"], number: int
) -> pa.Table:
    row = bucket_row(task, texts)
    extra = {
        "order": STREAM.index(split) << 60,
        "number": number,
        "digest": hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest(),
        "hashes": [text.id for text in texts],
    }
    return pa.Table.from_pylist([{**row, **extra}], schema=BUCKETS)


def check_path(settings: PretrainSettings) -> None:
    """Raise DataError or ConfigError where there is nothing to read, which takes a moment to see."""
    if settings.path == synthetic.WORLD:
        return
    if _is_on_hub(settings):
        hub.commit_of("pretrain.path", str(settings.path), settings.revision, "dataset")
    else:
        _files(settings)


def read_texts(settings: PretrainSettings) -> Iterator[str]:
    """Yield the texts of a corpus: records, or paragraphs of a text file.

    Paragraphs end at blank lines. They are joined, and long ones divided between their lines, to
    about max_tokens; what a longer line or record has beyond that is not trained on. Raises
    DataError with file and line at the first that can't be read.
    """
    if settings.path == synthetic.WORLD:
        yield from synthetic.texts()
        return
    kept = LONGEST * settings.max_tokens
    if _is_on_hub(settings):
        yield from (text[:kept] for text in _hub_texts(settings))
        return
    for path in _files(settings):
        if path.endswith(TEXT):
            texts = _paragraphs(path, CHARACTERS * settings.max_tokens)
        else:
            texts = _column(path) if path.endswith(PARQUET) else _lines(path)
        yield from (text[:kept] for text in texts)


def _is_on_hub(settings: PretrainSettings) -> bool:
    """Say whether the path is OWNER/NAME, and no folder here."""
    path = str(settings.path)
    named = path.count("/") == 1 and path[0] not in "./~" and not path.endswith(("/", *SUFFIXES))
    return named and hub.is_on_hub(path)


def _files(settings: PretrainSettings) -> list[str]:
    path = str(settings.path)
    cure = f"give a file or folder of {', '.join(SUFFIXES)}, or the id OWNER/NAME of a hub dataset"
    for name in ("revision", "subset"):
        if value := getattr(settings, name):
            raise DataError(
                f"pretrain.{name}={value} would not be read: pretrain.path={path} is no hub"
                " dataset; leave it out"
            )
    found = list_files(path, SUFFIXES)
    if found is None:
        raise DataError(f"pretrain.path={path}: no such file or folder; {cure}")
    found = [name for name in found if name.endswith(SUFFIXES)]
    if not found:
        raise DataError(f"pretrain.path={path}: holds no text; {cure}")
    return found


def _paragraphs(path: str, characters: int) -> Iterator[str]:
    """Yield lines joined to at most so many characters; from half of that on a blank line ends."""
    text, last = "", 0
    for _, number, line in lines_of(path):
        added = line_text(line, f"{path}:{number}").strip()
        blank_between = number > last + 1
        full = len(text) + len(added) >= characters
        if text and (full or (blank_between and 2 * len(text) >= characters)):
            yield text
            text = ""
        text = f"{text}\n{added}" if text else added
        last = number
    if text:
        yield text


def _lines(path: str) -> Iterator[str]:
    for _, where, parse in JsonLines(path).scan():
        yield _text(parse(), where)


def _column(path: str) -> Iterator[str]:
    with opened_parquet(path) as file:
        if "text" not in file.schema_arrow.names:
            names = ", ".join(file.schema_arrow.names)
            raise DataError(f"{path}: has no column 'text', but {names}; name the texts so")
        number = 0
        for batch in file.iter_batches(256, columns=["text"]):
            for row in batch.to_pylist():
                number += 1
                yield _text(row, f"{path}: row {number}")


def _hub_texts(settings: PretrainSettings) -> Iterator[str]:
    """Yield the rows of a hub dataset as they are fetched."""
    from datasets import load_dataset

    path = str(settings.path)
    commit = hub.commit_of("pretrain.path", path, settings.revision, "dataset")
    try:
        rows: Any = load_dataset(
            path, name=settings.subset, revision=commit, split="train", streaming=True
        )
        for number, row in enumerate(rows, start=1):
            yield _text(row, f"pretrain.path={path}: row {number}")
    except DataError:
        raise
    # Whatever the hub, the network or a file of it raises, it is the text that can't be had.
    except Exception as error:
        raise DataError(hub_refusal("pretrain", path, settings.subset, "train", error)) from error


def _text(record: Any, where: str) -> str:
    if "text" not in record:
        raise DataError(f"{where}: has no field 'text', but {', '.join(record)}; name the texts so")
    text = record["text"]
    if not isinstance(text, str):
        refuse(where, "text", text, "give a text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        cure = f"it holds half a character at {error.start}; correct it"
        refuse(where, "text", text[error.start : error.end], cure)
    return text
