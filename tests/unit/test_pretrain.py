"""Pretraining on raw text: how a text is divided, what is minimised, and what finetuning gets."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from tagi_ray import checkpoint, objectives
from tagi_ray.batches import Batch, local_batches
from tagi_ray.config import Experiment
from tagi_ray.errors import ConfigError, RunConflictError
from tagi_ray.groups import _load_tokenizer, division
from tagi_ray.method_sections import DistillationSettings
from tagi_ray.order import OrderPlan
from tagi_ray.pipeline import open_run
from tagi_ray.shards import read_manifest, read_tasks_of
from tagi_ray.stages import (
    Stage,
    StageSpec,
    build_stage,
    fingerprint,
    last_checkpoint,
    trained_state,
)
from tagi_ray.train_loop import Worker, run_stage
from tagi_ray.vocabulary import TextTokenizer
from tests.models import random_batch, random_model
from tests.tiny_run import stage_of, tiny_experiment, tiny_run, trained

WORDS = ("red", "dog", "and", "its", "old", "friend", "run", "over", "the", "field", "water", "a")
LIMIT = 24


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose corpus has texts of 4 to 40 words."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs")
    draw = np.random.default_rng(0)
    texts = [" ".join(draw.choice(WORDS, draw.integers(4, 40))) for _ in range(400)]
    (folder / "texts.txt").write_text("\n\n".join(texts))
    return tiny_run(experiment(folder, steps=100))


def experiment(folder: Path, path: Path | None = None, **changes: object):
    given = {"path": str(path or folder / "texts.txt"), "max_tokens": LIMIT}
    return tiny_experiment(folder, pretrain=given, **changes)


@pytest.fixture
def run(prepared: Path, tmp_path: Path) -> Path:
    shutil.copytree(prepared, tmp_path / "tiny")
    return tmp_path / "tiny"


def specs_of(run: Path, **changes: object) -> tuple[StageSpec, StageSpec]:
    made = experiment(run.parent, run.parent.parent / "texts.txt", **changes)
    return stage_of(made, run, "pretrain"), stage_of(made, run, "finetune")


# How a text is divided.


@given(st.text(max_size=8), st.integers(4, 2000))
def test_every_division_leaves_an_instruction_and_three_tokens_of_target(draw, count):
    first, second = division(draw, count)
    assert 1 <= first <= second <= count - 3
    assert division(draw, count) == (first, second)


def test_both_points_are_drawn_evenly_and_independently():
    draws = [division(f"0/{n}/0", 7) for n in range(40_000)]
    # s1 of 1 to 4, and s2 of s1 to 4.
    expected = {(a, b): 1 / 4 / (5 - a) for a in range(1, 5) for b in range(a, 5)}
    counts = Counter(draws)
    assert counts.keys() == expected.keys()
    for pair, share in expected.items():
        assert counts[pair] / 40_000 == pytest.approx(share, abs=0.01), pair
    # HINT's own code makes the second point follow from the first: in long texts nothing is left
    # of that here.
    points = np.array([division(f"0/{n}/0", 1003) for n in range(20_000)], float)
    first = (points[:, 0] - 1) / 1000
    second = (points[:, 1] - points[:, 0]) / (1001 - points[:, 0])
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.03


def stream(run: Path, stop: int, *, micro: int = 3, rank: int = 0, world: int = 1, seed: int = 0):
    spec, _ = specs_of(run)
    plan = OrderPlan(read_manifest(spec.shards).splits["train"], seed, 1)
    return list(
        local_batches(
            spec.shards, plan, run / "tokenizer", spec.data, start_position=0, stop_position=stop,
            micro_groups=micro, parts=("text",), rank=rank, world=world,
        )
    )  # fmt: skip


Pieces = tuple[list[int], list[int], list[int]]


def text_of(one: Pieces) -> tuple[int, ...]:
    """The whole text, without the end tokens."""
    return tuple(token for piece in one for token in piece[:-1])


def pieces(batches: list[Batch]) -> list[Pieces]:
    """The three pieces of each text, without padding."""
    found = []
    for batch in batches:
        targets = batch.target_ids_KNT[:, 0]
        for k in range(len(batch.tasks)):
            found.append((
                batch.instruction_ids_KI[k][batch.instruction_mask_KI[k]].tolist(),
                batch.input_ids_KNS[k, 0][batch.input_mask_KNS[k, 0]].tolist(),
                targets[k][targets[k] != -100].tolist(),
            ))  # fmt: skip
    return found


def test_the_pieces_are_the_text_each_with_an_end_token(run):
    tokenizer = TextTokenizer(run / "tokenizer")
    (corpus,) = read_tasks_of(run / "corpus", "train")
    whole = {
        tuple(row[:-1])
        for row in tokenizer.encode_batch([one.input for one in corpus.instances], LIMIT + 1)
    }
    found = stream(run, len(corpus.instances))
    assert {text_of(one) for one in pieces(found)} == whole
    for one in pieces(found):
        assert all(piece[-1] == tokenizer.eos_id for piece in one)
        assert tokenizer.eos_id not in text_of(one)
    lengths = [[len(piece) - 1 for piece in one] for one in pieces(found)]
    assert min(a for a, _, _ in lengths) == 1
    assert min(b for _, b, _ in lengths) == 0
    assert min(c for _, _, c in lengths) == 3
    assert max(map(sum, lengths)) == LIMIT
    assert sum(batch.cut_texts for batch in found) == sum(
        n > LIMIT + 1 for n in tokenizer.lengths([one.input for one in corpus.instances])
    )
    assert all(batch.prompt_ids_KNS.shape[-1] == 0 for batch in found)


def test_of_a_decoder_only_model_the_target_alone_ends_and_no_input_is_empty(run):
    ended = stream(run, 300)
    special = run / "tokenizer" / "special.json"
    special.write_text(json.dumps(json.loads(special.read_text()) | {"ends_texts": False}))
    _load_tokenizer.cache_clear()
    tokenizer, shorter = TextTokenizer(run / "tokenizer"), 0
    for one, other in zip(pieces(stream(run, 300)), pieces(ended), strict=True):
        first, second, target = one
        assert [*first, *second, *target] == [*text_of(other), tokenizer.eos_id]
        assert first == other[0][:-1]
        assert second == other[1][:-1] or len(second) == 1 == len(other[1])
        shorter += second != other[1][:-1]
        assert len(target) >= 3  # two tokens and the end
    assert shorter > 10


def test_division_depends_on_seed_and_epoch_and_not_on_workers_or_batches(run):
    count = int(read_manifest(run / "corpus").splits["train"].count.sum())
    alone = pieces(stream(run, 60))
    for world in (2, 3):
        shared = [pieces(stream(run, 60, micro=4, rank=r, world=world)) for r in range(world)]
        assert [one for turn in zip(*shared, strict=True) for one in turn] == alone
    both = pieces(stream(run, 2 * count))
    epochs = [{text_of(one): one for one in both[i : i + count]} for i in (0, count)]
    assert epochs[0].keys() == epochs[1].keys()
    assert sum(epochs[0][text] != epochs[1][text] for text in epochs[0]) > 0.8 * len(epochs[0])
    other = {text_of(one): one for one in pieces(stream(run, count, seed=1))}
    assert sum(epochs[0][text] != other[text] for text in other) > 0.8 * len(other)


# What is minimised.


def test_the_loss_is_the_cross_entropy_of_the_target():
    model, batch = random_model().double(), random_batch(tasks=3, instances=1, slots=False)
    objective = objectives.pretrain()
    assert objective.reads == ("text",)
    totals = objective.denominators(batch)
    assert totals["target_tokens"] == (batch.target_ids_KNT != -100).sum()
    with ExitStack() as scope, torch.no_grad():
        loss = objective.loss(model, batch, totals, scope).loss
    with torch.no_grad():
        encoded = model.encode_instruction(batch.instruction_ids_KI, batch.instruction_mask_KI)
        with model.backbone.bound(model.generate_bank(encoded), model.fused(encoded)):
            logits = model.backbone.logits(
                batch.input_ids_KNS, batch.input_mask_KNS, batch.target_ids_KNT
            )
    probabilities = logits.double().numpy()
    probabilities = np.exp(probabilities - probabilities.max(-1, keepdims=True))
    probabilities /= probabilities.sum(-1, keepdims=True)
    targets = batch.target_ids_KNT.numpy()
    told = [-np.log(probabilities[i][targets[i]]) for i in np.ndindex(targets.shape)
            if targets[i] != -100]  # fmt: skip
    assert float(loss) == pytest.approx(np.mean(told), rel=1e-6)
    # And what finetuning minimises where there are no teachers.
    without = objectives.finetune(DistillationSettings(), None, "full")
    with ExitStack() as scope, torch.no_grad():
        assert torch.equal(without.loss(model, batch, totals, scope).loss, loss)


# The stage, and the one that starts from it.


class Killed(Exception):
    pass


def killed_at(step: int) -> Worker:
    def report(record: dict) -> None:
        if record["step"] == step:
            raise Killed

    return Worker(report=report)


def test_a_killed_stage_continues_as_if_undisturbed(run, tmp_path):
    other = tmp_path / "other" / "tiny"
    shutil.copytree(run, other)
    (whole, _), (broken, _) = specs_of(other, valid_every=4), specs_of(run, valid_every=4)
    run_stage(whole, Worker())
    for step in (4, 6):
        with pytest.raises(Killed):
            run_stage(broken, killed_at(step))
    run_stage(broken, Worker())
    expected, actual = trained(whole), trained(broken)
    assert actual["records"] == expected["records"]
    assert [r["stage"] for r in actual["records"]] == ["pretrain_tagi"] * 4
    assert all("valid_loss" in record for record in actual["records"] if record["step"] % 4 == 0)
    for name, tensor in expected["tensors"].items():
        assert torch.equal(actual["tensors"][name], tensor), name


def test_it_learns_on_texts_and_on_those_held_out(run):
    spec, _ = specs_of(run, steps=100, log_every=20, valid_every=20)
    run_stage(spec, Worker())
    records = trained(spec)["records"]
    assert records[-1]["loss"] < records[0]["loss"] - 0.2
    assert records[-1]["valid_loss"] < records[0]["valid_loss"] - 0.2
    assert {key.partition(".")[2].split(".")[0] for key in trained(spec)["tensors"]
            if key.startswith("model.")} <= {"hypernetwork", "fusion"}  # fmt: skip


def weights(stage: Stage) -> dict[str, torch.Tensor]:
    return {key: one for key, one in stage.engine.state().items() if key.startswith("model.")}


def test_finetuning_starts_from_what_is_pretrained(run):
    pretrain, finetune = specs_of(run, steps=8, valid_every=2)
    with pytest.raises(ConfigError, match="pretrain_tagi of seed 0 is at step 0 of 8: run"):
        run_stage(finetune, Worker())
    run_stage(pretrain, Worker())
    state = load_file(trained_state(last_checkpoint(pretrain)))
    bare = stage_of(tiny_experiment(run.parent), run, "finetune")
    given, fresh = (weights(build_stage(one, torch.device("cpu"))) for one in (finetune, bare))
    assert given.keys() == fresh.keys()
    assert all(torch.equal(value, state[name]) for name, value in given.items())
    assert not all(torch.equal(value, state[name]) for name, value in fresh.items())
    run_stage(finetune, Worker())


def test_the_best_in_validation_is_taken_and_is_part_of_the_stage(run):
    pretrain, finetune = specs_of(run, valid_every=2)
    run_stage(pretrain, Worker())
    newest = last_checkpoint(pretrain)
    before = fingerprint(finetune)
    state, about = checkpoint.load(newest)
    first = checkpoint.steps(pretrain.checkpoints)[0]
    about["progress"]["best"] = {"step": first, "valid_loss": 0.0}
    del about["step"]
    checkpoint.save(pretrain.checkpoints, 8, state, about, best=first)
    assert trained_state(last_checkpoint(pretrain)).parent.name == f"step_{first:08d}"
    assert fingerprint(finetune) != before


def test_the_backbone_has_a_dtype_of_its_own_in_this_stage(run, tmp_path):
    losses: dict[tuple[str, str], list[float]] = {}
    for dtypes in (
        ("float32", "float32"),
        ("bfloat16", "float32"),
        ("bfloat16", "bfloat16"),
    ):
        folder = tmp_path / "_".join(dtypes) / "tiny"
        shutil.copytree(run, folder)
        spec, _ = specs_of(folder)
        values = spec.experiment.model_dump(mode="json")
        values["backbone"]["dtype"], values["pretrain"]["dtype"] = dtypes
        spec = replace(spec, experiment=Experiment.model_validate(values))
        run_stage(spec, Worker())
        losses[dtypes] = [record["loss"] for record in trained(spec)["records"]]
        # Then that of the other stages again.
        run_stage(replace(spec, kind="finetune"), Worker())
    whole, mixed, low = losses.values()
    assert mixed == whole
    assert low != whole
    assert low == pytest.approx(whole, rel=2e-2)


def test_the_path_becomes_absolute_and_cannot_change(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    opened, _ = open_run(experiment(tmp_path, Path("texts")))
    assert opened.pretrain.path == str(tmp_path / "texts")
    with pytest.raises(RunConflictError, match=r"pretrain\.path: was .*texts, is elsewhere"):
        open_run(experiment(tmp_path, Path("elsewhere")))


def test_what_decides_a_stage_is_in_its_fingerprint(run):
    same = fingerprint(specs_of(run)[0])
    assert fingerprint(specs_of(run, micro_groups=4)[0]) == same
    assert fingerprint(specs_of(run, steps=9)[0]) != same
    manifest = run / "corpus" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"fingerprint": "', '"fingerprint": "x'))
    assert fingerprint(specs_of(run)[0]) != same
