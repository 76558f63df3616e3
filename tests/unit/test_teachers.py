"""The store of teachers, and that nothing that trains can read the oracle's."""

import json
from pathlib import Path

import pytest

from tagi_ray.config import DataSettings, Experiment, LoraSettings
from tagi_ray.errors import AdapterError, DataError
from tagi_ray.shard_writer import write_shards
from tagi_ray.shards import Manifest, read_manifest
from tagi_ray.teachers import finished, read_teachers, teacher_names, write_teachers
from tests.models import LORA, fill, random_backbone

DATA = DataSettings(train_instances=4, test_instances=2, oracle_instances=2)
EXPERIMENT = Experiment(name="any", data=DATA, lora=LORA)
SITES = random_backbone().sites


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Manifest:
    folder = tmp_path_factory.mktemp("data") / "shards"
    write_shards(DATA, folder, 0, parallel=False)
    return read_manifest(folder)


def _write(folder: Path, names, role="train", experiment=EXPERIMENT) -> None:
    bank = fill(SITES, len(names))
    write_teachers(folder, bank, names, experiment, role=role, steps=5, final_loss=0.5)


def test_a_store_reads_back_what_was_written_with_a_slot_for_each_task(tmp_path, manifest):
    names = teacher_names(manifest, "train", "task")
    assert len(names) == 92
    _write(tmp_path / "teachers", names[:3])
    bank, slots = read_teachers(tmp_path / "teachers", manifest, SITES, EXPERIMENT)
    assert slots == {names[0]: 0, names[1]: 1, names[2]: 2}
    written = fill(SITES, 3)
    assert all((bank.a[name] == written.a[name]).all() for name in bank.a)
    assert finished(tmp_path / "teachers")[names[0]].steps == 5


def test_a_category_teacher_serves_all_tasks_of_its_category(tmp_path, manifest):
    teaching = EXPERIMENT.teachers.model_copy(update={"per": "category"})
    experiment = EXPERIMENT.model_copy(update={"teachers": teaching})
    names = teacher_names(manifest, "train", "category")
    assert len(names) == 6
    _write(tmp_path / "teachers", names, experiment=experiment)
    _, slots = read_teachers(tmp_path / "teachers", manifest, SITES, experiment)
    assert slots.keys() == set(manifest.names("train"))
    assert all(names[slot] == manifest.tasks[task].category for task, slot in slots.items())


def test_training_refuses_oracle_teachers_by_role_by_folder_and_by_task(tmp_path, manifest):
    held_out = teacher_names(manifest, "oracle", "task")
    assert len(held_out) == 20
    _write(tmp_path / "oracle_teachers", held_out[:1], role="oracle")
    with pytest.raises(DataError, match="oracle teachers"):
        read_teachers(tmp_path / "oracle_teachers", manifest, SITES, EXPERIMENT)
    (tmp_path / "oracle_teachers").rename(tmp_path / "teachers")
    with pytest.raises(DataError, match="oracle teachers"):
        read_teachers(tmp_path / "teachers", manifest, SITES, EXPERIMENT)
    index = tmp_path / "teachers" / "index.json"
    index.write_text(index.read_text().replace('"oracle"', '"train"'))
    with pytest.raises(DataError, match=f"held-out task '{held_out[0]}'"):
        read_teachers(tmp_path / "teachers", manifest, SITES, EXPERIMENT)
    _write(tmp_path / "other" / "oracle_teachers", manifest.names("train")[:1])
    with pytest.raises(DataError, match="oracle teachers"):
        read_teachers(tmp_path / "other" / "oracle_teachers", manifest, SITES, EXPERIMENT)


def test_teachers_of_another_start_are_refused(tmp_path, manifest):
    _write(tmp_path, manifest.names("train")[:2])
    lora = LoraSettings(**{**LORA.model_dump(), "start_seed": 1})
    with pytest.raises(AdapterError, match="lora.start_seed=0, this run from 1"):
        read_teachers(tmp_path, manifest, SITES, EXPERIMENT.model_copy(update={"lora": lora}))


def test_a_teacher_changed_since_it_was_trained_is_refused(tmp_path, manifest):
    name = manifest.names("train")[0]
    _write(tmp_path, [name])
    index = json.loads((tmp_path / "index.json").read_text())
    index["teachers"][name]["sha256"] = "0" * 64
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(AdapterError, match="not what was trained"):
        read_teachers(tmp_path, manifest, SITES, EXPERIMENT)
