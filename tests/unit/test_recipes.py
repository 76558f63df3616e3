from __future__ import annotations

import json
import math
from pathlib import Path

import jsonschema
import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from tagi_ray import recipes
from tagi_ray.errors import ConfigError
from tagi_ray.recipes import yaml_source

SMALL = ("sni_small", "sni_small_decoder")
NEEDS = {key: ["data.path=tasks", "data.test_tasks_file=test_tasks.txt"] for key in SMALL}
FOLDER = Path(recipes.__file__).parent


def problems(name: str | Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        recipes.load(str(name), list(overrides))
    return caught.value.problems


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write_recipe(text: str, name: str = "mine.yaml") -> str:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return name

    return write_recipe


@pytest.mark.parametrize("name", recipes.names())
def test_every_shipped_recipe_resolves(name):
    assert recipes.load(name, NEEDS.get(name, [])).name == name


# Table 6: backbone, instances in a step (batch x accumulation), rate, longest input and output.
TABLE_6 = [
    ("sni_t5_base", "google/t5-base-lm-adapt", 8 * 2, 1e-4, 1024, 128),
    ("sni_t5_xl", "google/t5-xl-lm-adapt", 2 * 4, 5e-5, 1024, 128),
    ("sni_t5_xxl", "google/t5-xxl-lm-adapt", 1 * 2, 5e-5, 1024, 128),
    ("p3_t5_base", "google/t5-base-lm-adapt", 8 * 2, 1e-4, 512, 64),
    ("p3_t5_large", "google/t5-large-lm-adapt", 4 * 4, 1e-4, 512, 64),
    ("p3_t5_xl", "google/t5-xl-lm-adapt", 2 * 4, 5e-5, 512, 64),
    ("sni_flan_t5_small", "google/flan-t5-small", 8 * 2, 1e-4, 1024, 128),
]
WITHOUT_TEACHERS = {"sni_t5_xxl"}
"""Whose ZeRO-3 leaves pretraining no Adafactor either."""


@pytest.mark.parametrize(("name", "backbone", "batch", "rate", "longest", "output"), TABLE_6)
def test_finetuning_has_the_values_of_table_6(name, backbone, batch, rate, longest, output):
    run = recipes.load(name)
    stage, data = run.finetune, run.data
    assert run.backbone.path == backbone
    assert (stage.steps, stage.groups * stage.instances) == (20000, batch)
    assert (stage.optimizer.name, stage.optimizer.learning_rate) == ("adamw", rate)
    assert stage.optimizer.warmup_fraction == 0.02
    assert run.backbone.dtype == "bfloat16"
    assert (run.lora.rank, run.lora.targets) == (32, ("q", "v"))
    longest_texts = (data.max_instruction_tokens, data.max_input_tokens, data.max_prompt_tokens)
    assert (longest_texts, data.max_target_tokens) == ((longest,) * 3, output)
    assert run.distillation.lambda_kl == 5.0
    assert run.distillation.lambda_ins == (0 if name in WITHOUT_TEACHERS else "sigmoid")


@pytest.mark.parametrize("name", [row[0] for row in TABLE_6])
def test_teachers_and_pretraining_have_the_values_of_table_6(name):
    run = recipes.load(name)
    teachers, categories = run.teachers, run.data.train_categories
    assert teachers.enabled == (name not in WITHOUT_TEACHERS)
    assert (teachers.per, teachers.steps) == ("category", 10000)
    assert categories == (36 if name.startswith("p3") else 60)
    assert teachers.groups * teachers.instances == categories * 8 * 2
    assert (teachers.optimizer.name, teachers.optimizer.learning_rate) == ("adamw", 1e-4)
    pretrain = run.pretrain
    assert pretrain.enabled
    assert (pretrain.steps, pretrain.groups * pretrain.instances) == (50000, 8)
    assert (pretrain.max_tokens, pretrain.dtype) == (1024, "float32")
    optimizer = (pretrain.optimizer.name, pretrain.optimizer.learning_rate)
    assert optimizer == (("adamw", 1e-4) if name in WITHOUT_TEACHERS else ("adafactor", 1e-3))
    assert (run.resources.zero_stage == 3) == (name in WITHOUT_TEACHERS)


# Layers, heads of queries and of keys and values, features of a head and of the model.
DECODERS = [
    ("sni_llama_1b", "meta-llama/Llama-3.2-1B", "llama", (16, 32, 8, 64, 2048)),
    ("sni_qwen_0_6b", "Qwen/Qwen3-0.6B", "qwen3", (28, 16, 8, 128, 1024)),
    ("sni_mistral_7b", "mistralai/Mistral-7B-v0.3", "mistral", (32, 32, 8, 128, 4096)),
]


@pytest.mark.parametrize(("name", "path", "family", "shape"), DECODERS)
def test_decoder_only_recipes_differ_from_the_paper_in_what_the_family_asks_for(
    name, path, family, shape
):
    run, paper = recipes.load(name), recipes.load("sni_t5_base")
    one = run.backbone.architecture
    assert one is not None
    assert (run.backbone.path, one.family, run.fusion.kind) == (path, family, "kv_prefix")
    assert (one.layers, one.heads, one.kv_heads, one.d_kv, one.d_model) == shape
    assert run.lora == paper.lora.model_copy(update={"targets": ("q_proj", "v_proj")})
    assert (run.data, run.teachers, run.finetune) == (paper.data, paper.teachers, paper.finetune)


def test_p3_holds_out_the_eleven_tasks_of_t0():
    held_out = recipes.load("p3_t5_base").data.test_categories
    assert len(held_out) == 11
    assert {"anli_r1", "anli_r2", "anli_r3", "hellaswag", "story_cloze_2016"} < set(held_out)


def test_demo_controls_asks_for_all_controls_and_seeds():
    demo, controls = recipes.load("demo"), recipes.load("demo_controls")
    assert controls.seeds == (0, 1, 2)
    assert set(controls.variants) == {"tagi", "adapter_only", "fusion_only"}
    assert {
        "metatrain",
        "adapter_only",
        "adapter_only_shuffled",
        "fusion_only",
        "fusion_only_shuffled",
    } <= set(controls.evaluation.systems)
    assert controls.finetune.optimizer == demo.finetune.optimizer
    assert controls.metatrain == demo.metatrain


def test_sni_small_names_the_overrides_it_needs():
    found = problems("sni_small")
    assert len(found) == 2
    assert "give data.path=" in found[0]
    assert "give data.test_tasks_file=" in found[1]


def test_all_problems_are_reported_at_once_with_their_place(write, monkeypatch):
    monkeypatch.delenv("NO_VARIABLE", raising=False)
    recipe = write(
        """\
name: mine
finetune:
  optimizer: {learning_rat: 1e-4}
  groups: 7
lora:
  rank: -1
  alpha: 1
  alpha: 2
data:
  source: sinthetic
backbone:
  path: ${NO_VARIABLE}/t5
storage: !!python/object/apply:os.system [ls]
"""
    )
    found = problems(recipe, "teachers.steps=many", "metatrain.groups=9", "lora", "seeds=[0, a]")
    expected = [
        "mine.yaml:3: 'learning_rat' is not a field of finetune.optimizer."
        " Did you mean 'learning_rate'?",
        "mine.yaml:4: finetune.groups=7 is not a multiple of"
        " finetune.micro_groups=8 x resources.workers=1",
        "mine.yaml:6: lora.rank=-1 should be greater than 0.",
        "mine.yaml:8: 'alpha' stands twice, first on line 7",
        "mine.yaml:12: the environment variable 'NO_VARIABLE' of ${NO_VARIABLE} is not set",
        "command line: teachers.steps='many' should be a valid integer.",
        "command line: metatrain.groups=9 is not a multiple of"
        " metatrain.micro_groups=8 x resources.workers=1",
        "command line: 'lora' is not section.field=value",
        "command line: seeds.1='a' should be a valid integer.",
    ]
    assert [line for line in expected if line not in found] == []
    assert any(
        line.startswith("mine.yaml:10: data.source='sinthetic'")
        and line.endswith("Did you mean 'synthetic'?")
        for line in found
    )
    assert any(line.startswith("mine.yaml:13: the tag !!python") for line in found)
    assert not any("\n" in line for line in found)


def test_a_check_between_fields_says_nothing_of_a_field_that_is_wrong_itself(write):
    found = problems(write("base: demo\nfinetune: {groups: x, micro_groups: 3}\n"))
    assert found == ["mine.yaml:2: finetune.groups='x' should be a valid integer."]


def test_the_command_line_is_blamed_for_the_conflict_it_makes():
    (found,) = problems("demo", "evaluation.systems=[fusion_only]")
    assert found.startswith("command line: evaluation.systems asks for 'fusion_only'")


def test_a_known_field_in_the_wrong_section_is_pointed_out():
    (found,) = problems("demo", "finetune.learning_rate=1e-4")
    assert found.endswith("Did you mean 'finetune.optimizer.learning_rate'?")


def test_an_unknown_field_like_no_other_gets_the_list():
    (found,) = problems("demo", "lora.zzz=1")
    assert found.endswith("Its fields: rank, alpha, targets, start_seed")


def test_unknown_recipe():
    (found,) = problems("demo_control")
    assert "Did you mean 'demo_controls'?" in found
    assert all(name in found for name in recipes.names())


def test_missing_file_and_text_that_is_not_yaml(write):
    assert problems("nowhere/x.yaml") == ["command line: there is no recipe file 'nowhere/x.yaml'"]
    (found,) = problems(write("lora: [1\nx: 2\n"))
    assert found.startswith("mine.yaml:2: not YAML")
    assert "a mapping of sections" in problems(write("- 1\n"))[0]
    (tmp := Path("latin.yaml")).write_bytes(b"name: \xe9\n")
    assert "cannot be read as UTF-8" in problems(tmp)[0]


def test_a_field_of_a_variant_without_the_variants_name():
    (found,) = problems("demo", "variants={tagi: {}, fusion: 5}")
    assert found == (
        "command line: variants.fusion=5 should be a section with fields among: hypernetwork,"
        " fusion, distillation, pretrain"
    )


def test_settings_of_a_run_changed():
    variants = "variants={tagi: {}, other: {fusion: {kind: concat}}}"
    run = recipes.load("demo", ["lora.targets=[q, v]", variants])
    assert recipes.changed(run, []) == run
    changed = recipes.changed(run, ["lora.rank=4", "lora.targets=[k]", "lora.rank=1e1"])
    assert changed.lora == run.lora.model_copy(update={"rank": 10, "targets": ("k",)})
    assert changed.model_copy(update={"lora": run.lora}) == run
    assert changed == recipes.load("demo", ["lora.rank=10", "lora.targets=[k]", variants])


def test_changes_of_a_run_are_refused_as_overrides_are():
    run = recipes.load("demo")
    with pytest.raises(ConfigError) as caught:
        recipes.changed(run, ["lora.rank=0", "lora.rnak=1", "lora", "finetune.groups=7"])
    assert sorted(caught.value.problems) == [
        "command line: 'lora' is not section.field=value",
        "command line: 'rnak' is not a field of lora. Did you mean 'rank'?",
        "command line: finetune.groups=7 is not a multiple of finetune.micro_groups=4 x"
        " resources.workers=2",
        "command line: lora.rank=0 should be greater than 0.",
    ]


def test_deltas_on_deltas(write):
    write("base: demo\nname: other\nlora: {rank: 4, alpha: 8}\n", "first.yaml")
    experiment = recipes.load(write("base: first\nlora: {rank: 2}\n"))
    assert (experiment.lora.rank, experiment.lora.alpha) == (2, 8.0)
    assert experiment.lora.targets == recipes.load("demo").lora.targets
    assert experiment.name == "mine"


def test_a_circle_of_bases(write):
    write("base: mine\n", "first.yaml")
    (found,) = problems(write("base: first\n"))
    assert found == "first.yaml:1: base goes in a circle: mine -> first -> mine"


def test_overrides_are_yaml_and_the_last_one_holds():
    experiment = recipes.load(
        "demo",
        ["lora.targets=[q,v]", "lora.rank=1e1", "lora.rank=8", "backbone.path=a=b", "name=no"],
    )
    assert experiment.lora.targets == ("q", "v")
    assert experiment.lora.rank == 8
    assert experiment.backbone.path == "a=b"
    assert experiment.name == "no"


@pytest.mark.parametrize("text", ["true", "012", "0o14", "1_000", "1:30", "'8'", "8.5", ".inf"])
def test_what_only_looks_like_an_integer_is_refused(text):
    (found,) = problems("demo", f"lora.rank={text}")
    assert found.startswith("command line: lora.rank=")


def test_infinite_and_missing_numbers_are_refused():
    for text in (".inf", ".nan", "null", "1e999"):
        assert len(problems("demo", f"lora.alpha={text}")) == 1


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        ("1e4", 1e4),
        ("5.e-3", 5e-3),
        (".5", 0.5),
        ("-1.5e+3", -1500.0),
        ("+7", 7),
        ("no", "no"),
        ("on", "on"),
        ("Yes", "Yes"),
        ("012", "012"),
        ("2024-01-01", "2024-01-01"),
        ("true", True),
        ("~", None),
        ("", None),
    ],
)
def test_scalars(text, value):
    parsed = yaml_source.parse(f"x: {text}")
    assert not parsed.problems
    assert parsed.value == {"x": value}
    assert type(parsed.value["x"]) is type(value)


def test_aliases_are_refused_so_that_a_small_file_stays_small():
    bomb = "a: &a [x]\nb: &b [*a, *a]\nc: [*b, *b]\n"
    parsed = yaml_source.parse(bomb)
    assert {line for line, _ in parsed.problems} == {1, 2}


def test_environment_variables(monkeypatch):
    monkeypatch.setenv("TAGI_RANK", "4")
    monkeypatch.setenv("TAGI_FOLDER", "here: there")
    experiment = recipes.load("demo", ["lora.rank=${TAGI_RANK}", "storage=${TAGI_FOLDER}/runs"])
    assert experiment.lora.rank == 4
    assert experiment.storage == "here: there/runs"
    assert problems("demo", "lora.rank='${TAGI_RANK}'")  # quoted: a string


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"])).filter(lambda text: "${" not in text)
    | st.sampled_from(["no", "1e4", "012", "~", "null", "1_0", "0x1F", "<<", "=", "- a", "1.e5"])
)


@given(st.dictionaries(st.text("abc_", min_size=1), SCALARS | st.lists(SCALARS)))
@example({"a": "one\x85two\u2028three\u2029four"})
def test_what_is_dumped_is_read_back(values):
    parsed = yaml_source.parse(yaml_source.dump(values))
    assert not parsed.problems
    assert parsed.value == values
    assert repr(parsed.value) == repr(values)  # 1 is not True, nor 1.0


@given(st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text("ab"), inner)))
@example("one\x85two\u2028three\u2029four")
@example("a" * 200 + " b" * 100)
@example("...")
@example("one\n\n two\n")
@example(["one\ntwo"])
def test_a_value_on_one_line_is_read_back(value):
    text = yaml_source.inline(value)
    assert "\n" not in text
    parsed = yaml_source.parse(text)
    assert not parsed.problems
    assert repr(parsed.value) == repr(value)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (["q", "v"], "[q, v]"),
        (0.5, "0.5"),
        (None, "null"),
        (True, "true"),
        ("sigmoid", "sigmoid"),
        ("5", "'5'"),
        ("", "''"),
        ({"a": [1, {"b": 2}]}, "{a: [1, {b: 2}]}"),
    ],
)
def test_a_value_on_one_line(value, text):
    assert yaml_source.inline(value) == text


def test_not_a_number_is_dumped_too():
    assert math.isnan(yaml_source.parse(yaml_source.dump({"x": math.nan})).value["x"])


@pytest.mark.parametrize("name", recipes.names())
def test_a_resolved_run_is_a_recipe(name, write):
    experiment = recipes.load(name, NEEDS.get(name, []))
    assert recipes.load(write(recipes.dump(experiment), "config.yaml")) == experiment


def test_schema_is_in_sync():
    shipped = json.loads((FOLDER / "schema.json").read_text(encoding="utf-8"))
    assert shipped == recipes.json_schema(), "refresh it: python -m tagi_ray.recipes"


@pytest.mark.parametrize("name", recipes.names())
def test_schema_accepts_the_shipped_recipes(name):
    text = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    assert text.startswith("# yaml-language-server: $schema=schema.json\n")
    jsonschema.validate(yaml_source.parse(text).value, recipes.json_schema())


def test_schema_refuses_what_recipes_refuse():
    for wrong in ({"lora": {"rnak": 1}}, {"lora": {"rank": 0}}, {"bsae": "demo"}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, recipes.json_schema())


def test_dumped_text_is_plain_yaml():
    experiment = recipes.load("demo")
    assert yaml.safe_load(recipes.dump(experiment))["lora"]["rank"] == experiment.lora.rank
