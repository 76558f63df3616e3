"""Which parts trials share, and how a trial's folder comes to hold them."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tagi_ray import recipes, shared_runs
from tagi_ray.config import Experiment
from tagi_ray.errors import ConfigError
from tagi_ray.recipes.yaml_source import inline
from tagi_ray.shared_runs import Maker, link_parts, parts, trial_run
from tagi_ray.space import METHOD
from tagi_ray.stages import StageSpec

PRETRAINED = ["pretrain.enabled=true", "pretrain.path=demo"]
SWEEP = Path("/shared/demo_mine")


def base(*overrides: str) -> Experiment:
    return recipes.load("demo", [*PRETRAINED, *overrides])


def trial(*changes: str, folder: str = "one", of: Experiment | None = None) -> Experiment:
    told = dict(change.split("=", 1) for change in changes)
    return trial_run(of or base(), SWEEP, folder, told, (3, 4))


def made_of(*changes: str, of: Experiment | None = None) -> dict[str, Experiment]:
    whole = of or base()
    return {**parts(whole, SWEEP, trial(*changes, of=whole))}


def names_of(*changes: str, of: Experiment | None = None) -> dict[str, str]:
    return {part: run.name for part, run in made_of(*changes, of=of).items()}


def test_a_trial_is_a_run_with_the_changes_and_the_method_alone():
    run = trial("distillation.lambda_kl=2", "lora.targets=[q, v]", folder="0a1b_00003")
    assert (run.storage, run.name) == ("/shared/demo_mine/trials", "0a1b_00003")
    assert (run.distillation.lambda_kl, run.lora.targets) == (2.0, ("q", "v"))
    assert (run.seeds, run.evaluation.systems) == ((3, 4), (METHOD,))
    assert run.finetune == base().finetune


@pytest.mark.parametrize("folder", ["1e4", "12", "true", "1e5_00000"])
def test_a_trials_name_is_a_name_whatever_it_looks_like(folder):
    assert trial(folder=folder).name == folder


def test_changes_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match=r"lora\.rank=0 should be greater than 0"):
        trial("lora.rank=0")


def test_every_part_is_a_run_of_its_own_in_the_sweeps_folder():
    made = made_of()
    assert list(made) == ["data", "teachers", "pretrained"]
    assert {run.storage for run in made.values()} == {"/shared/demo_mine/shared"}
    assert len({run.name for run in made.values()}) == 3
    assert made["teachers"].name.startswith("teachers_rank_16_")
    for run in made.values():
        assert recipes.changed(run, []) == run  # and could be given to a job
        assert (run.seeds, run.evaluation.systems) == ((3,), (METHOD,))


def test_what_is_not_enabled_is_not_made():
    assert list(names_of(of=recipes.load("demo"))) == ["data", "teachers"]
    untaught = recipes.load("demo", ["teachers.enabled=false"])
    assert list(names_of(of=untaught)) == ["data"]
    assert list(names_of("teachers.enabled=false")) == ["data", "pretrained"]
    without = base("variants.tagi.pretrain.enabled=false")
    assert list(names_of(of=without)) == ["data", "teachers"]


DATA = ["data.train_instances=64", "data.valid_fraction=0.2", "pretrain.steps=7"]
BACKBONE = ["backbone.dtype=bfloat16"]
ADAPTERS = ["lora.rank=4", "lora.alpha=8", "lora.targets=[q, v]", "lora.start_seed=1"]
TEACHERS = ["teachers.steps=7", "teachers.optimizer.learning_rate=1e-3"]
MODEL = ["hypernetwork.width=64", "hypernetwork.capacity=8", "fusion.kind=concat"]
FINETUNING = [
    "distillation.lambda_kl=0.5",
    "distillation.lambda_ins=0.2",
    "distillation.temperature=2",
    "finetune.optimizer.learning_rate=1e-4",
    "finetune.valid_groups=4",
]
CHANGED = [
    *((change, {"data", "teachers", "pretrained"}) for change in [*DATA, *BACKBONE]),
    *((change, {"teachers", "pretrained"}) for change in ADAPTERS),
    *((change, {"teachers"}) for change in TEACHERS),
    *((change, {"pretrained"}) for change in MODEL),
    *((change, set()) for change in FINETUNING),
]


@pytest.mark.parametrize(("change", "others"), CHANGED)
def test_trials_share_every_part_that_does_not_depend_on_what_they_differ_in(change, others):
    own, other = names_of(), names_of(change)
    assert {part for part in own if own[part] != other[part]} == others


def test_trials_that_differ_in_what_no_part_reads_share_the_same_runs():
    assert made_of(*FINETUNING) == made_of()


def test_each_rank_has_its_teachers():
    for rank in (4, 8, 16):
        teachers = made_of(f"lora.rank={rank}")["teachers"]
        assert teachers.lora.rank == rank
        assert teachers.name.startswith(f"teachers_rank_{rank}_")


def test_names_of_parts_stay_what_they_are():
    again = trial(folder="another").model_copy(update={"seeds": (3,)})
    assert {part: run.name for part, run in parts(base(), SWEEP, again).items()} == names_of()
    # The same value, written otherwise.
    assert names_of("lora.alpha=32.0") == names_of("lora.alpha=3.2e1") == names_of()


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    return tmp_path / "demo_mine"


def linked(sweep: Path, whole: Experiment) -> tuple[Experiment, dict[Any, Experiment]]:
    """A trial with links to parts that hold a file each."""
    run = trial_run(whole, sweep, "one", {}, (3,))
    made = parts(whole, sweep, run)
    contents = {
        "data": ["shards/manifest.json", "tokenizer/tokenizer.json"],
        "teachers": ["teachers/a"],
        "pretrained": ["seed_3/pretrain_tagi/checkpoints/a"],
    }
    for part, shared in made.items():
        for name in contents[part]:
            path = Path(shared.storage) / shared.name / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(part)
    link_parts(run, made)
    return run, made


def test_a_trial_reads_the_parts_through_relative_links(sweep):
    run, made = linked(sweep, base())
    folder = sweep / "trials" / "one"
    assert (folder / "shards" / "manifest.json").read_text() == "data"
    assert (folder / "tokenizer" / "tokenizer.json").read_text() == "data"
    assert (folder / "teachers" / "a").read_text() == "teachers"
    pretrained = StageSpec(run, "finetune", folder, 3).pretrained
    assert pretrained
    assert (pretrained.checkpoints / "a").read_text() == "pretrained"
    links = [path for path in folder.rglob("*") if path.is_symlink()]
    assert len(links) == 4
    assert not any(os.path.isabs(os.readlink(link)) for link in links)
    link_parts(run, made)  # once more changes nothing
    moved = sweep.rename(sweep.with_name("elsewhere"))
    assert (moved / "trials" / "one" / "teachers" / "a").read_text() == "teachers"


def test_without_teachers_and_pretraining_there_are_links_to_the_data_alone(sweep):
    linked(sweep, recipes.load("demo", ["teachers.enabled=false"]))
    assert sorted(path.name for path in (sweep / "trials" / "one").iterdir()) == [
        "shards",
        "tokenizer",
    ]


def test_the_corpus_is_linked_where_there_is_one(sweep):
    run = trial_run(base(), sweep, "one", {}, (3,))
    made = {"data": parts(base(), sweep, run)["data"]}
    shared = Path(made["data"].storage) / made["data"].name
    link_parts(run, {**made})
    assert not (sweep / "trials" / "one" / "corpus").is_symlink()
    (shared / "corpus").mkdir(parents=True)
    (shared / "corpus" / "manifest.json").write_text("{}")
    link_parts(run, {**made})
    assert (sweep / "trials" / "one" / "corpus" / "manifest.json").read_text() == "{}"


def test_pretrained_weights_may_be_those_of_another_variant_with_the_same_model(sweep):
    variants = inline({"plain": {"distillation": {"lambda_kl": 0}}, "tagi": {}})
    run = trial_run(base(f"variants={variants}"), sweep, "one", {}, (3,))
    pretrained = StageSpec(run, "finetune", sweep / "trials" / "one", 3, METHOD).pretrained
    assert pretrained
    linked(sweep, base(f"variants={variants}"))
    assert pretrained.checkpoints.parent.is_symlink()


@pytest.fixture
def maker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Maker:
    monkeypatch.chdir(tmp_path)  # where it goes itself, and comes back from
    return Maker(str(tmp_path))


def test_a_part_is_made_once_whoever_asks(maker, monkeypatch):
    asked: list[str] = []
    monkeypatch.setattr(shared_runs, "make", lambda part, run, made: asked.append(run.name))
    made = made_of()
    other = made_of("lora.rank=4")["teachers"]

    async def ask() -> None:
        runs = [made["teachers"], other, made["teachers"], made["teachers"]]
        await asyncio.gather(*(maker.make("teachers", run, {}) for run in runs))
        await maker.make("teachers", other, {})

    asyncio.run(ask())
    assert sorted(asked) == sorted([made["teachers"].name, other.name])


def test_a_part_that_failed_is_made_again(maker, monkeypatch):
    asked: list[str] = []

    def make(part: str, run: Experiment, made: Any) -> None:
        asked.append(part)
        if len(asked) == 1:
            raise RuntimeError("no room")

    monkeypatch.setattr(shared_runs, "make", make)
    run = made_of()["teachers"]

    async def ask() -> list[Any]:
        calls = (maker.make("teachers", run, {}) for _ in range(3))
        return await asyncio.gather(*calls, return_exceptions=True)

    first, *others = asyncio.run(ask())
    assert isinstance(first, RuntimeError)
    assert others == [None, None]
    assert len(asked) == 2


def test_one_process_at_a_time_writes_to_a_trials_folder(maker, monkeypatch):
    monkeypatch.setattr(shared_runs, "CLAIM_SECONDS", 0.01)
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)

    async def ask() -> None:
        await maker.claim("a", "one", child.pid)
        await maker.claim("a", "one", child.pid)  # a trial's next attempt
        await maker.claim("b", "two", os.getpid())
        other = asyncio.create_task(maker.claim("a", "two", os.getpid()))
        await asyncio.sleep(0.1)
        assert not other.done()
        child.communicate()
        await asyncio.wait_for(other, 10)

    try:
        asyncio.run(ask())
    finally:
        child.kill()
        child.wait()
