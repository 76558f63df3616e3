"""Variants of the method: what they change, what is trained of them, and what they share."""

from itertools import islice
from pathlib import Path

import pytest

from tagi_ray import recipes
from tagi_ray.pipeline import _hypernetworks
from tagi_ray.stages import StageSpec, pretrained_variant
from tagi_ray.synthetic import HELD_OUT, dictionary, solve, texts, world
from tagi_ray.systems import changes, plan_of

TABLE_4 = {
    "no_pretraining", "no_fusion", "no_label_loss", "no_kl", "no_alignment", "no_hypernetwork",
    "hint", "hypertuning", "lora_tuning", "prefix_tuning",
}  # fmt: skip


@pytest.fixture(scope="module")
def ablation():
    return recipes.load("demo_ablation")


def test_every_row_of_table_4_is_a_variant(ablation):
    assert set(ablation.variants) > TABLE_4
    asked = {"no_pretraining", "no_fusion", "no_kl", "no_alignment", "factor_alignment"}
    assert asked | {"tagi", "no_hypernetwork"} <= set(ablation.scored_variants())
    assert len(ablation.seeds) >= 3
    varied = {name: ablation.varied(name) for name in ablation.variants}
    assert varied["tagi"] == ablation
    assert varied["no_fusion"].fusion.kind == "none"
    assert varied["no_kl"].distillation.lambda_kl == 0
    assert varied["no_alignment"].distillation.lambda_ins == 0
    assert varied["no_label_loss"].distillation.lambda_pred == 0
    assert varied["factor_alignment"].distillation.alignment == "factors"
    assert varied["no_hypernetwork"].hypernetwork.generator == "none"
    assert not varied["no_pretraining"].pretrain.enabled
    for name in ("lora_tuning", "prefix_tuning"):
        assert varied[name].distillation.student_prompt == "full"
        assert varied[name].fusion.kind == "none"
    prefix = varied["prefix_tuning"].hypernetwork
    assert (prefix.generator, prefix.capacity) == ("prefix", 32)


def test_a_variant_changes_the_fields_it_names_and_nothing_else(ablation):
    for name in ablation.variants:
        varied, told = ablation.varied(name).model_dump(), []
        for section, before in ablation.model_dump().items():
            if before != varied[section]:
                told += [f"{section}.{f}" for f in before if before[f] != varied[section][f]]
        assert sorted(told) == sorted(one.partition("=")[0] for one in changes(name, ablation))


def test_variants_that_pretraining_cannot_tell_apart_share_it(ablation):
    shared = {"tagi", "no_label_loss", "no_kl", "no_alignment", "factor_alignment"}
    assert {v for v in shared if pretrained_variant(ablation, v) == "tagi"} == shared
    assert pretrained_variant(ablation, "no_fusion") == "no_fusion"
    spec = StageSpec(ablation, "finetune", Path("run"), 1, "no_kl")
    assert spec.pretrained is not None
    assert (spec.pretrained.name, spec.pretrained.seed) == ("pretrain_tagi", 1)
    assert spec.pretrained.varied.distillation.lambda_kl == 5
    without = StageSpec(ablation, "finetune", Path("run"), 0, "no_pretraining")
    assert without.pretrained is None


def test_only_the_variants_that_systems_name_are_trained(ablation):
    some = recipes.load(
        "demo_ablation", ["evaluation.systems=[base, no_kl, no_pretraining_shuffled]"]
    )
    trained = [(s.seed, s.variant) for s in _hypernetworks(some, Path("run"), "finetune")]
    assert trained == [(s, v) for s in (0, 1, 2) for v in ("no_pretraining", "no_kl")]
    pretrained = [(s.seed, s.variant) for s in _hypernetworks(some, Path("run"), "pretrain")]
    assert pretrained == [(s, "tagi") for s in (0, 1, 2)]


def test_a_system_that_tunes_on_prompts_is_scored_on_prompts(ablation):
    assert plan_of("lora_tuning", ablation).prompt == "full"
    assert plan_of("tagi", ablation).prompt == "input"


def test_raw_text_of_the_world_tells_of_training_tasks_alone():
    built, words = world(), dictionary(0)
    held_out = {d for t in built.tasks if built.split[t.name] != "train" for d in t.definitions}
    seen = set()
    for text in islice(texts(), 400):
        definition, *instances = text.removeprefix("Definition: ").split(" Input: ")
        assert definition not in held_out
        (task,) = [t for t in built.tasks if definition in t.definitions]
        for instance in instances:
            row, answer = instance.removesuffix(".").split(". Output: ")
            assert solve(row.split(), built.parts[task.name], words) == answer
        seen.add(task.name)
    assert len(seen) > 80
    assert sum(HELD_OUT.values()) == 28
