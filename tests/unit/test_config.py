from __future__ import annotations

import pickle

import pytest
from pydantic import ValidationError

from tagi_ray import errors
from tagi_ray.config import Experiment
from tagi_ray.sections import DataSettings


def experiment(**changes) -> Experiment:
    return Experiment(**{"name": "run", "data": {"oracle_instances": 4}, **changes})


def test_settings_are_frozen_and_closed():
    with pytest.raises(ValidationError, match="frozen"):
        experiment().lora.rank = 3  # type: ignore[misc]
    with pytest.raises(ValidationError, match="Extra inputs"):
        experiment(lora={"rnak": 3})


@pytest.mark.parametrize("name", ["", "../up", "Upper", ".hidden", "a/b", "x" * 65, "a b", "a\n"])
def test_a_name_that_is_no_safe_folder_is_refused(name):
    with pytest.raises(ValidationError, match="can't be a folder name"):
        experiment(name=name)


def test_groups_have_to_fit_workers_and_micro_groups():
    with pytest.raises(ValidationError, match=r"finetune\.groups=16 is not a multiple"):
        experiment(resources={"workers": 3})
    assert experiment(resources={"workers": 2}).resources.workers == 2


@pytest.mark.parametrize(
    ("resources", "message"),
    [
        ({"gpus_per_worker": 1.5}, r"gpus_per_worker=1\.5: a worker has whole GPUs, or a share"),
        (
            {"gpus_per_worker": 0.5, "workers": 2},
            r"gpus_per_worker=0\.5 with resources\.workers=2: .* set resources\.workers=1",
        ),
        ({"gpus_per_worker": -1}, "greater than or equal to 0"),
    ],
)
def test_a_gpu_is_shared_by_runs_and_not_by_the_workers_of_one(resources, message):
    with pytest.raises(ValidationError, match=message):
        experiment(resources=resources)


@pytest.mark.parametrize(("gpus", "workers"), [(0, 2), (0.25, 1), (1, 2), (2.0, 1), (8, 1)])
def test_whole_gpus_and_a_share_of_one_are_welcome(gpus, workers):
    run = experiment(resources={"gpus_per_worker": gpus, "workers": workers})
    assert run.resources.gpus_per_worker == gpus


def test_several_conflicts_are_told_together():
    with pytest.raises(ValidationError) as caught:
        Experiment.model_validate(
            {
                "name": "run",
                "data": {"oracle_instances": 0},
                "finetune": {"groups": 9},
                "evaluation": {"systems": ["teacher", "tagi_adapter"]},
            }
        )
    message = str(caught.value)
    assert "finetune.groups=9" in message
    assert "data.oracle_instances=0" in message
    assert "evaluation.systems asks for 'tagi_adapter': a system is one of" in message


def test_held_out_tasks_are_named_in_one_way():
    with pytest.raises(ValidationError, match="both name the held-out tasks"):
        DataSettings(source="sni", path="x", test_tasks_file="y", test_tasks=("z",))
    assert DataSettings(source="sni", path="x", test_categories=("z",)).path == "x"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.TagiError("a"), 1),
        (errors.ConfigError(["a", "b"]), 2),
        (errors.RunConflictError(["a"]), 2),
        (errors.DataError("a"), 2),
        (errors.AdapterError("a"), 2),
        (errors.CheckpointError("a"), 1),
        (errors.TrainingError("a"), 1),
    ],
)
def test_errors_survive_pickling(error, code):
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert copy.exit_code == code


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teachers": {"optimizer": {"name": "adafactor"}}}, r"teachers\.optimizer.*adamw alone"),
        ({"oracle": {"optimizer": {"name": "adafactor"}}}, r"oracle\.optimizer.*adamw alone"),
        ({"hypernetwork": {"width": 30, "heads": 4}}, "width=30 is not a multiple"),
        ({"resources": {"zero_stage": 4}}, "0, 1, 2 or 3"),
        ({"pretrain": {"enabled": True}}, r"pretrain\.path is not set: give pretrain\.path=PATH"),
        ({"pretrain": {"instances": 2}}, r"pretrain\.instances=2: a group .* set pretrain\.insta"),
        ({"pretrain": {"path": "http://x/y"}}, r"pretrain\.path=http://x/y: only local paths, s3"),
        (
            {
                "resources": {"zero_stage": 3},
                "pretrain": {"optimizer": {"name": "adafactor"}},
            },
            r"pretrain\.optimizer\.name=adafactor needs resources\.zero_stage=0, not 3",
        ),
        (
            {"resources": {"zero_stage": 1}, "finetune": {"optimizer": {"name": "adafactor"}}},
            r"finetune\.optimizer\.name=adafactor needs resources\.zero_stage=0, not 1",
        ),
        (
            {"resources": {"zero_stage": 2}, "metatrain": {"optimizer": {"name": "adafactor"}}},
            r"metatrain\.optimizer\.name=adafactor needs resources\.zero_stage=0, not 2",
        ),
        (
            {
                "backbone": {"dtype": "bfloat16"},
                "metatrain": {"optimizer": {"name": "adafactor"}},
            },
            r"metatrain\.optimizer\.name=adafactor needs backbone\.dtype=float32",
        ),
        ({"lora": {"targets": []}}, "at least 1 item"),
        ({"lora": {"targets": ["q", "v", "q"]}}, "q stands there twice"),
        ({"seeds": []}, "at least 1 item"),
        ({"seeds": [1, 1]}, "1 stands there twice"),
        ({"evaluation": {"systems": []}}, "at least 1 item"),
        ({"evaluation": {"systems": ["tagi", "tagi"]}}, "tagi stands there twice"),
        ({"metatrain": {"learning_rates": []}}, "at least 1 item"),
        ({"metatrain": {"learning_rates": [0.1, 0.1]}}, "0.1 stands there twice"),
        ({"variants": {}}, "variants names none"),
        (
            {"variants": {"tagi": {}, "teacher": {}}},
            "variants.teacher cannot be the name of a system",
        ),
        ({"variants": {"tagi": {}, "tagi_empty": {}}}, "variants.tagi_empty cannot be the name"),
        ({"variants": {"tagi": {}, "A": {}}}, "variants.A cannot be the name"),
        (
            {"variants": {"tagi": {}, "x": {"fusion": {"kindd": "none"}}}},
            "variants.x: kindd: Extra inputs are not permitted",
        ),
        (
            {
                "variants": {"tagi": {"hypernetwork": {"generator": "none"}}},
                "fusion": {"kind": "concat"},
            },
            "generator=none and fusion.kind=concat leave nothing to train",
        ),
        (
            {"variants": {"tagi": {"pretrain": {"enabled": True}}}},
            "set pretrain.enabled=true for the run",
        ),
        ({"fusion": {"kind": "concat", "shared": True}}, "fusion.shared would not be read"),
        (
            {"backbone": {"architecture": {"family": "llama", "heads": 6, "kv_heads": 4}}},
            "is not a multiple of backbone.architecture.kv_heads=4",
        ),
    ],
)
def test_what_could_only_fail_later_is_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        experiment(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"oracle": {"enabled": False}}, "Extra inputs"),
        ({"teachers": {"valid_every": 5}}, r"teachers\.valid_every would not be read"),
        ({"oracle": {"valid_groups": 5}}, r"oracle\.valid_groups would not be read"),
        (
            {"metatrain": {"optimizer": {"learning_rate": 0.5}}},
            r"would not be read: set metatrain\.learning_rates=\[0\.5\]",
        ),
        ({"data": {"path": "x"}}, r"data\.path would not be read"),
        (
            {"data": {"source": "sni", "path": "x", "test_tasks": ["y"], "revision": "main"}},
            r"data\.revision would not be read: only data\.source=hub",
        ),
        (
            {"data": {"subset": "a", "hub_split": "valid"}},
            r"data\.subset and data\.hub_split would not be read: only data\.source=hub",
        ),
        (
            {"data": {"source": "records", "path": "http://x/y", "test_tasks": ["y"]}},
            r"data\.path=http://x/y: only local paths, s3:// and gs:// are read",
        ),
        (
            {"data": {"source": "sni", "path": "x", "test_tasks_file": "hdfs://x"}},
            r"data\.test_tasks_file=hdfs://x: only local paths",
        ),
        (
            {"data": {"source": "hub", "path": "s3://x/y", "test_tasks": ["y"]}},
            r"data\.path=s3://x/y is no id of a hub dataset: give OWNER/NAME",
        ),
        (
            {"data": {"test_tasks": ["x"], "train_tasks_file": "y"}},
            r"data\.train_tasks_file and data\.test_tasks would not be read",
        ),
    ],
)
def test_what_would_not_be_read_is_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        experiment(**changes)
