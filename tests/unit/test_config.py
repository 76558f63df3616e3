from __future__ import annotations

import pickle

import pytest
from pydantic import ValidationError

from tagi_ray import errors
from tagi_ray.config import DataSettings, Experiment


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


def test_several_conflicts_are_told_together():
    with pytest.raises(ValidationError) as caught:
        Experiment.model_validate(
            {
                "name": "run",
                "finetune": {"groups": 9},
                "evaluation": {"systems": ["teacher", "tagi_adapter_only"]},
            }
        )
    message = str(caught.value)
    assert "finetune.groups=9" in message
    assert "data.oracle_instances=0" in message
    assert "'tagi_adapter_only' is not in variants" in message


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
