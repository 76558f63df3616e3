"""The store of teachers, and that nothing that trains can read the oracle's."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tagi_ray.config import Experiment
from tagi_ray.errors import AdapterError, DataError
from tagi_ray.sections import DataSettings, LoraSettings
from tagi_ray.shard_writer import write_shards
from tagi_ray.shards import Manifest, read_manifest
from tagi_ray.tasks import check_name
from tagi_ray.teachers import (
    finished,
    folder_name,
    read_teachers,
    teacher_names,
    write_teachers,
)
from tests.models import LORA, fill, random_backbone

DATA = DataSettings(train_instances=4, test_instances=2, oracle_instances=2)
EXPERIMENT = Experiment(name="any", data=DATA, lora=LORA)
SITES = random_backbone().sites


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Manifest:
    folder = tmp_path_factory.mktemp("data") / "shards"
    write_shards(DATA, folder, 0, parallel=False)
    return read_manifest(folder)


def _write(folder: Path, manifest, names, role="train", experiment=EXPERIMENT) -> None:
    bank = fill(SITES, len(names))
    write_teachers(
        folder, bank, names, experiment, role=role, steps=5, final_loss=0.5, manifest=manifest
    )


def _per_category() -> Experiment:
    teaching = EXPERIMENT.teachers.model_copy(update={"per": "category"})
    return EXPERIMENT.model_copy(update={"teachers": teaching})


def _with_categories(manifest: Manifest, **categories: str) -> Manifest:
    """The manifest with other categories of some tasks."""
    tasks = {
        name: replace(record, category=categories.get(name, record.category))
        for name, record in manifest.tasks.items()
    }
    return replace(manifest, tasks=tasks)


def test_a_store_reads_back_what_was_written_with_a_slot_for_each_task(tmp_path, manifest):
    names = teacher_names(manifest, "train", "task")
    assert len(names) == 92
    _write(tmp_path / "teachers", manifest, names[:3])
    bank, slots = read_teachers(tmp_path / "teachers", manifest, SITES, EXPERIMENT)
    assert slots == {names[0]: 0, names[1]: 1, names[2]: 2}
    written = fill(SITES, 3)
    assert all((bank.a[name] == written.a[name]).all() for name in bank.a)
    assert finished(tmp_path / "teachers")[names[0]].steps == 5


def test_a_category_teacher_serves_all_tasks_of_its_category(tmp_path, manifest):
    experiment = _per_category()
    names = teacher_names(manifest, "train", "category")
    assert len(names) == 6
    _write(tmp_path / "teachers", manifest, names, experiment=experiment)
    _, slots = read_teachers(tmp_path / "teachers", manifest, SITES, experiment)
    assert slots.keys() == set(manifest.names("train"))
    category = {task: folder_name(manifest.tasks[task].category) for task in slots}
    assert all(names[slot] == category[task] for task, slot in slots.items())


@pytest.mark.parametrize(
    ("category", "folder"),
    [
        ("Question Answering", "Question_Answering"),
        ("../../x", "x"),
        ("A/B", "A_B"),
        (".hidden", "hidden"),
        ("a..b", "a_b"),
        ("Fill in the Blank (2)", "Fill_in_the_Blank_2"),
        ("x" * 300, "x" * 200),
    ],
)
def test_a_category_becomes_one_safe_folder(category, folder):
    assert folder_name(category) == folder
    assert check_name(folder_name(category), "here") == folder


def test_category_teachers_stay_in_their_store(tmp_path, manifest):
    first, second, *_ = manifest.names("train")
    manifest = _with_categories(manifest, **{first: "../../x", second: "A/B"})
    names = teacher_names(manifest, "train", "category")
    assert {"x", "A_B"} <= set(names)
    store = tmp_path / "deep" / "teachers"
    _write(store, manifest, names, experiment=_per_category())
    assert {path.name for path in store.iterdir()} == {*names, "index.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["deep"]
    slots = read_teachers(store, manifest, SITES, _per_category())[1]
    assert (names[slots[first]], names[slots[second]]) == ("x", "A_B")


def test_categories_that_would_share_a_folder_are_refused(manifest):
    first, second, *_ = manifest.names("train")
    alike = _with_categories(manifest, **{first: "A/B", second: "A B"})
    with pytest.raises(DataError, match=r"'A B' and 'A/B' would both be in the folder A_B"):
        teacher_names(alike, "train", "category")
    assert first in teacher_names(alike, "train", "task")
    with pytest.raises(DataError, match="'翻译' can't be a folder name"):
        folder_name("翻译")


def test_training_refuses_oracle_teachers_by_role_by_folder_and_by_task(tmp_path, manifest):
    held_out = teacher_names(manifest, "oracle", "task")
    assert len(held_out) == 20
    _write(tmp_path / "oracle_teachers", manifest, held_out[:1], role="oracle")
    with pytest.raises(DataError, match="oracle teachers"):
        read_teachers(tmp_path / "oracle_teachers", manifest, SITES, EXPERIMENT)
    (tmp_path / "oracle_teachers").rename(tmp_path / "teachers")
    with pytest.raises(DataError, match="oracle teachers"):
        read_teachers(tmp_path / "teachers", manifest, SITES, EXPERIMENT)
    index = tmp_path / "teachers" / "index.json"
    index.write_text(index.read_text().replace('"oracle"', '"train"'))
    with pytest.raises(DataError, match=f"trained on the held-out task '{held_out[0]}'"):
        read_teachers(tmp_path / "teachers", manifest, SITES, EXPERIMENT)
    _write(tmp_path / "other" / "oracle_teachers", manifest, manifest.names("train")[:1])
    with pytest.raises(DataError, match="oracle teachers"):
        read_teachers(tmp_path / "other" / "oracle_teachers", manifest, SITES, EXPERIMENT)


def test_a_category_teacher_that_saw_a_held_out_task_is_refused(tmp_path, manifest):
    """Its name says nothing of its tasks: a task that is held out now may have been trained on."""
    store, experiment = tmp_path / "teachers", _per_category()
    names = teacher_names(manifest, "train", "category")
    _write(store, manifest, names, experiment=experiment)
    task = manifest.names("train")[0]
    known = {t for record in finished(store).values() for t in record.tasks}
    assert known == set(manifest.names("train"))
    read_teachers(store, manifest, SITES, experiment)
    moved = {**manifest.tasks, task: replace(manifest.tasks[task], split="test")}
    with pytest.raises(DataError, match=f"was trained on the held-out task '{task}'"):
        read_teachers(store, replace(manifest, tasks=moved), SITES, experiment)


def test_teachers_of_another_start_are_refused(tmp_path, manifest):
    _write(tmp_path, manifest, manifest.names("train")[:2])
    lora = LoraSettings(**{**LORA.model_dump(), "start_seed": 1})
    with pytest.raises(AdapterError, match=r"lora\.start_seed=0, this run from 1"):
        read_teachers(tmp_path, manifest, SITES, EXPERIMENT.model_copy(update={"lora": lora}))


def test_a_teacher_changed_since_it_was_trained_is_refused(tmp_path, manifest):
    name = manifest.names("train")[0]
    _write(tmp_path, manifest, [name])
    index = json.loads((tmp_path / "index.json").read_text())
    index["teachers"][name]["sha256"] = "0" * 64
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(AdapterError, match="not what was trained"):
        read_teachers(tmp_path, manifest, SITES, EXPERIMENT)
