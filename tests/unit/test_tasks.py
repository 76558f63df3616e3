"""Names, hashes and splits of tasks."""

import json
from collections import Counter
from pathlib import Path

import pytest

from tagi_ray.errors import DataError
from tagi_ray.sections import DataSettings
from tagi_ray.tasks import Task, check_name, instance_hash, split_tasks


def tasks_of(categories: dict[str, int]) -> list[Task]:
    return [
        Task(f"{category}_{number}", category, ("Do it.",))
        for category, count in categories.items()
        for number in range(count)
    ]


def settings(**fields) -> DataSettings:
    return DataSettings(source="sni", path="data", **fields)


@pytest.mark.parametrize("name", ["task1_a", "task1530_scitail1.1_x", "a-b+c", "0"])
def test_safe_names(name):
    assert check_name(name, "here") == name


@pytest.mark.parametrize(
    "name", ["", ".hidden", "../up", "a/b", "a b", "a\n", "é", "a..b", "x" * 201]
)
def test_unsafe_names_are_refused_with_their_place(name):
    with pytest.raises(DataError, match=r"^file:3: task name"):
        check_name(name, "file:3")


def test_hash_is_blind_to_white_space_and_the_order_of_outputs_only():
    assert instance_hash("a  b\n", ["x", "y "]) == instance_hash(" a b", ["y", "x"])
    assert instance_hash("e\u0301", ["x"]) == instance_hash("\u00e9", ["x"])
    assert instance_hash("a b", ["x"]) != instance_hash("a b", ["y"])
    assert instance_hash("a b", ["x"]) != instance_hash("A b", ["x"])


def test_held_out_category_is_all_test():
    split = split_tasks(tasks_of({"a": 5, "b": 3}), settings(test_categories=("b",)), 0)
    assert {name for name, part in split.items() if part == "test"} == {"b_0", "b_1", "b_2"}


def test_validation_is_proportional_over_categories_and_seeded():
    tasks = tasks_of({"a": 60, "b": 30, "c": 10, "t": 4})
    chosen = settings(test_categories=("t",), valid_fraction=0.1)
    valid = []
    for seed in (0, 0, 1):
        split = split_tasks(tasks, chosen, seed)
        valid.append({name for name, part in split.items() if part == "valid"})
        counts = Counter(name[0] for name in valid[-1])
        assert (counts["a"], counts["b"], counts["c"]) == (6, 3, 1)
    assert valid[0] == valid[1] != valid[2]


def test_split_does_not_depend_on_the_order_of_the_tasks():
    tasks = tasks_of({"a": 20, "t": 2})
    chosen = settings(test_tasks=("t_0", "t_1"))
    assert split_tasks(tasks, chosen, 3) == split_tasks(tasks[::-1], chosen, 3)


@pytest.mark.parametrize("name", ["train", "test"])
def test_a_listed_task_that_is_not_there_is_refused(tmp_path, name):
    lists = {"train": "a_0\na_1\n", "test": "t_0\n\n"}
    lists[name] += "a_9\n"
    for which, text in lists.items():
        (tmp_path / f"{which}.txt").write_text(text)
    files = {f"{which}_tasks_file": str(tmp_path / f"{which}.txt") for which in lists}
    with pytest.raises(
        DataError, match=rf"{name}\.txt: 'a_9' is not in the data.*Did you mean 'a_"
    ):
        split_tasks(tasks_of({"a": 3, "t": 1}), settings(**files, valid_fraction=0.0), 0)


def test_tasks_in_neither_list_are_left_out_and_told(tmp_path, caplog):
    train, test = tmp_path / "train.txt", tmp_path / "test.txt"
    train.write_text("a_0\na_1\n")
    test.write_text("t_0\n\n")
    chosen = settings(train_tasks_file=str(train), test_tasks_file=str(test), valid_fraction=0.0)
    with caplog.at_level("INFO"):
        split = split_tasks(tasks_of({"a": 3, "t": 1}), chosen, 0)
    assert split == {"a_0": "train", "a_1": "train", "t_0": "test"}
    assert "1 tasks are in neither list" in caplog.text


@pytest.mark.parametrize("seed", range(5))
def test_validation_takes_no_category_whole(seed):
    tasks = tasks_of({"a": 12, "b": 1, "c": 1, "d": 2, "t": 1})
    split = split_tasks(tasks, settings(test_tasks=("t_0",), valid_fraction=0.6), seed)
    trained = {name[0] for name, part in split.items() if part == "train"}
    assert trained == set("abcd")
    assert "valid" in split.values()


def test_only_a_test_list_makes_every_other_task_a_training_task(tmp_path):
    test = tmp_path / "test.txt"
    test.write_text("a_0\n")
    chosen = settings(test_tasks_file=str(test), valid_fraction=0.0)
    assert split_tasks(tasks_of({"a": 3}), chosen, 0) == {
        "a_0": "test", "a_1": "train", "a_2": "train",
    }  # fmt: skip


def test_task_in_both_lists_is_named(tmp_path):
    train = tmp_path / "train.txt"
    train.write_text("a_0\na_1\n")
    chosen = settings(train_tasks_file=str(train), test_tasks=("a_1",))
    with pytest.raises(DataError, match=r"'a_1' is held out as well"):
        split_tasks(tasks_of({"a": 3}), chosen, 0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"test_categories": ("questions",)}, r"'questions' is no category.*'question'"),
        ({"test_tasks": ("question_O",)}, r"'question_O' is no task.*'question_0'"),
        ({"test_categories": ("question",)}, r"no training task is left of 2 tasks"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(fields, message):
    with pytest.raises(DataError, match=message):
        split_tasks(tasks_of({"question": 2}), settings(**fields), 0)


SIZES = {"a": 5, "b": 9, "c": 9, "d": 2, "t": 20}


def trained_on(train_categories, sizes=SIZES, **fields) -> Counter[str]:
    chosen = settings(
        train_categories=train_categories,
        test_categories=("t",),
        **{"valid_fraction": 0.0, **fields},
    )
    split = split_tasks(tasks_of(sizes), chosen, 0)
    assert sum(part == "test" for part in split.values()) == sizes["t"]
    return Counter(name[0] for name, part in split.items() if part != "test")


@pytest.mark.parametrize(
    ("train_categories", "expected"),
    [
        ("all", {"a": 5, "b": 9, "c": 9, "d": 2}),
        (1, {"b": 9}),  # as many as c: the first by name
        (2, {"b": 9, "c": 9}),
        (3, {"a": 5, "b": 9, "c": 9}),
        (4, {"a": 5, "b": 9, "c": 9, "d": 2}),
        (("d", "a"), {"a": 5, "d": 2}),
    ],
)
def test_training_categories(train_categories, expected):
    assert trained_on(train_categories) == expected


def test_categories_are_counted_before_validation_tasks_are_drawn_and_after_held_out_ones(tmp_path):
    # Drawing half of the tasks leaves the order of the categories to chance.
    assert trained_on(1, {"a": 20, "b": 19, "t": 1}, valid_fraction=0.5) == {"a": 20}
    held_out = settings(test_tasks=tuple(f"a_{number}" for number in range(4)), train_categories=1)
    split = split_tasks(tasks_of({"a": 6, "b": 3}), held_out, 0)
    assert {name[0] for name, part in split.items() if part != "test"} == {"b"}


@pytest.mark.parametrize(
    ("train_categories", "message"),
    [
        (5, r"data\.train_categories=5, and the training tasks of data have 4 categories"),
        (("Summarisation",), r"'Summarisation' is no category of the training tasks"),
        (("a", "t"), r"'t' is no category of the training tasks"),
    ],
)
def test_categories_that_match_nothing_are_refused(train_categories, message):
    with pytest.raises(DataError, match=message):
        trained_on(train_categories)


def test_an_unknown_category_gets_the_nearest():
    chosen = settings(train_categories=("Question Answer",), test_categories=("t",))
    with pytest.raises(DataError, match=r"Did you mean 'Question Answering'\?"):
        split_tasks(tasks_of({"Question Answering": 3, "t": 1}), chosen, 0)


SNI = Path(__file__).parents[3] / "shared" / "data" / "sni"
# Not in the list of definitions, and plain from their names.
NAMED_AFTER_THEIR_CATEGORY = {
    "task137_detoxifying-lms_classification_toxicity": "Toxic Language Detection",
    "task754_svamp_common-division_question_answering": "Question Answering",
    "task823_peixian-rtgender_sentiment_analysis": "Sentiment Analysis",
}


def official_tasks() -> list[Task]:
    """The official training and test tasks; those that no list gives a category are `unknown`."""
    found: dict[str, str] = {}
    for line in (SNI / "definitions_1654.jsonl").read_text("utf-8").splitlines():
        record = json.loads(line)
        found[record["task"]] = record["category"] or "unknown"
    for path in (SNI / "tasks").glob("*.json"):
        found[path.stem] = json.loads(path.read_text("utf-8"))["Categories"][0]
    found |= NAMED_AFTER_THEIR_CATEGORY
    return [Task(name, category, ("Do it.",)) for name, category in found.items()]


@pytest.mark.skipif(not SNI.exists(), reason="needs the real task lists, which are not there")
def test_the_papers_counts_on_the_official_split():
    """Table 11, but for Misc. (36 tasks), which the list of definitions divides further."""
    official = SNI / "splits_official_default"
    fields = {
        "train_tasks_file": str(official / "train_tasks.txt"),
        "test_tasks_file": str(official / "test_tasks.txt"),
        "valid_fraction": 0.0,
    }
    tasks = official_tasks()
    category = {task.name: task.category for task in tasks}

    def counts(train_categories) -> Counter[str]:
        split = split_tasks(tasks, settings(train_categories=train_categories, **fields), 0)
        return Counter(category[name] for name, part in split.items() if part == "train")

    five = {
        "Question Answering": 157,
        "Program Execution": 90,
        "Question Generation": 51,
        "Sentiment Analysis": 42,
        "Toxic Language Detection": 32,
    }
    assert counts(5) == five
    assert counts(tuple(five)) == five
    assert sum(five.values()) == 408 - 36
    assert sum(counts("all").values()) == 756
