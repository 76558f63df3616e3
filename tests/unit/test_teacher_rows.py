"""What a teacher reads: once an epoch each, held-out rows never, whoever else is trained."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tagi_ray.errors import DataError
from tagi_ray.groups import TextGroup, definition_choice, load_tokenizer, tokenise
from tagi_ray.sections import DataSettings
from tagi_ray.shards import ShardTask, read_manifest
from tagi_ray.tasks import Instance, Task
from tagi_ray.teacher_rows import TeacherRows, held_out, read_tasks, text_length
from tagi_ray.vocabulary import TextTokenizer
from tests.tiny_run import tiny_experiment, tiny_run

DATA = DataSettings()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run(tiny_experiment(tmp_path_factory.mktemp("rows")))


@pytest.fixture(scope="module")
def tokenizer(run: Path) -> TextTokenizer:
    return load_tokenizer(str(run / "tokenizer"))


def task(name: str, count: int, definitions: int = 1, outputs: int = 1) -> ShardTask:
    instances = tuple(
        Instance(f"{name}-{i}", f"{name} {i}", tuple(f"out {i} {j}" for j in range(outputs)))
        for i in range(count)
    )
    return ShardTask(
        Task(name, "any", tuple(f"do {name} {d}" for d in range(definitions))), instances
    )


def rows_of(tasks: list[ShardTask], tokenizer: TextTokenizer, **changes) -> TeacherRows:
    options = {"prompt": "full", "instances": 1, "seed": 3, "valid_fraction": 0.2, **changes}
    return TeacherRows(tasks, tokenizer, DATA, **options)


def text(tokenizer: TextTokenizer, row) -> str:
    return tokenizer.decode_batch([row.source.tolist()])[0]


def test_an_epoch_has_every_instance_once_and_no_held_out_one(tokenizer):
    rows = rows_of([task("a", 7), task("b", 13)], tokenizer)
    assert len(rows.valid) == 4
    held = {text(tokenizer, row) for row in rows.valid}
    for epoch in range(3):
        read = Counter(text(tokenizer, rows.of_step(16 * epoch + step)[0]) for step in range(16))
        assert set(read.values()) == {1}
        assert len(read) == 16
        assert not held & set(read)


def test_a_step_depends_on_nothing_but_itself(tokenizer):
    tasks = [task("a", 9, definitions=3, outputs=2), task("b", 30, definitions=2)]
    forwards = [rows_of(tasks, tokenizer, instances=2)]
    forwards.append(rows_of(tasks, tokenizer, instances=2))
    steps = [150, 3, 70, 3, 149]
    first = {step: forwards[0].of_step(step) for step in sorted(steps)}
    for step in steps:
        for one, other in zip(forwards[1].of_step(step), first[step], strict=True):
            assert np.array_equal(one.source, other.source)
            assert np.array_equal(one.target, other.target)
    changed = rows_of(tasks, tokenizer, instances=2, seed=4)
    assert any(
        not np.array_equal(changed.of_step(step)[0].source, first[step][0].source) for step in steps
    )


def test_rows_are_what_any_other_stage_reads_of_their_instances(run, tokenizer):
    manifest = read_manifest(run / "shards")
    (one,) = read_tasks(run / "shards", "train", manifest.names("train")[:1])
    assert len(one.instances) == manifest.tasks[one.task.name].instances
    rows = TeacherRows(
        [one], tokenizer, DATA, prompt="input", instances=2, seed=0, valid_fraction=0.0
    )
    assert not rows.valid
    expected = {
        tuple(tokenise([group], tokenizer, DATA, ("input",))["input"][0].as_py()[0])
        for instance in one.instances
        for group in [
            TextGroup(one.task.name, "", "", (), (instance.input,), (instance.outputs[0],))
        ]
    }
    read = {tuple(row.source.tolist()) for step in range(8) for row in rows.of_step(step)}
    assert read == expected


def test_paraphrases_and_references_take_turns(tokenizer):
    (one,) = tasks = [task("a", 2, definitions=3, outputs=4)]
    rows = rows_of(tasks, tokenizer, valid_fraction=0.0)
    for step in range(5):
        number = definition_choice(3, "a", step, 3)
        (row,) = rows.of_step(step)
        whole = tokenizer.encode_batch([one.task.definitions[number]], 99, end=False)[0]
        assert set(whole) <= set(row.source.tolist())
    assert len({tuple(rows.of_step(step)[0].target.tolist()) for step in range(64)}) == 8


def test_what_is_held_out_is_drawn_by_the_instance_and_never_all():
    tasks = [task("a", 30)]
    held = held_out(tasks, 0.1, 16)
    names = {tasks[t].instances[i].id for t, i in held}
    assert len(names) == 3
    turned = [ShardTask(tasks[0].task, tasks[0].instances[::-1])]
    assert {turned[t].instances[i].id for t, i in held_out(turned, 0.1, 16)} == names
    assert len(held_out([task("a", 400)], 0.1, 16)) == 16
    assert not held_out([task("a", 9)], 0.1, 16)


def test_a_teacher_without_instances_is_refused(tokenizer):
    with pytest.raises(DataError, match="the teacher of a has no instance"):
        rows_of([task("a", 0)], tokenizer)


def test_length_counts_what_is_read():
    short, long = [task("a", 3)], [task("a" * 50, 3)]
    assert text_length(long, "full", DATA) > text_length(short, "full", DATA) + 90
    assert text_length(short, "full", DATA) > text_length(short, "input", DATA)
