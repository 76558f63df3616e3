"""Batches: text choices, padding, cutting, and the stream of a rank."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tagi_ray.batches import Batch, local_batches, text_batch
from tagi_ray.groups import TextGroup, definition_choice, fetch, reference_choice
from tagi_ray.order import OrderPlan
from tagi_ray.prompts import render_input, render_instruction
from tagi_ray.sections import BackboneSettings, DataSettings
from tagi_ray.shard_writer import write_shards
from tagi_ray.shards import read_manifest, read_tasks_of
from tagi_ray.tasks import PositiveExample
from tagi_ray.vocabulary import TextTokenizer, prepare_tokenizer

SETTINGS = DataSettings(train_instances=70, test_instances=10)
ALL_PARTS = ("instruction", "input", "prompt")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_shards(SETTINGS, folder / "shards", 0, parallel=False)
    settings = BackboneSettings(path="random", tokenizer="train", tokenizer_vocabulary=600)
    prepare_tokenizer(settings, folder / "shards", folder / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def tokenizer(run) -> TextTokenizer:
    return TextTokenizer(run / "tokenizer")


def stream(run: Path, start: int, stop: int, settings=SETTINGS, seed=0, slots=None, **fields):
    plan = OrderPlan(read_manifest(run / "shards").splits["train"], seed, 4, slots)
    fields = {"micro_groups": 3, "parts": ALL_PARTS, **fields}
    return list(
        local_batches(
            run / "shards", plan, run / "tokenizer", settings,
            start_position=start, stop_position=stop, **fields,
        )
    )  # fmt: skip


def texts(tokenizer: TextTokenizer, ids: torch.Tensor) -> list[str]:
    rows = ids.reshape(-1, ids.shape[-1]).clamp_min(0).tolist()
    return tokenizer.decode_batch(rows)


def same(first: Batch, second: Batch) -> bool:
    return first.tasks == second.tasks and all(
        torch.equal(getattr(first, name), getattr(second, name))
        for name in ("instruction_ids_KI", "input_ids_KNS", "prompt_ids_KNS", "target_ids_KNT")
    )


def test_batches_hold_the_tasks_own_texts(run, tokenizer):
    known = {task.task.name: task for task in read_tasks_of(run / "shards", "train")}
    for batch in stream(run, 0, 30):
        instructions = texts(tokenizer, batch.instruction_ids_KI)
        inputs, prompts, targets = (
            np.reshape(texts(tokenizer, ids), (3, 4))
            for ids in (batch.input_ids_KNS, batch.prompt_ids_KNS, batch.target_ids_KNT)
        )
        for k, name in enumerate(batch.tasks):
            task = known[name].task
            assert batch.categories[k] == task.category
            assert instructions[k] in {render_instruction(d, (), "def") for d in task.definitions}
            answers = {render_input(i.input): i.outputs for i in known[name].instances}
            for n in range(4):
                assert targets[k, n] in answers[inputs[k, n]]
                assert prompts[k, n] == instructions[k] + inputs[k, n]


def test_padding_is_on_the_right_and_every_text_ends_with_the_end_token(run, tokenizer):
    (batch,) = stream(run, 0, 3)
    for ids, mask, fill in (
        (batch.instruction_ids_KI, batch.instruction_mask_KI, tokenizer.pad_id),
        (batch.input_ids_KNS, batch.input_mask_KNS, tokenizer.pad_id),
        (batch.prompt_ids_KNS, batch.prompt_mask_KNS, tokenizer.pad_id),
        (batch.target_ids_KNT, batch.target_ids_KNT != -100, -100),
    ):
        assert ids.dtype == torch.long
        assert mask.dtype == torch.bool
        flat, kept = ids.reshape(-1, ids.shape[-1]), mask.reshape(-1, ids.shape[-1])
        lengths = kept.sum(1)
        assert lengths.max() == ids.shape[-1]
        assert torch.equal(kept, torch.arange(ids.shape[-1]) < lengths[:, None])
        assert (flat[~kept] == fill).all()
        assert (flat.gather(1, lengths[:, None] - 1) == tokenizer.eos_id).all()
    assert batch.valid_tokens() == (batch.target_ids_KNT != -100).sum()
    assert batch.cut_texts == 0


def test_texts_of_a_decoder_only_model_go_on_and_its_targets_end(run, tokenizer, tmp_path):
    settings = BackboneSettings(path="random", tokenizer="train", tokenizer_vocabulary=600)
    prepare_tokenizer(settings, run / "shards", tmp_path / "tokenizer", causal=True)
    (tmp_path / "shards").symlink_to(run / "shards")
    (ended,), (open_,) = stream(run, 0, 3), stream(tmp_path, 0, 3)
    end = tokenizer.eos_id
    assert torch.equal(ended.target_ids_KNT, open_.target_ids_KNT)
    for name in ("instruction_ids_KI", "input_ids_KNS", "prompt_ids_KNS"):
        rows = [
            getattr(batch, name).reshape(-1, getattr(batch, name).shape[-1])
            for batch in (ended, open_)
        ]
        for with_end, without in zip(*rows, strict=True):
            text = [token for token in with_end.tolist() if token not in (end, tokenizer.pad_id)]
            assert with_end.tolist()[len(text)] == end
            assert [token for token in without.tolist() if token != tokenizer.pad_id] == text


@pytest.mark.parametrize("world", [1, 2, 3])
def test_all_ranks_together_see_what_one_rank_sees(run, world):
    alone = stream(run, 12, 36, micro_groups=1)
    assert [batch.position for batch in alone] == list(range(12, 36))
    shared: dict[int, Batch] = {}
    for rank in range(world):
        for batch in stream(run, 12, 36, micro_groups=1, rank=rank, world=world):
            shared[batch.position] = batch
    assert len(shared) == 24
    assert all(same(batch, shared[batch.position]) for batch in alone)


def test_entering_in_the_middle_gives_the_same_stream(run):
    # 150 positions are more than one block, so that the two streams have other blocks.
    whole, rest = stream(run, 0, 240), stream(run, 150, 240)
    assert len(rest) == 30
    assert all(same(a, b) for a, b in zip(whole[50:], rest, strict=True))


def test_the_last_batch_may_be_shorter(run):
    assert [len(batch.tasks) for batch in stream(run, 0, 7)] == [3, 3, 1]


def test_parts_not_asked_for_are_empty(run):
    (batch,) = stream(run, 0, 3, parts=("input",))
    assert batch.instruction_ids_KI.shape == (3, 0)
    assert batch.prompt_ids_KNS.shape == (3, 4, 0)
    assert batch.input_ids_KNS.shape[:2] == (3, 4)


def test_slots_label_the_tasks(run):
    names = read_manifest(run / "shards").names("train")
    slots = {name: number for number, name in enumerate(names[:20])}
    batches = stream(run, 0, 60, slots=slots)
    for batch in batches:
        assert batch.slots_K.tolist() == [slots.get(name, -1) for name in batch.tasks]
    assert {-1, 0} <= {
        slot for batch in stream(run, 0, 600, slots=slots) for slot in batch.slots_K.tolist()
    }


def test_over_long_texts_are_cut_and_counted(run, tokenizer):
    fields = {"max_instruction_tokens": 6, "max_input_tokens": 9, "max_prompt_tokens": 12}
    settings = SETTINGS.model_copy(update=fields)
    (batch,) = stream(run, 0, 3, settings)
    assert batch.instruction_ids_KI.shape[-1] == 6
    assert batch.input_ids_KNS.shape[-1] == 9
    assert batch.prompt_ids_KNS.shape[-1] == 12
    assert (batch.input_ids_KNS[..., -1] == tokenizer.eos_id).all()
    assert batch.cut_texts == 3 + 12 + 12


def group(count: int, **fields) -> TextGroup:
    inputs = tuple(f"red lamp {i}" for i in range(count))
    return TextGroup("t", "c", "Take the red words", (), inputs, inputs, **fields)


def test_demonstrations_are_added_only_where_the_whole_prompt_fits(tokenizer):
    examples = (PositiveExample("red cup", "cup"), PositiveExample("red map " * 40, "map"))
    one = TextGroup("t", "c", "Take the red words", examples, ("red key", "red " * 60), ("k", "r"))
    prompts = [render_instruction(one.definition, examples[:k], "def_2pos") for k in range(3)]
    lengths = [tokenizer.lengths([p + render_input(t) for t in one.inputs]) for p in prompts]
    # With this limit the short input has room for the first demonstration, the long one for none.
    limit = lengths[1][1] - 1
    assert lengths[1][0] <= limit < lengths[2][0]
    settings = DataSettings(prompt="def_2pos", max_prompt_tokens=limit)
    batch = text_batch([one], tokenizer, settings, ("prompt",))
    assert texts(tokenizer, batch.prompt_ids_KNS) == [
        prompts[1] + render_input(one.inputs[0]),
        prompts[0] + render_input(one.inputs[1]),
    ]
    assert batch.cut_texts == 0
    instruction = tokenizer.lengths(prompts)
    settings = DataSettings(prompt="def_2pos", max_instruction_tokens=instruction[2] - 1)
    batch = text_batch([one], tokenizer, settings, ("instruction",))
    assert texts(tokenizer, batch.instruction_ids_KI) == [prompts[1]]


def test_groups_of_different_size_make_no_batch(tokenizer):
    with pytest.raises(ValueError, match="same number of instances"):
        text_batch([group(2), group(3)], tokenizer, SETTINGS, ALL_PARTS)


def test_choices_are_fixed_and_fair():
    assert reference_choice(0, "x-1", 0, 1) == 0
    picks = [reference_choice(0, f"x-{i}", 0, 3) for i in range(3000)]
    assert picks == [reference_choice(0, f"x-{i}", 0, 3) for i in range(3000)]
    assert np.bincount(picks, minlength=3).min() > 900
    assert picks != [reference_choice(0, f"x-{i}", 1, 3) for i in range(3000)]
    assert picks != [reference_choice(1, f"x-{i}", 0, 3) for i in range(3000)]
    wordings = [definition_choice(0, "t", position, 4) for position in range(2000)]
    assert np.bincount(wordings, minlength=4).min() > 400


def test_a_position_reads_the_same_text_in_any_company(run):
    index = read_manifest(run / "shards").splits["train"]
    plan = OrderPlan(index, 0, 4)
    files = [str(run / "shards" / name) for name in index.files]
    together = fetch(plan.table(np.arange(40)), files, 0)
    assert fetch(plan.table(np.asarray([23])), files, 0) == [together[23]]
    later = fetch(plan.table(np.arange(40) + 40 * plan.groups_per_epoch), files, 0)
    assert [g.definition for g in later] != [g.definition for g in together]


def test_to_moves_every_tensor(run):
    (batch,) = stream(run, 0, 3)
    moved = batch.to("meta")
    assert moved.tasks == batch.tasks
    for name in Batch.__dataclass_fields__:
        if isinstance(getattr(batch, name), torch.Tensor):
            assert getattr(moved, name).is_meta, name


def test_data_tasks_start_without_torch():
    code = "import sys, tagi_ray.groups, tagi_ray.shard_writer; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
