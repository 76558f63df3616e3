"""Shards written in this process: contents, splits, manifest."""

import json
from dataclasses import dataclass

import pyarrow.parquet as pq
import pytest

from tagi_ray.errors import DataError
from tagi_ray.sections import DataSettings
from tagi_ray.shard_writer import cut_buckets, list_sources, write_shards
from tagi_ray.shards import SPLITS, read_manifest, read_tasks_of
from tagi_ray.tasks import Instance, PositiveExample, Task, instance_hash


@dataclass(frozen=True)
class Listed:
    """A source with given instances."""

    task: Task
    listed: tuple[Instance, ...]

    def instances(self):
        return iter(self.listed)


def write_jsonl(path, counts: dict[str, int], text=lambda task, i: f"{task} {i}"):
    rows = [
        {"task": task, "instruction": f"Do {task}.", "input": text(task, i), "output": str(i)}
        for task, count in counts.items()
        for i in range(count)
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return DataSettings(
        source="records", path=str(path), test_tasks=("t",), valid_fraction=0.0,
        train_instances=100, test_instances=10, oracle_instances=20,
    )  # fmt: skip


def test_what_is_read_is_what_was_written(tmp_path):
    settings = write_jsonl(tmp_path / "d.jsonl", {"a": 150, "b": 70, "t": 40})
    written = write_shards(settings, tmp_path / "shards", 0, parallel=False)
    manifest = read_manifest(tmp_path / "shards")
    assert manifest.fingerprint == written.fingerprint
    assert manifest.tasks == written.tasks
    assert {name: record.split for name, record in manifest.tasks.items()} == {
        "a": "train", "b": "train", "t": "test",
    }  # fmt: skip
    assert (manifest.tasks["t"].instances, manifest.tasks["t"].oracle_instances) == (10, 20)
    a, b = read_tasks_of(tmp_path / "shards", "train")
    assert [i.id for i in a.instances] == [f"a-{n}" for n in range(1, 101)]
    assert [i.input for i in b.instances] == [f"b {n}" for n in range(70)]
    assert b.task == Task("b", "uncategorised", ("Do b.",))
    (scored,) = read_tasks_of(tmp_path / "shards", "test")
    (oracle,) = read_tasks_of(tmp_path / "shards", "oracle")
    assert [i.input for i in scored.instances] == [f"t {n}" for n in range(10)]
    assert [i.input for i in oracle.instances] == [f"t {n}" for n in range(10, 30)]


def test_index_points_at_the_buckets(tmp_path, monkeypatch):
    monkeypatch.setattr("tagi_ray.shard_writer.BUCKETS_PER_FILE", 32)
    settings = write_jsonl(tmp_path / "d.jsonl", {f"a{i}": 70 for i in range(30)} | {"t": 5})
    folder = tmp_path / "shards"
    index = write_shards(settings, folder, 0, parallel=False).splits["train"]
    assert len(index.files) == 2
    assert len(index.task) == 60
    seen = set()
    for bucket in range(60):
        file = pq.ParquetFile(folder / index.files[index.file[bucket]])
        row = file.read_row_group(int(index.row_group[bucket])).slice(int(index.row[bucket]), 1)
        (content,) = row.to_pylist()
        assert content["task"] == index.tasks[index.task[bucket]]
        assert len(content["ids"]) == index.count[bucket] == (64, 6)[index.number[bucket]]
        seen.update(content["ids"])
    assert len(seen) == 30 * 70
    # Buckets of a task lie anywhere in the split, or windows would not mix tasks.
    assert index.task.tolist() != sorted(index.task.tolist())


def test_oracle_instances_never_repeat_a_text_that_is_scored():
    texts = ["x", "y", " x ", "z", "z", "w", "v"]
    listed = tuple(Instance(f"t-{i}", text, ("o",)) for i, text in enumerate(texts))
    settings = DataSettings(test_instances=2, oracle_instances=2)
    source = Listed(Task("t", "c", ("Do.",)), listed)
    rows = list(cut_buckets(source, "test", settings, 0))
    assert [row["ids"] for row in rows] == [["t-0", "t-1"], ["t-3", "t-5"]]
    assert rows[0]["order"] >> 60 == 0
    assert rows[1]["order"] >> 60 == 1


def held_out(texts: str, scored: int, oracle: int) -> list[list[str]]:
    """Ids of the buckets of a held-out task that has these texts."""
    listed = tuple(Instance(f"t{i}", text, ("o",)) for i, text in enumerate(texts))
    settings = DataSettings(test_instances=scored, oracle_instances=oracle)
    source = Listed(Task("t", "c", ("Do.",)), listed)
    return [row["ids"] for row in cut_buckets(source, "test", settings, 0)]


@pytest.mark.parametrize(
    ("texts", "scored", "oracle", "expected"),
    [
        # A third of the task, where no instance is left over.
        ("abcdef", 6, 9, ["t0 t1 t2 t3", "t4 t5"]),
        ("abcdef", 9, 1, ["t0 t1 t2 t3 t4", "t5"]),
        # What is left over counts, and suffices here.
        ("abcdef", 5, 9, ["t0 t1 t2 t3", "t4 t5"]),
        ("abcdef", 4, 9, ["t0 t1 t2 t3", "t4 t5"]),
        ("abcdef", 2, 9, ["t0 t1", "t2 t3 t4 t5"]),
        ("ab", 2, 9, ["t0", "t1"]),
        # A text stays on the side of its first instance.
        ("abcaabda", 8, 9, ["t0 t1 t2 t3 t4 t5", "t6"]),
        ("abcbdeef", 8, 2, ["t0 t1 t2 t3 t4", "t5 t7"]),
        ("abcdef", 6, 0, ["t0 t1 t2 t3 t4 t5"]),
        ("aaa", 2, 9, ["t0 t1"]),
    ],
)
def test_oracle_of_a_short_task_takes_from_what_would_be_scored(texts, scored, oracle, expected):
    assert held_out(texts, scored, oracle) == [ids.split() for ids in expected]


def test_a_task_that_can_have_no_oracle_is_refused_with_the_cure(tmp_path):
    settings = write_jsonl(tmp_path / "d.jsonl", {"a": 5, "t": 1})
    with pytest.raises(DataError, match=r"held-out tasks t: .*data\.oracle_instances=0"):
        write_shards(settings, tmp_path / "s", 0, parallel=False)
    assert not (tmp_path / "s").exists()
    settings = settings.model_copy(update={"oracle_instances": 0})
    assert write_shards(settings, tmp_path / "s", 0, parallel=False).tasks["t"].instances == 1


def test_leaked_instances_are_counted(tmp_path):
    settings = write_jsonl(
        tmp_path / "d.jsonl",
        {"a": 50, "t": 30},
        text=lambda task, i: f"{task if i > 3 else ''} {i}",
    )
    manifest = write_shards(settings, tmp_path / "shards", 0, parallel=False)
    assert manifest.leaked_instances == 4
    assert read_manifest(tmp_path / "shards").leaked_instances == 4


def test_fingerprint_follows_contents_and_order(tmp_path):
    settings = write_jsonl(tmp_path / "d.jsonl", {"a": 150, "b": 70, "t": 40})

    def fingerprint(settings, seed):
        return write_shards(settings, tmp_path / "s", seed, parallel=False).fingerprint

    first = fingerprint(settings, 0)
    assert fingerprint(settings, 0) == first
    assert fingerprint(settings, 1) != first
    assert fingerprint(settings.model_copy(update={"train_instances": 99}), 0) != first


def test_synthetic_world_keeps_its_own_split(tmp_path):
    settings = DataSettings(train_instances=10, test_instances=5, oracle_instances=4)
    sources = list_sources(settings, seed=5)
    manifest = write_shards(settings, tmp_path / "s", 5, parallel=False)
    assert {s.task.name: split for s, split in sources} == {
        name: record.split for name, record in manifest.tasks.items()
    }
    assert {record.instances for record in manifest.tasks.values()} == {5, 10}
    scored = {t.task.name: t.instances for t in read_tasks_of(tmp_path / "s", "test")}
    for task in read_tasks_of(tmp_path / "s", "oracle"):
        assert len(task.instances) == 4
        hashes = {instance_hash(i.input, i.outputs) for i in scored[task.task.name]}
        assert not hashes & {instance_hash(i.input, i.outputs) for i in task.instances}
    assert all(isinstance(e, PositiveExample) for e in task.task.positive_examples)


def test_every_split_exists_even_if_empty(tmp_path):
    settings = write_jsonl(tmp_path / "d.jsonl", {"a": 5, "t": 5})
    manifest = write_shards(settings, tmp_path / "s", 0, parallel=False)
    assert tuple(manifest.splits) == SPLITS
    assert list(read_tasks_of(tmp_path / "s", "valid")) == []


def test_missing_and_foreign_manifests(tmp_path):
    with pytest.raises(DataError, match="prepare the data first"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text('{"version": 99}')
    with pytest.raises(DataError, match="format 99"):
        read_manifest(tmp_path)
