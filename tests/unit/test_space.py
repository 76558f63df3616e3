"""The file of a sweep: what is read from it, and what is refused with its place and cure."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tagi_ray import recipes
from tagi_ray.config import Experiment
from tagi_ray.errors import ConfigError
from tagi_ray.space import (
    Domain,
    Space,
    as_text,
    load_space,
    names,
    own_texts,
    own_values,
    texts,
)

VALIDATED = "finetune.valid_every=100"
RANKS = "space:\n  lora.rank: [4, 8]\n"
Write = Callable[..., str]


def run(name: str = "demo", *overrides: str) -> Experiment:
    return recipes.load(name, [VALIDATED, *overrides])


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    monkeypatch.chdir(tmp_path)

    def write_space(text: str, name: str = "mine.yaml") -> str:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return name

    return write_space


def refused(path: str, experiment: Experiment) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_space(path, experiment)
    assert not any("\n" in problem for problem in caught.value.problems)
    return caught.value.problems


def refusal(path: str, experiment: Experiment) -> str:
    (problem,) = refused(path, experiment)
    return problem


@pytest.mark.parametrize("recipe", ["demo", "sni_t5_base", "p3_t5_base"])
@pytest.mark.parametrize("name", names())
def test_every_shipped_space_is_for_the_demo_and_for_recipes_of_the_paper(name, recipe):
    space = load_space(name, run(recipe))
    assert space.name == name
    assert space.count > 3
    assert set(own_values(space, run(recipe))) == set(space.space)


def test_the_shipped_spaces_have_the_fields_that_matter():
    fields = {field for name in names() for field in load_space(name, run()).space}
    assert fields >= {
        "distillation.lambda_kl",
        "distillation.lambda_ins",
        "distillation.temperature",
        "lora.rank",
        "lora.targets",
        "fusion.kind",
        "finetune.optimizer.learning_rate",
    }


@pytest.mark.parametrize("name", names())
def test_a_space_written_out_is_the_same_space(name, write):
    space = load_space(name, run())
    assert load_space(write(as_text(space), "other.yaml"), run()) == space


def test_a_list_may_name_nothing_and_a_text_that_looks_like_a_number(write):
    space = load_space(
        write("space: {fusion.low_rank: [~, 4], backbone.revision: ['1e4', x]}\n"), run()
    )
    assert space.space["fusion.low_rank"].values() == (None, 4)
    assert space.space["backbone.revision"].values() == ("1e4", "x")
    assert load_space(write(as_text(space)), run()) == space


def test_what_a_file_leaves_out(write):
    space = load_space(write(RANKS), run())
    assert space == Space(name="mine", space={"lora.rank": Domain(choice=(4, 8))})
    assert (space.search, space.count, space.objectives) == ("random", 20, ("valid_loss",))


def test_a_grid_has_every_combination_and_the_recipes_own(write):
    text = "search: grid\nspace:\n  lora.rank: [4, 8]\n  lora.alpha: [1, 2, 3]\n"
    assert load_space(write(text), run()).count == 7


def test_numbers_may_be_written_with_an_exponent(write):
    space = load_space(write("space: {finetune.steps: [1e3, 2e3]}\nscheduler: none\n"), run())
    assert space.space["finetune.steps"].values() == (1000, 2000)


@pytest.mark.parametrize(
    ("kind", "inside", "outside"),
    [
        ("uniform: [0, 1]", (0, 0.5, 1), (-0.1, 1.1, None, "x")),
        ("log_uniform: [0.1, 1]", (0.1, 1), (0, 2)),
        ("integers: [2, 4]", (2, 4), (1, 5)),
        ("choice: [sigmoid, 5]", ("sigmoid", 5, 5.0), (4, None)),
    ],
)
def test_what_a_domain_holds(kind, inside, outside, write):
    text = f"space: {{distillation.lambda_ins: {{{kind}}}}}\n"
    domain = load_space(write(text), run()).space["distillation.lambda_ins"]
    assert all(domain.holds(value) for value in inside)
    assert not any(domain.holds(value) for value in outside)


def test_a_value_is_told_as_the_list_has_it():
    domain = Domain(choice=(0.5, 5, [1, 2]))
    assert repr(domain.listed(5.0)) == "5"
    assert domain.listed([1, 2]) == [1, 2]
    assert domain.listed(7) == 7


def test_own_values_are_those_of_the_recipe(write):
    space = load_space(write("space:\n  lora.targets: [[q], [v]]\n  fusion.low_rank: [3]\n"), run())
    assert own_values(space, run()) == {
        "lora.targets": ["q", "k", "v", "o"],
        "fusion.low_rank": None,
    }
    assert own_texts(space, run()) == {
        "lora.targets": "[q, k, v, o]",
        "fusion.low_rank": "null",
    }


def test_values_of_a_trial_as_text():
    assert texts({"a": "[q, v]", "b": 0.5, "c": 3}) == {"a": "[q, v]", "b": "0.5", "c": "3"}


GRID = "search: grid\n"
TPE = "search: tpe\n"
RATE = "finetune.optimizer.learning_rate"
BAD = {
    "an unknown search": (
        "search: gird\n" + RANKS,
        ("mine.yaml:1: search='gird'", "Did you mean 'grid'?"),
    ),
    "an unknown field of the recipe": (
        "space:\n  lora.rank: [4]\n  lora.rnak: [4]\n",
        ("mine.yaml:3: space: 'rnak' is not a field of lora.", "Did you mean 'rank'?"),
    ),
    "an unknown field of the space": (
        "serach: grid\n" + RANKS,
        ("mine.yaml:1: 'serach' is not a field of a space.", "Did you mean 'search'?"),
    ),
    "an unknown kind of range": (
        "space:\n  lora.alpha: {unifrom: [0, 1]}\n",
        ("mine.yaml:2: 'unifrom' is not a field of space.lora.alpha.", "Did you mean 'uniform'?"),
    ),
    "a wrong value": (
        "space:\n  lora.rank: [4, -1]\n",
        ("mine.yaml:2: space: lora.rank=-1 should be greater than 0.",),
    ),
    "a wrong end of a range": (
        f"space:\n  {RATE}: {{uniform: [0, 1]}}\n",
        (f"mine.yaml:2: space: {RATE}=0", "should be greater than 0."),
    ),
    "a range of fractions for an integer": (
        "space:\n  lora.rank: {uniform: [2, 8]}\n",
        ("mine.yaml:2: space: lora.rank=3.9", "should be a valid integer"),
    ),
    "a logarithm of nothing": (
        "space:\n  lora.alpha: {log_uniform: [0, 1]}\n",
        ("mine.yaml:2: space.lora.alpha.log_uniform.0=0 should be greater than 0.",),
    ),
    "a value that does not fit the recipe": (
        "space:\n  hypernetwork.width: [128, 130]\n",
        ("mine.yaml:2: space: hypernetwork.width=130 is not a multiple of hypernetwork.heads=4",),
    ),
    "one value instead of several": (
        "space:\n  lora.rank: 4\n",
        ("mine.yaml:2: space.lora.rank=4 should be a section", "choice, uniform, log_uniform"),
    ),
    "fields without their names": (
        "space:\n  choice: 4\n",
        ("mine.yaml:2: space.choice=4 should be a section",),
    ),
    "a range without a field": (
        "space:\n  uniform: {low: 4}\n",
        ("mine.yaml:2: 'low' is not a field of space.uniform.",),
    ),
    "two kinds of values": (
        "space:\n  lora.alpha: {uniform: [1, 2], log_uniform: [1, 2]}\n",
        ("mine.yaml:2: give a list", "not uniform and log_uniform"),
    ),
    "a range that ends before it begins": (
        "space:\n  lora.alpha: {uniform: [2, 1]}\n",
        ("mine.yaml:2: uniform=[2.0, 1.0]: give two ends, the first below the second",),
    ),
    "a range without an end": (
        "space:\n  lora.alpha: {uniform: [1]}\n",
        ("mine.yaml:2: space.lora.alpha.uniform=[1] should",),
    ),
    "a range in a grid": (
        GRID + "space:\n  lora.rank: [4]\n  lora.alpha: {uniform: [1, 2]}\n",
        ("mine.yaml:4: space.lora.alpha: search=grid needs a list of values, not a range",),
    ),
    "trials of a grid": (
        GRID + "trials: 5\n" + RANKS,
        ("mine.yaml:2: trials=5 would not be read: search=grid tries every combination",),
    ),
    "no fields": ("search: grid\n", ("mine.yaml:1: space names no field: give fields",)),
    "an empty file": ("", ("mine.yaml:1: a space is a mapping with a field `space`",)),
    "no mapping": ("- lora.rank\n", ("mine.yaml:1: a space is a mapping with a field `space`",)),
    "a list of fields": ("space: [lora.rank]\n", ("mine.yaml:1: space=['lora.rank'] should be",)),
    "a null": ("space:\n", ("mine.yaml:1: space=null should be",)),
    "a text that is not YAML": ("search: grid\nspace: [1\n", ("mine.yaml:3: not YAML: ",)),
    "a field twice": (
        "space:\n  lora.rank: [4]\n  lora.rank: [8]\n",
        ("mine.yaml:3: 'lora.rank' stands twice, first on line 2",),
    ),
    "a value twice": (
        "space:\n  lora.alpha: [5, 5.0]\n",
        ("mine.yaml:2: space.lora.alpha.choice: 5 stands there twice: keep one",),
    ),
    "a list without values": (
        "space:\n  lora.rank: []\n",
        ("mine.yaml:2: space.lora.rank.choice=[] should have at least 1 item",),
    ),
    "a domain without values": (
        "space:\n  lora.rank: {}\n",
        ("mine.yaml:2: space.lora.rank has no values: give a list, or a range such as",),
    ),
    "a section that changes nothing of what is learnt": (
        "space:\n  resources.workers: [1, 2]\n",
        ("mine.yaml:2: space.resources.workers: resources changes nothing", "leave it out"),
    ),
    "the seeds": (
        "space:\n  seeds: [[0], [1]]\n",
        ("mine.yaml:2: space.seeds: seeds changes nothing", "leave it out"),
    ),
    "a section that the recipe leaves out": (
        "space:\n  backbone.architecture.d_model: [64, 128]\n",
        (
            "mine.yaml:2: space.backbone.architecture.d_model: the recipe does not set"
            " backbone.architecture, a part of which this is: set it there",
        ),
    ),
    "a name with blanks": (
        "space:\n  'lora.rank ': [4]\n",
        ("mine.yaml:2: space: 'lora.rank ' is not the name of a field: write it as",),
    ),
    "a name with a value": (
        "space:\n  'lora.rank=3 #': [4]\n",
        ("mine.yaml:2: space: 'lora.rank=3 #' is not the name of a field: write it as",),
    ),
    "a name that Python has": (
        "space:\n  copy.x: [4]\n",
        ("mine.yaml:2: space: 'copy' is not a field of a recipe.",),
    ),
    "what trials are measured by": (
        "space:\n  data.valid_fraction: [0.1, 0.2]\n",
        ("mine.yaml:2: space.data.valid_fraction: it changes what the validation loss is of",),
    ),
    "steps of trials that asha compares": (
        "space:\n  finetune.steps: [500, 1000]\n",
        ("mine.yaml:2: space.finetune.steps: scheduler=asha", "set scheduler: none"),
    ),
    "a best of nothing": (
        TPE + "scheduler: none\nobjectives: [adapter_parameters]\n" + RANKS,
        ("mine.yaml:3: objectives leaves valid_loss out, by which the best is chosen",),
    ),
    "two objectives of a random search": (
        "scheduler: none\nobjectives: [valid_loss, adapter_parameters]\n" + RANKS,
        ("mine.yaml:2: objectives=[valid_loss, adapter_parameters] needs search=tpe and",),
    ),
    "two objectives of a scheduler": (
        TPE + "objectives: [valid_loss, adapter_parameters]\n" + RANKS,
        ("mine.yaml:2: objectives=[valid_loss, adapter_parameters] needs", "scheduler=none"),
    ),
    "the recipe's own value outside": (
        TPE + "space:\n  lora.alpha: {uniform: [1, 2]}\n",
        ("mine.yaml:3: space.lora.alpha: the recipe's own value 32.0", "widen the range"),
    ),
    "the recipe's own value is none": (
        TPE + "space:\n  fusion.low_rank: {integers: [1, 8]}\n",
        ("mine.yaml:3: space.fusion.low_rank: the recipe's own value null", "widen the range"),
    ),
    "ends that no float holds": (
        f"space:\n  lora.rank: {{integers: [{'9' * 400}, 1]}}\n",
        ("mine.yaml:2: ", "give two ends, the first below the second"),
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_a_wrong_space_is_one_sentence_with_its_place_and_cure(what, write):
    text, expected = BAD[what]
    problem = refusal(write(text), run())
    assert problem.startswith(expected[0])
    assert [part for part in expected if part not in problem] == []


def test_every_problem_is_told_at_once(write):
    text = "search: gird\nspace:\n  lora.rnak: [1]\n  lora.alpha: {uniform: [2, 1]}\n"
    places = [problem.split(": ")[0] for problem in refused(write(text), run())]
    assert places == ["mine.yaml:1", "mine.yaml:4"]
    both = refused(write("space:\n  lora.rnak: [1]\n  lora.rank: [0, -1]\n"), run())
    assert [problem.split(": ")[0] for problem in both] == ["mine.yaml:2"] + ["mine.yaml:3"] * 2


def test_asha_needs_validations_before_the_end(write):
    path = write(RANKS)
    for never in ("0", "1200"):
        problem = refusal(path, run("demo", f"finetune.valid_every={never}"))
        assert problem.startswith("mine.yaml:1: scheduler=asha compares trials at every validation")
        assert f"finetune.valid_every={never} of finetune.steps=1200" in problem
        assert "set finetune.valid_every=150, or scheduler: none" in problem
    load_space(write(RANKS + "scheduler: none\n"), run("demo", "finetune.valid_every=0"))


def test_the_method_has_to_be_a_variant(write):
    only = run(
        "demo",
        "variants={alone: {}}",
        "evaluation.systems=[alone]",
    ).model_copy(update={"variants": {"alone": run().variants["tagi"]}})
    problem = refusal(write(RANKS), only)
    assert problem == "mine.yaml:1: variants has no tagi, which a sweep trains: add `tagi: {}`"


def test_a_field_that_the_methods_variant_sets_would_not_be_read(write):
    path = write("space:\n  fusion.kind: [none, concat]\n  fusion.shared: [true, false]\n")
    problem = refusal(path, run("demo", "variants.tagi.fusion.kind=cross_attention"))
    assert problem == (
        "mine.yaml:2: space.fusion.kind would not be read: variants.tagi of the recipe sets"
        " fusion.kind: leave it out there"
    )


def test_the_sweeps_folder_and_its_best_run_have_to_have_a_name(write):
    for name in ("Mine.yaml", f"{'x' * 55}.yaml"):
        problem = refusal(write(RANKS, name), run())
        assert f"cannot be named demo_{Path(name).stem}_best: use at most" in problem


def test_a_space_that_is_not_there(tmp_path):
    problem = refusal("lambda1_rnak", run())
    assert problem.startswith("--space lambda1_rnak: there is no such space.")
    assert "Did you mean 'lambda1_rank'?" in problem
    assert all(name in problem for name in names())
    assert "there is no such space" in refusal(str(tmp_path / "none.yaml"), run())
    assert "there is no such space" in refusal(f"{tmp_path}/", run())


def test_a_file_that_is_not_text(tmp_path):
    path = tmp_path / "latin.yaml"
    path.write_bytes(b"search: \xe9\n")
    assert refusal(str(path), run()).startswith(f"{path}: cannot be read as UTF-8 text: ")


VOCABULARY = """
    search trials objectives scheduler concurrent retries seed seeds name space grid tpe random
    asha none auto lora.rank lora.targets lora backbone.architecture.d_model fusion.low_rank
    distillation.lambda_ins sigmoid choice uniform log_uniform integers valid_loss ~ true 0 1 -1
    2.5 1e4 .inf .nan variants.tagi copy.x seeds.0 finetune.optimizer
"""
WORDS = st.sampled_from(VOCABULARY.split())
NESTED = st.recursive(
    WORDS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda items: f"[{', '.join(items)}]"),
        st.dictionaries(WORDS, inner, max_size=3).map(
            lambda items: f"{{{', '.join(f'{k}: {v}' for k, v in items.items())}}}"
        ),
    ),
    max_leaves=8,
)
FIELDS = st.dictionaries(WORDS, NESTED, max_size=4).map(
    lambda items: "".join(f"{key}: {value}\n" for key, value in items.items())
)
LISTED = st.dictionaries(WORDS, NESTED, min_size=1, max_size=3).map(
    lambda items: "space:\n" + "".join(f"  {key}: {value}\n" for key, value in items.items())
)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text() | FIELDS | LISTED | st.tuples(FIELDS, LISTED).map("".join))
@example('space: {lora.rank: ["\\ud800"]}')
@example(f"space: {'[' * 500}")
@example(f"space: {{lora.rank: {'[' * 300}{']' * 300}}}")
@example(f"space: {{lora.rank: [{'9' * 400}]}}")
@example(f"space: {{lora.alpha: {{uniform: [1, {'9' * 400}]}}}}")
@example("space: {lora.rank: [1, true, .nan]}")
@example("space: {lora: [{rank: 3}], fusion: [{kind: none}]}\nscheduler: none")
def test_any_text_is_a_space_or_is_refused(tmp_path, text):
    path = tmp_path / "any.yaml"
    path.write_text(text, encoding="utf-8", errors="replace")
    try:
        space = load_space(str(path), EXPERIMENT)
    except ConfigError:
        return
    path.write_text(as_text(space), encoding="utf-8")
    assert load_space(str(path), EXPERIMENT) == space


EXPERIMENT = run()
