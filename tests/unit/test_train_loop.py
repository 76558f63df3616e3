"""The training loop in this process, without Ray: resuming, validation, refusals."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tagi_ray import checkpoint, history, objectives, train_loop
from tagi_ray.config import Experiment
from tagi_ray.encoder_decoder import EncoderDecoder
from tagi_ray.errors import AdapterError, CheckpointError, TrainingError
from tagi_ray.report import read_records
from tagi_ray.shards import read_manifest
from tagi_ray.stages import Kind, StageSpec, fingerprint, trained_bank
from tagi_ray.teachers import write_teachers
from tagi_ray.train_loop import Worker, run_stage
from tagi_ray.zero import ZeroEngine
from tests.tiny_run import (
    STAGE,
    stage_of,
    tiny_experiment,
    tiny_run,
    trained,
    write_random_teachers,
)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return tiny_run(tiny_experiment(tmp_path_factory.mktemp("runs")))


@pytest.fixture
def run(prepared: Path, tmp_path: Path) -> Path:
    shutil.copytree(prepared, tmp_path / "tiny")
    return tmp_path / "tiny"


def spec_of(run: Path, kind: Kind = "finetune", **changes: object) -> StageSpec:
    return stage_of(tiny_experiment(run.parent, **changes), run, kind)


class Killed(Exception):
    pass


def killed_at(step: int) -> Worker:
    def report(record: dict) -> None:
        if record["step"] == step:
            raise Killed

    return Worker(report=report)


@pytest.mark.parametrize("kind", ["finetune", "metatrain", "teachers"])
def test_killed_run_continues_as_if_undisturbed(run: Path, tmp_path: Path, kind: Kind) -> None:
    other = tmp_path / "other" / "tiny"
    shutil.copytree(run, other)
    whole, broken = spec_of(other, kind, valid_every=4), spec_of(run, kind, valid_every=4)
    run_stage(whole, Worker())
    for step in (4, 6):
        with pytest.raises(Killed):
            run_stage(broken, killed_at(step))
        # What was logged after the checkpoint belongs to steps that will be done again.
        late = {"stage": broken.name, "seed": 0, "step": step + 1, "loss": 99.0}
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(late) + '\n{"stage": "fine')
    run_stage(broken, Worker())
    expected, actual = trained(whole), trained(broken)
    assert actual["records"] == expected["records"]
    assert [record["step"] for record in actual["records"]] == [2, 4, 6, 8]
    assert actual["tensors"].keys() == expected["tensors"].keys()
    for name, tensor in expected["tensors"].items():
        assert torch.equal(actual["tensors"][name], tensor), name


def test_training_lowers_the_loss_and_moves_nothing_frozen(run: Path) -> None:
    spec = spec_of(run, steps=60, log_every=10)
    run_stage(spec, Worker())
    result = trained(spec)
    losses = [record["loss"] for record in result["records"]]
    assert losses[-1] < losses[0] - 0.1
    names = {key for key in result["tensors"] if key.startswith("model.")}
    assert names
    assert not any("backbone" in name for name in names)


def test_best_in_validation_is_kept(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_of(run, valid_every=1, save_every=1)
    losses = iter([5.0, 4.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])
    monkeypatch.setattr(train_loop, "_validate", lambda *arguments: next(losses))
    run_stage(spec, Worker())
    assert checkpoint.steps(spec.checkpoints) == [3, 7, 8]
    newest = checkpoint.latest(spec.checkpoints)
    assert newest is not None
    assert checkpoint.best(newest).name == "step_00000003"
    assert checkpoint.best_loss(newest) == 3.0


def test_validation_does_not_disturb_training(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / "tiny"
    shutil.copytree(run, other)
    often, seldom = spec_of(run, valid_every=1), spec_of(other)
    run_stage(often, Worker())
    run_stage(seldom, Worker())
    for name, tensor in trained(seldom)["tensors"].items():
        assert torch.equal(trained(often)["tensors"][name], tensor), name


def test_finished_stage_returns_at_once(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_of(run)
    run_stage(spec, Worker())
    monkeypatch.setattr(train_loop, "build_stage", None)
    monkeypatch.setattr(checkpoint, "load_file", None)  # its tensors are not needed to see that
    run_stage(spec, Worker())
    assert history.is_done(spec, fingerprint(spec))


def test_what_is_not_finite_is_never_written(run: Path) -> None:
    wild = {"learning_rate": 1e30, "warmup_fraction": 0.0}
    spec = spec_of(run, "metatrain", save_every=1, log_every=1, optimizer=wild)
    with pytest.raises(TrainingError, match=r"is nan at step 2.*lower the rate"):
        run_stage(spec, Worker())
    for record in read_records(run / "metrics.jsonl"):
        assert all(value == value for value in record.values())
    for step in checkpoint.steps(spec.checkpoints):
        tensors, _ = checkpoint.load(checkpoint.path_of(spec.checkpoints, step))
        assert all(tensor.isfinite().all() for tensor in tensors.values())


def test_loss_that_is_not_finite_stops_before_the_update(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = objectives.cross_entropy
    monkeypatch.setattr(objectives, "cross_entropy", lambda *given: original(*given) * float("nan"))
    monkeypatch.setattr(ZeroEngine, "step", None)
    with pytest.raises(TrainingError, match="loss is nan, cross_entropy is nan at step 1"):
        run_stage(spec_of(run), Worker())


def test_other_settings_cannot_continue_but_other_reporting_can(run: Path) -> None:
    with pytest.raises(Killed):
        run_stage(spec_of(run), killed_at(4))
    with pytest.raises(CheckpointError, match="other settings"):
        run_stage(spec_of(run, instances=1), Worker())
    run_stage(spec_of(run, log_every=1, micro_groups=4), Worker())


def with_teachers(experiment: Experiment) -> Experiment:
    settings = experiment.teachers.model_copy(update={"enabled": True})
    return experiment.model_copy(update={"teachers": settings})


def test_trained_teachers_reach_the_finetuning(run: Path) -> None:
    spec = spec_of(run, "teachers", steps=20)
    run_stage(spec, Worker())
    state = trained(spec)["tensors"]
    bank = trained_bank(state, spec.experiment)
    assert bank.slots == len(spec.slots)
    assert all(factor.abs().sum() > 0 for factor in bank.b.values())
    student = replace(spec_of(run), experiment=with_teachers(spec.experiment))
    with pytest.raises(AdapterError, match="train the teachers first"):
        run_stage(student, Worker())
    folder = run / "teachers"
    write_teachers(
        folder,
        bank,
        spec.slots,
        spec.experiment,
        role="train",
        steps=20,
        final_loss=1.0,
        manifest=read_manifest(run / "shards"),
    )
    run_stage(student, Worker())
    assert any(record["kl"] > 0 for record in trained(student)["records"])


def test_validation_without_teachers_runs_no_teacher(run: Path) -> None:
    spec = spec_of(run, taught=True, valid_every=8)
    write_random_teachers(spec.experiment, run)
    kinds: list[bool] = []
    original = EncoderDecoder.logits

    def counted(self: EncoderDecoder, *given: Any) -> torch.Tensor:
        kinds.append(torch.is_grad_enabled())
        return original(self, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EncoderDecoder, "logits", counted)
        run_stage(spec, Worker())
    settings = spec.settings
    students = settings.steps * settings.groups // settings.micro_groups
    # Without gradient run a teacher beside each student, at most, and the student in validation.
    validated = -(-settings.valid_groups // settings.micro_groups)
    assert kinds.count(True) == students
    assert kinds[-validated:] == [False] * validated
    assert kinds[-validated - 1]
    last = trained(spec)["records"][-1]
    assert last["kl"] > 0
    assert last["alignment"] > 0


def test_cut_texts_and_wrapped_instances_are_told(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def records(kind: Kind, instances: int, **limits: int) -> list[dict]:
        spec = spec_of(run, kind, instances=instances)
        data = spec.experiment.data.model_copy(update={"max_prompt_tokens": 4096, **limits})
        spec = replace(spec, experiment=spec.experiment.model_copy(update={"data": data}))
        run_stage(spec, Worker())
        return trained(spec)["records"]

    with caplog.at_level("INFO"):
        whole = records("teachers", 2, max_target_tokens=4096)
        assert not any("cut_texts" in record for record in whole)
        assert "second time" not in caplog.text
        # A target of one token is nothing but its end.
        cut = records("metatrain", 3, max_target_tokens=1)
    per_record = STAGE["log_every"] * STAGE["groups"] * 3
    assert [record["cut_texts"] for record in cut] == [per_record] * 4
    # A bucket of 8 instances is drawn in 3 groups of 3.
    buckets = len(read_manifest(run / "shards").splits["train"].count)
    assert f"draws {buckets} of its instances a second time" in caplog.text
