"""The embedded world: small tasks that cannot be solved without their instruction.

An input is an alphabetical row of nouns of several kinds (a small model learns an order of words
more easily than one of positions). A task selects the nouns of one kind, replaces each
by another word, and writes the result in some form; its instruction names the three parts. Held-out
tasks are compositions that no training task has, of parts that training tasks do have, so a score
on them measures composition and nothing else. The same input belongs to every task, so without
its instruction a task is a guess among all compositions.
"""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from tagi_ray.tasks import Instance, PositiveExample, Task

WORLD = "demo"
"""The path of raw text by which a recipe means this world's."""
NOUNS = {
    "animal": ("horse", "whale", "tiger", "eagle", "snake", "camel", "otter", "goose"),
    "tool": ("knife", "hammer", "brush", "needle", "shovel", "ladder", "pump", "saw"),
    "food": ("bread", "apple", "cheese", "onion", "honey", "melon", "soup", "pepper"),
    "garment": ("glove", "shirt", "scarf", "jacket", "boot", "belt", "apron", "cloak"),
    "vehicle": ("boat", "wagon", "tram", "rocket", "canoe", "truck", "sled", "balloon"),
}
KINDS = tuple(NOUNS)
ALL_NOUNS = tuple(noun for nouns in NOUNS.values() for noun in nouns)
PER_KIND = 2
"""Nouns of each kind in an input, at least; one kind has one more."""
NUMBERS = ("one", "two", "three")
HELD_OUT: dict[Literal["test", "valid"], int] = {"test": 20, "valid": 8}
PARAPHRASES = 12
"""Definitions of each task, each another wording of the same instruction."""

SELECT = (
    "Take every {c}",
    "Find the words that name a kind of {c}",
    "Look only at each {c}",
    "Pick out whatever is some {c}",
)
REPLACE = {
    "copy": ("keep each one as it is", "leave each one unchanged", "copy each one"),
    "plural": ("put each one in the plural", "name more than one of each", "make each one many"),
    "maker": ("name who makes each one", "replace each one by its maker", "give the smith of each"),
    "small": ("make each one small", "name the tiny version of each", "shrink each one"),
    "elvish": ("say each one in elvish", "translate each one to elvish", "use the elvish name of each"),
    "opposite": ("give the opposite of each", "replace each one by its contrary", "turn each one into its opposite"),
}  # fmt: skip
WRITE = {
    "plain": ("write the result", "answer with that", "list them in order"),
    "numbered": ("number the result", "put its number before each word", "count the words as you write"),
    "frame": ("frame the result with begin and end", "start with begin and finish with end", "write begin first and end last"),
    "twice": ("write every word twice", "say each result two times", "double every word of the answer"),
}  # fmt: skip
LAYOUTS = (
    "{select} , {replace} , and {write}.",
    "{select} . Then {replace} . Then {write}.",
    "Your task : {select} , {replace} , then {write}.",
)


@dataclass(frozen=True, slots=True)
class World:
    """All tasks of the world, their split, and an endless supply of their instances."""

    tasks: tuple[Task, ...]
    split: dict[str, Literal["train", "valid", "test"]]
    parts: dict[str, tuple[str, str, str]]
    """(kind, replacement, form) of each task."""
    seed: int

    def instances(self, task_name: str, count: int) -> list[Instance]:
        """Return the first `count` instances of a task; their inputs are distinct."""
        words = dictionary(self.seed)
        return [
            Instance(
                id=f"{task_name}-{index}",
                input=" ".join(row),
                outputs=(solve(row, self.parts[task_name], words),),
            )
            for index, row in enumerate(_rows(f"{self.seed}/{task_name}", count))
        ]


@lru_cache(maxsize=4)
def dictionary(seed: int) -> dict[str, dict[str, str]]:
    """Return what each noun becomes under each replacement: replacement -> noun -> word."""
    draw = random.Random(f"{seed}/dictionary")
    syllables = [c + v for c in "blmnrsvz" for v in "aeiou"]
    elvish = ["".join(pair) for pair in itertools.permutations(syllables, 2)]
    return {
        "copy": {noun: noun for noun in ALL_NOUNS},
        "plural": {noun: noun + "s" for noun in ALL_NOUNS},
        "maker": {noun: noun + "smith" for noun in ALL_NOUNS},
        "small": {noun: noun + "let" for noun in ALL_NOUNS},
        "elvish": dict(zip(ALL_NOUNS, draw.sample(elvish, len(ALL_NOUNS)), strict=True)),
        "opposite": _cycle(draw),
    }


@lru_cache(maxsize=4)
def world(seed: int = 0) -> World:
    """Build the world: all 120 compositions; training sees every part and every pair of parts."""
    compositions = list(itertools.product(KINDS, REPLACE, WRITE))
    random.Random(f"{seed}/split").shuffle(compositions)
    held_out = _scattered(compositions, sum(HELD_OUT.values()))
    ordered = [*held_out, *(parts for parts in compositions if parts not in held_out)]
    names = ["_".join(parts) for parts in ordered]
    split: dict[str, Literal["train", "valid", "test"]] = {
        name: "test" if i < HELD_OUT["test"] else "valid" if i < len(held_out) else "train"
        for i, name in enumerate(names)
    }
    parts = dict(zip(names, ordered, strict=True))
    return World(
        tasks=tuple(_task(name, parts[name], seed) for name in split),
        split=split,
        parts=parts,
        seed=seed,
    )


def solve(row: list[str], parts: tuple[str, str, str], words: dict[str, dict[str, str]]) -> str:
    """Return the answer of the task with these parts for a row of nouns."""
    wanted, replacement, form = parts
    chosen = [words[replacement][noun] for noun in row if noun in NOUNS[wanted]]
    if form == "numbered":
        chosen = [word for pair in zip(NUMBERS, chosen, strict=False) for word in pair]
    if form == "twice":
        chosen = [word for word in chosen for _ in range(2)]
    if form == "frame":
        chosen = ["begin", *chosen, "end"]
    return " ".join(chosen)


def texts(seed: int = 0) -> Iterator[str]:
    """Yield texts without end that tell of the training tasks: a definition, then some instances.

    Held-out compositions are in none of them.
    """
    built = world(seed)
    words = dictionary(seed)
    tasks = [task for task in built.tasks if built.split[task.name] == "train"]
    draw = random.Random(f"{seed}/texts")
    while True:
        task = draw.choice(tasks)
        rows = _rows(f"{draw.random()}", draw.randint(1, 4))
        told = [
            f"Input: {' '.join(row)}. Output: {solve(row, built.parts[task.name], words)}."
            for row in rows
        ]
        yield " ".join([f"Definition: {draw.choice(task.definitions)}", *told])


def write_sni(folder: Path, instances: int, seed: int = 0) -> None:
    """Write the world as SNI task files with split files, `instances` instances a task."""
    folder.mkdir(parents=True, exist_ok=True)
    built = world(seed)
    for task in built.tasks:
        examples = [
            {"input": example.input, "output": example.output, "explanation": ""}
            for example in task.positive_examples
        ]
        record = {
            "Categories": [task.category],
            "Definition": list(task.definitions),
            "Positive Examples": examples,
            "Negative Examples": [],
            "Instances": [
                {"id": instance.id, "input": instance.input, "output": list(instance.outputs)}
                for instance in built.instances(task.name, instances)
            ],
        }
        (folder / f"{task.name}.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    for split in ("train", "test"):
        names = [
            n for n, s in built.split.items() if s == split or (split, s) == ("train", "valid")
        ]
        (folder / f"{split}_tasks.txt").write_text("\n".join(names) + "\n", encoding="utf-8")


def vocabulary(seed: int = 0) -> list[str]:
    """Return every word that an instruction, an input or an answer can hold, sorted."""
    texts = [definition for task in world(seed).tasks for definition in task.definitions]
    texts += [phrase for phrases in (*REPLACE.values(), *WRITE.values()) for phrase in phrases]
    texts += [layout.format(select="", replace="", write="") for layout in LAYOUTS]
    texts += [phrase.format(c=kind) for phrase in SELECT for kind in KINDS]
    texts += [" ".join(table.values()) for table in dictionary(seed).values()]
    words = {word.strip(".") for text in texts for word in text.split()}
    return sorted(words | {"and", "begin", "end", *NUMBERS} - {""})


def _scattered(compositions: list[tuple[str, str, str]], count: int) -> list[tuple[str, str, str]]:
    """Return the first `count` compositions that leave most of every pair of parts to training."""
    chosen: list[tuple[str, str, str]] = []
    seen: Counter[tuple[str, str]] = Counter()
    for parts in compositions:
        pairs = list(itertools.combinations(parts, 2))
        if len(chosen) < count and all(seen[pair] < 2 for pair in pairs):
            chosen.append(parts)
            seen.update(pairs)
    return chosen


def _task(name: str, parts: tuple[str, str, str], seed: int) -> Task:
    draw = random.Random(f"{seed}/{name}/definition")
    kind, replacement, form = parts
    wordings = list(itertools.product(LAYOUTS, SELECT, REPLACE[replacement], WRITE[form]))
    definitions = tuple(
        layout.format(select=select.format(c=kind), replace=replace, write=write)
        for layout, select, replace, write in draw.sample(wordings, PARAPHRASES)
    )
    examples = tuple(
        PositiveExample(input=" ".join(row), output=solve(row, parts, dictionary(seed)))
        for row in _rows(f"{seed}/{name}/examples", 2)
    )
    return Task(
        name=name, category=replacement, definitions=definitions, positive_examples=examples
    )


def _rows(key: str, count: int) -> list[list[str]]:
    """Return `count` distinct rows of nouns, a pure function of the key."""
    draw = random.Random(key)
    rows: dict[str, list[str]] = {}
    while len(rows) < count:
        one_more = draw.choice(KINDS)
        row = sorted(
            noun
            for kind, nouns in NOUNS.items()
            for noun in draw.sample(nouns, PER_KIND + (kind == one_more))
        )
        rows.setdefault(" ".join(row), row)
    return list(rows.values())


def _cycle(draw: random.Random) -> dict[str, str]:
    """Return a permutation of the nouns without fixed point."""
    order = list(ALL_NOUNS)
    draw.shuffle(order)
    return dict(zip(order, order[1:] + order[:1], strict=True))
