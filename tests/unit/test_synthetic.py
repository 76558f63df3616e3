"""The embedded world: compositional, split without leaks, solvable only with the instruction."""

import itertools
import json

import pytest

from tagi_ray.architecture import SHIPPED
from tagi_ray.demo import word_tokenizer
from tagi_ray.prompts import render_input, render_instruction
from tagi_ray.sections import DataSettings
from tagi_ray.synthetic import (
    KINDS,
    NOUNS,
    REPLACE,
    WRITE,
    dictionary,
    solve,
    vocabulary,
    world,
    write_sni,
)
from tagi_ray.task_files import read_tasks


def test_held_out_tasks_are_unseen_compositions_of_seen_parts():
    built = world()
    by_split = {
        split: {built.parts[name] for name, s in built.split.items() if s == split}
        for split in ("train", "valid", "test")
    }
    assert {split: len(parts) for split, parts in by_split.items()} == {
        "train": 92, "valid": 8, "test": 20,
    }  # fmt: skip
    assert not by_split["train"] & (by_split["valid"] | by_split["test"])
    for split in ("valid", "test"):
        for parts in by_split[split]:
            for pair in itertools.combinations(range(3), 2):
                assert any(all(parts[i] == seen[i] for i in pair) for seen in by_split["train"]), (
                    parts
                )


@pytest.mark.parametrize(
    ("parts", "answer"),
    [
        (("tool", "copy", "plain"), "hammer saw"),
        (("tool", "plural", "numbered"), "one hammers two saws"),
        (("animal", "maker", "twice"), "horsesmith horsesmith tigersmith tigersmith"),
        (("food", "small", "frame"), "begin applelet end"),
    ],
)
def test_answers_are_what_the_parts_say(parts, answer):
    row = ["apple", "hammer", "horse", "saw", "tiger"]
    assert solve(row, parts, dictionary(0)) == answer


def test_replacements_are_maps_of_all_nouns_and_opposites_have_no_fixed_point():
    nouns = {noun for row in NOUNS.values() for noun in row}
    for name, table in dictionary(0).items():
        assert table.keys() == nouns
        assert len(set(table.values())) == len(nouns), name
    assert all(noun != other for noun, other in dictionary(0)["opposite"].items())
    assert dictionary(0).keys() == REPLACE.keys()


def test_one_input_has_a_different_answer_under_almost_every_task():
    row = world().instances("animal_copy_plain", 1)[0].input.split()
    answers = {
        solve(row, parts, dictionary(0)) for parts in itertools.product(KINDS, REPLACE, WRITE)
    }
    assert len(answers) == 120


def test_instances_are_distinct_reproducible_and_hold_every_kind():
    instances = world().instances("food_elvish_twice", 200)
    assert instances[:50] == world().instances("food_elvish_twice", 50)
    assert len({instance.input for instance in instances}) == 200
    for instance in instances:
        row = instance.input.split()
        assert len(row) == 11
        assert all(len([noun for noun in row if noun in NOUNS[kind]]) >= 2 for kind in KINDS)


def test_definitions_are_paraphrases_that_name_their_parts():
    for task in world().tasks:
        kind, *_ = world().parts[task.name]
        assert len(set(task.definitions)) == 12
        assert all(kind in definition for definition in task.definitions)
        assert len(task.positive_examples) == 2


def test_the_world_as_sni_files_reads_back_the_same(tmp_path):
    write_sni(tmp_path / "tasks", 5)
    settings = DataSettings(
        source="sni",
        path=str(tmp_path / "tasks"),
        test_tasks_file=str(tmp_path / "tasks" / "test_tasks.txt"),
    )
    read = {source.task.name: source for source in read_tasks(settings)}
    assert {source.task for source in read.values()} == set(world().tasks)
    assert list(read["food_elvish_twice"].instances()) == world().instances("food_elvish_twice", 5)


def test_no_prompt_or_answer_holds_a_word_unknown_to_the_shipped_tokenizer():
    tokenizer = word_tokenizer()
    unknown = tokenizer.token_to_id("<unk>")
    for task in world().tasks:
        texts = [
            render_instruction(definition, task.positive_examples, "def_2pos")
            for definition in task.definitions
        ]
        for instance in world().instances(task.name, 5):
            texts += [render_input(instance.input), *instance.outputs]
        for text in texts:
            assert unknown not in tokenizer.encode(text).ids, text
    assert len(vocabulary()) < 400


def test_the_shipped_backbone_saw_no_held_out_composition_and_is_small():
    seen = json.loads((SHIPPED["demo"] / "tasks.json").read_text())["tasks"]
    assert seen
    assert {world().split[name] for name in seen} == {"train"}
    files = {path.name: path.stat().st_size for path in SHIPPED["demo"].iterdir()}
    assert sum(files.values()) <= 8 * 2**20
    assert not [name for name in files if name.endswith((".bin", ".pt"))]
    saved = json.loads((SHIPPED["demo"] / "tokenizer.json").read_text())["model"]["vocab"]
    assert saved == json.loads(word_tokenizer().to_str())["model"]["vocab"]
