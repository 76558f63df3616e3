"""What a run's folder holds, when a job may continue it, and what is refused before anything runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import T5Config

from tagi_ray import checkpoint, pipeline
from tagi_ray.architecture import identify
from tagi_ray.config import Experiment
from tagi_ray.errors import ConfigError, RunConflictError
from tagi_ray.pipeline import open_run, trained_weights
from tagi_ray.stages import StageSpec, fingerprint
from tagi_ray.train_loop import Worker, run_stage
from tests.models import random_t5
from tests.tiny_run import tiny_experiment, tiny_run


def changed(experiment: Experiment, section: str, **fields: Any) -> Experiment:
    old = getattr(experiment, section)
    return experiment.model_copy(update={section: old.model_copy(update=fields)})


@pytest.fixture
def on_t5(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Experiment:
    """An experiment on a T5 in a folder, named by a relative path, with the demo's tokenizer."""
    monkeypatch.chdir(tmp_path)
    random_t5().save_pretrained("t5")
    files = {"path": "t5", "tokenizer": "demo", "architecture": None}
    return changed(tiny_experiment(tmp_path), "backbone", **files)


def test_relative_paths_become_absolute_for_workers_that_start_elsewhere(
    on_t5: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tasks").mkdir()
    # A folder of that name is not what the keyword means.
    (tmp_path / "demo").mkdir()
    given = changed(on_t5, "data", source="records", path="tasks", test_tasks=("a",))
    experiment, run = open_run(given)
    assert experiment.backbone.path == str(tmp_path / "t5")
    assert experiment.backbone.tokenizer == "demo"
    assert experiment.data.path == str(tmp_path / "tasks")
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["backbone"]["path"] == "t5"  # elsewhere the same command is the same run
    assert open_run(given) == (experiment, run)

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert identify(experiment.backbone)["weights"].startswith("sha256:")
    with pytest.raises(ConfigError, match="t5 is no folder here"):
        identify(given.backbone)


def test_other_settings_are_refused_and_what_workers_need_may_change(tmp_path: Path) -> None:
    experiment = tiny_experiment(tmp_path)
    open_run(experiment)
    assert [path.name for path in (tmp_path / "tiny").iterdir() if path.name.startswith(".")] == []
    open_run(changed(experiment, "finetune", log_every=1, save_every=1, micro_groups=1))
    open_run(changed(experiment, "resources", workers=2))
    with pytest.raises(RunConflictError, match=r"finetune\.steps: was 8, is 9"):
        open_run(changed(experiment, "finetune", steps=9))


def test_another_backbone_in_the_same_place_is_refused(on_t5: Experiment, tmp_path: Path) -> None:
    _, run = open_run(on_t5)
    before = json.loads((run / "backbone.json").read_text())
    assert before["weights"].startswith("sha256:")
    open_run(on_t5)
    assert json.loads((run / "backbone.json").read_text()) == before
    (tmp_path / "t5" / "model.safetensors").touch()
    open_run(on_t5)  # the files are read again, and are the same
    assert json.loads((run / "backbone.json").read_text())["files"] != before["files"]
    random_t5(seed=1).save_pretrained(tmp_path / "t5")
    with pytest.raises(RunConflictError, match=r"other weights in backbone\.path"):
        open_run(on_t5)


def test_the_backbone_is_part_of_a_stage(tmp_path: Path) -> None:
    experiment = tiny_experiment(tmp_path)
    spec = StageSpec(experiment, "finetune", tiny_run(experiment), 0)
    found = set()
    for weights in ("one", "two"):
        (spec.run_folder / "backbone.json").write_text(json.dumps({"weights": weights}))
        found.add(fingerprint(spec))
    assert len(found) == 2


def test_a_model_of_no_known_family_is_refused_before_a_run_is_made(tmp_path: Path) -> None:
    from transformers import BertConfig

    BertConfig().save_pretrained(tmp_path / "bert")
    (tmp_path / "bert" / "model.safetensors").touch()
    files = {"path": str(tmp_path / "bert"), "architecture": None}
    experiment = changed(tiny_experiment(tmp_path), "backbone", **files)
    with pytest.raises(ConfigError, match=r"type bert: name one of type t5, .*, gpt2"):
        open_run(experiment)
    assert not (tmp_path / "tiny").exists()
    T5Config().save_pretrained(tmp_path / "empty")
    experiment = changed(experiment, "backbone", path=str(tmp_path / "empty"))
    with pytest.raises(ConfigError, match=r"holds no \.safetensors file"):
        open_run(experiment)


@pytest.mark.parametrize("job", ["evaluate", "generate"])
def test_a_mistyped_run_is_named_and_not_made(job: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tiny: there is no such run"):
        getattr(pipeline, job)(tiny_experiment(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_submitted_job_does_not_write_into_its_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    monkeypatch.chdir(copy)
    submitted = {"runtime_env": {"working_dir": "gcs://_ray_pkg_1.zip"}, "metadata": {}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(submitted))
    with pytest.raises(ConfigError, match="storage=runs would be lost"):
        open_run(tiny_experiment(Path("runs")))
    with pytest.raises(ConfigError, match=r"storage=.*copy/runs would be lost"):
        open_run(tiny_experiment(copy / "runs"))
    assert list(copy.iterdir()) == []
    open_run(tiny_experiment(tmp_path))
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": {}}))
    open_run(tiny_experiment(Path("runs")))


def test_storage_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        ConfigError, match=r"storage=.*file: .* cannot be written \(Not a dir"
    ) as one:
        open_run(tiny_experiment(tmp_path / "file"))
    assert "\n" not in str(one.value)


def test_weights_of_a_stage_that_is_not_done_are_refused(tmp_path: Path) -> None:
    experiment = tiny_experiment(tmp_path, save_every=2)
    spec = StageSpec(experiment, "finetune", tiny_run(experiment), 0)
    with pytest.raises(ConfigError, match="finetune_tagi of seed 0 is at step 0 of 8"):
        trained_weights(experiment, spec.run_folder, "tagi", 0)

    class Killed(Exception):
        pass

    def report(record: dict) -> None:
        if record["step"] == 4:
            raise Killed

    with pytest.raises(Killed):
        run_stage(spec, Worker(report=report))
    with pytest.raises(ConfigError, match="finetune_tagi of seed 0 is at step 4 of 8"):
        trained_weights(experiment, spec.run_folder, "tagi", 0)
    run_stage(spec, Worker())
    path = trained_weights(experiment, spec.run_folder, "tagi", 0)
    assert path.name == checkpoint.STATE


def test_several_rates_need_validation_tasks(tmp_path: Path) -> None:
    experiment = changed(tiny_experiment(tmp_path), "metatrain", learning_rates=(1e-4, 1e-3, 1e-2))
    run = tiny_run(experiment)
    assert len(pipeline._metatrain(experiment, run)) == 3
    path = run / "shards" / "manifest.json"
    manifest = json.loads(path.read_text())
    buckets = dict.fromkeys(manifest["splits"]["valid"]["buckets"], ())
    manifest["splits"]["valid"] = {"files": (), "tasks": (), "buckets": buckets}
    path.write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match="has 3 rates, and there is no validation task"):
        pipeline._metatrain(experiment, run)


def test_generate_needs_no_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    experiment = tiny_experiment(tmp_path, steps=1)
    tiny_run(experiment)
    experiment, run = open_run(experiment)
    run_stage(StageSpec(experiment, "finetune", run, 0), Worker())

    def refused(*_: object, **__: object) -> None:
        raise AssertionError("a cluster was asked for")

    monkeypatch.setattr("ray.init", refused)
    folder = pipeline.generate(experiment, instruction="Say it twice .", output=str(tmp_path / "o"))
    assert len(list(folder.glob("instruction_*/adapter_model.safetensors"))) == 1
