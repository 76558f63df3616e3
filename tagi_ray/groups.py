"""Plan rows to tokens: fetch the text of each group, choose, render, tokenise.

All of it runs inside Ray Data tasks, which must start fast: nothing here needs torch.

Axes: K groups, N instances in each.
"""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tagi_ray.prompts import PromptKind, render_input, render_instruction
from tagi_ray.sections import DataSettings
from tagi_ray.tasks import PositiveExample
from tagi_ray.vocabulary import TOKENIZER, TextTokenizer

Part = Literal["instruction", "input", "prompt", "text", "teacher"]
"""`text`: the input alone, divided into instruction, input and target. `teacher`: its most likely
tokens at each target token, from the files of `teacher_logits`."""

CACHE_BYTES = 128 << 20
"""Decoded row groups that a process keeps."""
SHORTEST_TEXT = 4
"""Tokens of a text that can be divided."""
MEMO = 4096
"""Rendered and tokenised instructions that a process keeps."""

_ids = pa.list_(pa.int32())
TOKENS = pa.schema(
    [
        ("position", pa.int64()),
        ("slot", pa.int32()),
        ("task", pa.string()),
        ("category", pa.string()),
        ("cut", pa.int32()),
        ("instruction", _ids),
        ("input", pa.list_(_ids)),
        ("prompt", pa.list_(_ids)),
        ("target", pa.list_(_ids)),
        ("teacher_ids", pa.list_(_ids)),
        ("teacher_logp", pa.list_(pa.list_(pa.float16()))),
    ]
)
"""Tokenised groups: a row a group, token lists N to a row besides the instruction's. Those of the
teacher have C numbers for each target token."""


@dataclass(frozen=True, slots=True)
class TextGroup:
    """N instances of one task as text, with the one definition that this group reads."""

    task: str
    category: str
    definition: str
    examples: tuple[PositiveExample, ...]
    inputs: tuple[str, ...]
    targets: tuple[str, ...]
    slot: int = -1
    position: int = 0
    draws: tuple[str, ...] = ()
    """For each instance, what decides how it is divided in this epoch."""
    teacher: tuple[tuple[np.ndarray, np.ndarray], ...] = ()
    """For each instance, the C ids and log-probabilities that the teacher has at each target token,
    token after token; empty arrays of a task without a teacher."""


def prepare(
    block: pa.Table,
    files: tuple[str, ...],
    seed: int,
    tokenizer_folder: str,
    settings: DataSettings,
    parts: tuple[Part, ...],
    teacher_folder: str | None = None,
) -> pa.Table:
    """Return the tokenised groups of a block of `OrderPlan.table`."""
    tokenizer = load_tokenizer(tokenizer_folder)
    groups = fetch(block, files, seed, teacher_folder if "teacher" in parts else None)
    return tokenise(groups, tokenizer, settings, parts)


def load_tokenizer(folder: str) -> TextTokenizer:
    """Return this process's tokenizer of a folder."""
    file = os.path.join(folder, TOKENIZER)
    return _load_tokenizer(folder, os.stat(file).st_mtime_ns if os.path.exists(file) else 0)


@lru_cache(maxsize=4)
def _load_tokenizer(folder: str, changed_ns: int) -> TextTokenizer:
    # Blocks are the unit of parallelism: the tokenizer's own threads would compete with them.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return TextTokenizer(folder)


class _RowGroups:
    """Row groups that were read last, up to a number of bytes."""

    def __init__(self, limit: int) -> None:
        self._limit, self._bytes = limit, 0
        self._kept: OrderedDict[tuple[str, int, int], pa.Table] = OrderedDict()

    def get(self, file: str, changed_ns: int, row_group: int) -> pa.Table:
        # A worker process may outlive the file that it has read: a new one has another time.
        key = (file, changed_ns, row_group)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        table = pq.ParquetFile(file).read_row_group(row_group, use_threads=False)
        self._kept[key] = table
        self._bytes += table.nbytes
        while self._bytes > self._limit and len(self._kept) > 1:
            self._bytes -= self._kept.popitem(last=False)[1].nbytes
        return table


@lru_cache(maxsize=1)
def _row_groups() -> _RowGroups:
    return _RowGroups(CACHE_BYTES)


def fetch(
    block: pa.Table, files: Sequence[str], seed: int, teacher_folder: str | None = None
) -> list[TextGroup]:
    """Read the text of each group of a plan table, and draw its definition and references.

    teacher_folder: where what the teacher says of each reference is read too.
    """
    numbers: list[int] = block["file"].unique().to_pylist()
    changed = {number: os.stat(files[number]).st_mtime_ns for number in numbers}
    groups: list[TextGroup] = []
    for ref in block.to_pylist():
        number: int = ref["file"]
        table = _row_groups().get(files[number], changed[number], ref["row_group"])
        group = _text_group(ref, table, seed)
        if teacher_folder is not None:
            taught = teacher_file(teacher_folder, files[number], ref["row_group"])
            row = _row_groups().get(taught, os.stat(taught).st_mtime_ns, ref["row"])
            names = table["ids"][ref["row"]].values.take(pa.array(ref["offsets"])).to_pylist()
            group = replace(group, teacher=tuple(_taught(ref, row, names, seed)))
        groups.append(group)
    return groups


def teacher_file(folder: str, file: str, row_group: int) -> str:
    """Return the file that holds the teacher's part of a row group of the shards.

    It has a row group for each bucket: a group reads no more than its own bucket.
    """
    split, name = file.split(os.sep)[-2:]
    return os.path.join(folder, split, name.removesuffix(".parquet"), f"{row_group:05d}.parquet")


def _taught(
    ref: dict[str, Any], bucket: pa.Table, names: Sequence[str], seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the teacher's part of each instance of a group, at the reference that it is given."""
    ids, logp = (bucket[name][0].values.to_numpy() for name in ("ids", "logp"))
    counts: list[list[int]] = bucket["tokens"][0].as_py()
    ends = list(accumulate(count for references in counts for count in references))
    firsts = list(accumulate((len(references) for references in counts), initial=0))
    kept = len(ids) // ends[-1] if ends else 0
    for offset, name in zip(ref["offsets"], names, strict=True):
        if not counts:
            yield ids, logp
            continue
        chosen = reference_choice(seed, name, ref["epoch"], len(counts[offset]))
        end = ends[firsts[offset] + chosen] * kept
        part = slice(end - counts[offset][chosen] * kept, end)
        yield ids[part], logp[part]


def _text_group(ref: dict[str, Any], table: pa.Table, seed: int) -> TextGroup:
    row, offsets = ref["row"], pa.array(ref["offsets"], pa.int16())

    def one(column: str) -> Any:
        return table[column][row].as_py()

    def chosen(column: str) -> list[Any]:
        return table[column][row].values.take(offsets).to_pylist()

    task, definitions = one("task"), one("definitions")
    examples = zip(one("positive_inputs"), one("positive_outputs"), strict=True)
    names = chosen("ids")
    references = zip(names, chosen("outputs"), strict=True)
    return TextGroup(
        task=task,
        category=one("category"),
        definition=definitions[definition_choice(seed, task, ref["position"], len(definitions))],
        examples=tuple(PositiveExample(*example) for example in examples),
        inputs=tuple(chosen("inputs")),
        targets=tuple(
            outputs[reference_choice(seed, name, ref["epoch"], len(outputs))].strip()
            for name, outputs in references
        ),
        slot=ref["slot"],
        position=ref["position"],
        draws=tuple(f"{seed}/{name}/{ref['epoch']}" for name in names),
    )


def definition_choice(seed: int, task: str, position: int, count: int) -> int:
    """Return which paraphrase the group at a position reads."""
    return _choice(f"{seed}/{task}/{position}", count)


def reference_choice(seed: int, instance_id: str, epoch: int, count: int) -> int:
    """Return which of its references an instance is trained on in an epoch."""
    return _choice(f"{seed}/{instance_id}/{epoch}", count)


def taught_definition(seed: int, instance_id: str, count: int) -> int:
    """Return which paraphrase a cached teacher reads of an instance."""
    return _choice(f"{seed}/{instance_id}", count)


def division(draw: str, count: int) -> tuple[int, int]:
    """Return where a text of `count` tokens, 4 or more, is divided into x[:s1], x[s1:s2], x[s2:].

    HINT's rule (method.md 2.3): s1 ~ U{1..n-3}, s2 ~ U{s1..n-3}. Its code draws both from one seed,
    so that the second follows from the first; here they are independent.
    """
    first = 1 + _choice(f"{draw}/first", count - 3)
    return first, first + _choice(f"{draw}/second", count - 2 - first)


def _choice(key: str, count: int) -> int:
    if count == 1:
        return 0
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest()) % count


def tokenise(
    groups: Sequence[TextGroup],
    tokenizer: TextTokenizer,
    settings: DataSettings,
    parts: Sequence[Part],
) -> pa.Table:
    """Render and tokenise groups: one row each, the parts not asked for left empty."""
    instances = len(groups[0].inputs)
    if any(len(group.inputs) != instances for group in groups):
        raise ValueError("the groups of a batch must have the same number of instances")
    cut_K = np.zeros(len(groups), np.int32)

    def grouped(rows: list[list[int]], cut: list[bool]) -> list[list[list[int]]]:
        cut_K[:] += np.asarray(cut, np.int32).reshape(-1, instances).sum(1, dtype=np.int32)
        return [rows[i : i + instances] for i in range(0, len(rows), instances)]

    nothing = [[[]] * instances] * len(groups)
    targets = [text for group in groups for text in group.targets]
    columns: dict[str, Any] = {
        "position": [group.position for group in groups],
        "slot": [group.slot for group in groups],
        "task": [group.task for group in groups],
        "category": [group.category for group in groups],
        "instruction": [[]] * len(groups),
        "input": nothing,
        "prompt": nothing,
        "target": grouped(*tokenizer.encode_counted(targets, settings.max_target_tokens)),
        "teacher_ids": nothing,
        "teacher_logp": nothing,
    }
    if "instruction" in parts:
        limit = settings.max_instruction_tokens
        pairs = [
            _instruction_ids(g.definition, g.examples, settings.prompt, limit, tokenizer)
            for g in groups
        ]
        columns["instruction"] = [ids for ids, _ in pairs]
        cut_K += np.asarray([cut for _, cut in pairs], np.int32)
    if "input" in parts:
        texts = [render_input(text) for group in groups for text in group.inputs]
        rows = tokenizer.encode_counted(texts, settings.max_input_tokens, tokenizer.ends_texts)
        columns["input"] = grouped(*rows)
    if "prompt" in parts:
        columns["prompt"] = grouped(*_prompts(groups, tokenizer, settings))
    if "text" in parts:
        rows, cut = _divided(groups, tokenizer, settings.max_prompt_tokens)
        columns |= rows
        cut_K += np.asarray(cut, np.int32)
    if "teacher" in parts:
        pairs = [pair for group in groups for pair in group.teacher]
        for name, rows in zip(
            ("teacher_ids", "teacher_logp"), zip(*pairs, strict=True), strict=True
        ):
            columns[name] = _nested(rows, instances)
    return pa.table({**columns, "cut": cut_K}, schema=TOKENS)


def _nested(rows: Sequence[np.ndarray], instances: int) -> pa.ListArray:
    """Return K lists of N lists of numbers, without a Python object for each."""
    ends = np.cumsum([0, *(len(row) for row in rows)], dtype=np.int32)
    inner = pa.ListArray.from_arrays(ends, np.concatenate(rows))
    outer = np.arange(0, len(rows) + 1, instances, dtype=np.int32)
    return pa.ListArray.from_arrays(outer, inner)


@lru_cache(maxsize=MEMO)
def _instruction_ids(
    definition: str,
    examples: tuple[PositiveExample, ...],
    kind: PromptKind,
    limit: int,
    tokenizer: TextTokenizer,
) -> tuple[list[int], bool]:
    def fits(text: str) -> bool:
        return tokenizer.lengths([text])[0] <= limit

    text = render_instruction(definition, examples, kind, fits)
    rows, cut = tokenizer.encode_counted([text], limit, tokenizer.ends_texts)
    return rows[0], cut[0]


def _prompts(
    groups: Sequence[TextGroup], tokenizer: TextTokenizer, settings: DataSettings
) -> tuple[list[list[int]], list[bool]]:
    """Encode instruction and input of each instance, with the demonstrations that fit beside it."""
    limit = settings.max_prompt_tokens
    members = [(group, render_input(text)) for group in groups for text in group.inputs]
    texts = [_instruction(g.definition, g.examples, settings.prompt) + text for g, text in members]
    rows, cut = tokenizer.encode_counted(texts, limit, tokenizer.ends_texts)
    for i in np.flatnonzero(cut):
        group, text = members[i]
        # Almost every prompt fits whole, so that only the others pay for trying one by one.
        if group.examples and settings.prompt != "def":
            shorter = render_instruction(
                group.definition,
                group.examples,
                settings.prompt,
                lambda instruction, text=text: tokenizer.lengths([instruction + text])[0] <= limit,
            )
            [rows[i]], [cut[i]] = tokenizer.encode_counted(
                [shorter + text], limit, tokenizer.ends_texts
            )
    return rows, cut


def _divided(
    groups: Sequence[TextGroup], tokenizer: TextTokenizer, limit: int
) -> tuple[dict[str, Any], list[bool]]:
    """Divide each group's one text, cut to `limit` tokens.

    Each piece ends with the end token; for a decoder-only model the target alone does, and the
    input, which is then never empty, has one token where HINT's rule gives it none.
    """
    texts = [text for group in groups for text in group.inputs]
    rows, cut = tokenizer.encode_counted(texts, limit + 1)
    columns: dict[str, Any] = {"instruction": [], "input": [], "target": []}
    for group, row in zip(groups, rows, strict=True):
        ids, end = row[:-1], row[-1:]
        first, second = division(group.draws[0], len(ids))
        inner = end if tokenizer.ends_texts else []
        if not tokenizer.ends_texts:
            second = max(second, first + 1)
        columns["instruction"].append(ids[:first] + inner)
        columns["input"].append([ids[first:second] + inner])
        columns["target"].append([ids[second:] + end])
    return columns, cut


@lru_cache(maxsize=MEMO)
def _instruction(definition: str, examples: tuple[PositiveExample, ...], kind: PromptKind) -> str:
    return render_instruction(definition, examples, kind)
