"""The training loop on spawned ranks: the same losses whatever is sharded, offloaded or cut.

The backbone is read from files, so that stage 3 shards it while it is read.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from tagi_ray import checkpoint
from tagi_ray.config import Experiment
from tagi_ray.families import load_backbone
from tagi_ray.model import build_model
from tagi_ray.report import read_records
from tagi_ray.stages import Kind, StageSpec, build_stage
from tagi_ray.train_loop import Worker, run_stage
from tests.ray.ranks import on_ranks
from tests.tiny_run import stage_of, tiny_experiment, tiny_run, write_random_teachers

pytestmark = pytest.mark.slow

FLOAT32 = 1e-4
"""Relative difference of losses in float32: the order of sums differs."""
BFLOAT16 = 2e-2
"""Of losses with a bfloat16 backbone: its numbers have 8 bits."""

KINDS: tuple[Kind, ...] = ("teachers", "metatrain", "finetune")
SHARDINGS: dict[str, dict[str, Any]] = {
    **{f"stage {stage}": {"zero_stage": stage} for stage in range(4)},
    "stage 2, optimiser offloaded": {"zero_stage": 2, "offload_optimizer": True},
    "stage 3, all offloaded": {
        "zero_stage": 3, "offload_optimizer": True, "offload_parameters": True
    },
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A stage of a run of its own."""

    name: str
    kind: Kind
    resources: Mapping[str, Any]
    backbone: Mapping[str, Any]
    micro_groups: int = 2
    fusion: Mapping[str, Any] = field(default_factory=lambda: {"kind": "concat"})
    """Cross-attention has a test of its own."""
    hypernetwork: Mapping[str, Any] = field(default_factory=dict[str, Any])


def experiment_of(folder: Path, case: Case, workers: int) -> Experiment:
    base = tiny_experiment(
        folder, taught=True, steps=4, log_every=1, save_every=0, micro_groups=case.micro_groups,
        valid_groups=5,  # two ranks have 3 and 2 of them, 2 batches and 1
    )  # fmt: skip
    values = base.model_dump(mode="json")
    values["backbone"] = {"path": str(folder / "backbone"), "tokenizer": "train", **case.backbone}
    values["backbone"]["tokenizer_vocabulary"] = 512
    values["resources"] = {"workers": workers, **case.resources}
    values["fusion"] = dict(case.fusion)
    values["hypernetwork"].update(case.hypernetwork)
    return Experiment.model_validate(values)


def begin(folder: Path, case: Case) -> StageSpec:
    """Return the stage of a case in a run folder of its own; all ranks call this."""
    world = dist.get_world_size()
    run = folder / f"{case.name}_on_{world}".replace(" ", "_").replace(",", "")
    if dist.get_rank() == 0:
        shutil.copytree(folder / "prepared", run)
    dist.barrier()
    return stage_of(experiment_of(folder, case, world), run, case.kind)


def train(folder: Path, case: Case) -> dict[str, Tensor]:
    spec = begin(folder, case)
    run_stage(spec, Worker(dist.get_rank(), dist.get_world_size()))
    if dist.get_rank():
        return {}
    records = [
        r for r in read_records(spec.run_folder / "metrics.jsonl") if r["stage"] == spec.name
    ]
    newest = checkpoint.latest(spec.checkpoints)
    assert newest is not None
    weights = load_file(newest / checkpoint.STATE)
    losses = torch.tensor([record["loss"] for record in records])
    return {"losses": losses, **{k: v for k, v in weights.items() if k.startswith("model.")}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared run, and its backbone as files."""
    return prepared(tmp_path_factory.mktemp("sharded"), layers=1)


@pytest.fixture(scope="module")
def folder_of_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with two blocks, which can share a module."""
    return prepared(tmp_path_factory.mktemp("sharded"), layers=2)


def prepared(folder: Path, layers: int) -> Path:
    random = tiny_experiment(folder, taught=True)
    assert random.backbone.architecture is not None
    shape = random.backbone.architecture.model_copy(update={"layers": layers})
    backbone_of_layers = random.backbone.model_copy(update={"architecture": shape})
    random = random.model_copy(update={"backbone": backbone_of_layers})
    run = tiny_run(random)
    backbone = load_backbone(random.backbone, random.lora, run / "tokenizer")
    backbone.model.save_pretrained(folder / "backbone")
    case = Case("", "finetune", {}, {})
    write_random_teachers(experiment_of(folder, case, 1), run)
    run.rename(folder / "prepared")
    return folder


def results(folder: Path, cases: list[Case]) -> dict[tuple[str, int], dict[str, Tensor]]:
    return {
        (case.name, world): result
        for world in (1, 2)
        for case, result in zip(cases, on_ranks(world, folder, train, cases), strict=True)
    }


@pytest.mark.parametrize("kind", KINDS)
def test_losses_do_not_depend_on_ranks_stage_or_offloading(folder: Path, kind: Kind) -> None:
    cases = [Case(f"{kind} {name}", kind, resources, {}) for name, resources in SHARDINGS.items()]
    cases.append(
        Case(
            f"{kind} recomputed, not accumulated", kind, {"zero_stage": 3},
            {"activation_checkpointing": True}, 1,
        )
    )  # fmt: skip
    found = results(folder, cases)
    expected = found[cases[0].name, 1]
    assert expected["losses"][-1] < expected["losses"][0]
    for name, result in found.items():
        torch.testing.assert_close(
            result["losses"], expected["losses"], rtol=FLOAT32, atol=0, msg=str(name)
        )
        assert result.keys() == expected.keys(), name
        for key, weight in expected.items():
            assert result[key].numel(), (name, key)
            torch.testing.assert_close(
                result[key], weight, rtol=1e-2, atol=2e-4, msg=f"{name} {key}"
            )


@pytest.mark.parametrize("shared", [False, True])
def test_cross_attention_learns_the_same_on_all_ranks_and_stages(
    folder_of_two: Path, shared: bool
) -> None:
    fusion = {"kind": "cross_attention+concat", "shared": shared, "low_rank": 4}
    settings: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"zero_stage": 0}, {}),
        ({"zero_stage": 2}, {"activation_checkpointing": True}),
        ({"zero_stage": 3}, {}),
        ({"zero_stage": 3}, {"activation_checkpointing": True}),
        ({"zero_stage": 3, "offload_optimizer": True, "offload_parameters": True}, {}),
        ({"zero_stage": 3}, {"activation_checkpointing": True, "dtype": "bfloat16"}),
    ]
    cases = [
        Case(f"fusion {shared} {number}", "finetune", *one, fusion=fusion)
        for number, one in enumerate(settings)
    ]
    found = results(folder_of_two, cases)
    expected = found[cases[0].name, 1]
    learnt = {key: weight for key, weight in expected.items() if ".fusion." in key}
    assert len(learnt) == (6 + 2 if shared else 2 * 6)
    assert all(weight.any() for weight in learnt.values())
    for name, result in found.items():
        rounded = name[0] == cases[-1].name
        torch.testing.assert_close(
            result["losses"], expected["losses"], rtol=BFLOAT16 if rounded else FLOAT32, atol=0,
            msg=str(name),
        )  # fmt: skip
        for key, weight in ({} if rounded else learnt).items():
            torch.testing.assert_close(
                result[key], weight, rtol=1e-2, atol=2e-4, msg=f"{name} {key}"
            )


def test_virtual_tokens_learn_the_same_on_all_ranks_and_stages(folder_of_two: Path) -> None:
    settings: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"zero_stage": 0}, {}),
        ({"zero_stage": 2}, {"activation_checkpointing": True}),
        ({"zero_stage": 3}, {}),
        ({"zero_stage": 3}, {"activation_checkpointing": True}),
        ({"zero_stage": 3, "offload_optimizer": True, "offload_parameters": True}, {}),
    ]
    tokens = {"generator": "prefix", "capacity": 3}
    cases = [
        Case(f"prefix {n}", "finetune", *one, fusion={"kind": "none"}, hypernetwork=tokens)
        for n, one in enumerate(settings)
    ]
    found = results(folder_of_two, cases)
    expected = found[cases[0].name, 1]
    experiment = experiment_of(folder_of_two, cases[0], 1)
    start = build_model(experiment, folder_of_two / "prepared" / "tokenizer", "hypernetwork", 0)
    moved = expected["model.hypernetwork.prefix_L2HIE"] - start.hypernetwork.prefix_L2HIE
    assert (moved.flatten(2).abs().amax(2) > 2e-3).all()
    for name, result in found.items():
        assert {k for k in result if k != "losses"} == {"model.hypernetwork.prefix_L2HIE"}
        for key, value in expected.items():
            torch.testing.assert_close(result[key], value, rtol=FLOAT32, atol=2e-4, msg=str(name))


@pytest.mark.parametrize("kind", KINDS)
def test_losses_in_bfloat16_do_not_depend_on_ranks_or_stage(folder: Path, kind: Kind) -> None:
    exact = Case(f"{kind} float32 beside", kind, {}, {})
    cases = [
        Case(f"{kind} bfloat16 {stage}", kind, {"zero_stage": stage}, {"dtype": "bfloat16"})
        for stage in range(4)
    ]
    found = results(folder, [exact, *cases])
    for name, result in found.items():
        torch.testing.assert_close(
            result["losses"], found[exact.name, 1]["losses"], rtol=BFLOAT16, atol=0, msg=str(name)
        )
    assert not torch.equal(found[cases[0].name, 1]["losses"], found[exact.name, 1]["losses"]), (
        "this was no bfloat16"
    )


def held(folder: Path, case: Case) -> dict[str, Tensor]:
    """Elements of the backbone that a rank holds after its stage is built, and dtype sizes."""
    spec = begin(folder, case)
    stage = build_stage(spec, torch.device("cpu"))
    frozen: Any = stage.engine
    parameters = [*frozen._engine.module.model.backbone.parameters()]
    shards = [getattr(p, "ds_tensor", p) for p in parameters]
    stage.engine.close()
    whole = sum(getattr(p, "ds_numel", p.numel()) for p in parameters)
    return {
        "elements": torch.tensor([sum(shard.numel() for shard in shards), whole]),
        "bytes": torch.tensor({shard.element_size() for shard in shards}.pop()),
    }


def test_stage_3_leaves_each_rank_its_share_of_the_frozen_backbone(folder: Path) -> None:
    cases = [
        Case(f"held {dtype}", "finetune", {"zero_stage": 3}, {"dtype": dtype})
        for dtype in ("float32", "bfloat16")
    ]
    for case, size, result in zip(cases, (4, 2), on_ranks(2, folder, held, cases), strict=True):
        share, whole = result["elements"].tolist()
        assert whole / 2 <= share < whole / 2 * 1.02, case.name
        assert result["bytes"] == size
