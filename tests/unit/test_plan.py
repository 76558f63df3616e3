"""What a run would take: counted against models that exist, and against arithmetic by hand."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from tagi_ray import objectives, recipes
from tagi_ray.batches import Batch
from tagi_ray.config import Experiment
from tagi_ray.errors import ConfigError
from tagi_ray.footprint import Kind, Lengths, measure, meta_bank, meta_model
from tagi_ray.model import build_model
from tagi_ray.plan import Plan, as_text, plan
from tagi_ray.sections import BackboneSettings
from tagi_ray.vocabulary import prepare_tokenizer

ROOT = Path(__file__).parents[2]
SMALL = ("sni_small", "sni_small_decoder")
NEEDS = {key: ["data.path=tasks", "data.test_tasks_file=test_tasks.txt"] for key in SMALL}
FOR_GPUS = [n for n in recipes.names() if n.startswith(("sni_", "p3_")) and n not in SMALL]
GPU = 80 * 10**9


@cache
def planned(name: str, *overrides: str) -> Plan:
    return plan(recipes.load(name, [*NEEDS.get(name, []), *overrides]))


@pytest.mark.parametrize("name", recipes.names())
def test_every_shipped_recipe_plans(name):
    made = planned(name)
    for stage in made.stages:
        chosen = stage.at(stage.zero_stage)
        assert chosen.peak >= chosen.weights + chosen.optimizer > 0
        assert chosen.activations > 0
    text = as_text(made)
    assert text.startswith(f"{name}: {made.workers} workers")
    assert all(f"\n{stage.kind}: " in text for stage in made.stages)


@pytest.mark.parametrize("name", FOR_GPUS)
def test_large_runs_fit_gpus_of_80_gb(name):
    for stage in planned(name).stages:
        assert stage.at(stage.zero_stage).peak < 0.9 * GPU, stage.kind


@pytest.mark.parametrize(
    ("name", "millions", "sites"),
    [
        ("sni_t5_base", 3.54, 72),
        ("p3_t5_large", 9.44, 144),
        ("sni_t5_xl", 18.9, 144),
        ("sni_t5_xxl", 37.7, 144),
    ],
)
def test_generated_numbers_of_a_task_are_those_of_the_paper(name, millions, sites):
    assert planned(name).sites == sites
    assert planned(name).generated / 1e6 == pytest.approx(millions, rel=2e-3)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("demo", []),
        ("sni_small", ["backbone.architecture.vocabulary=4096"]),
        ("sni_flan_t5_small", ["backbone.path=random"]),
        ("sni_t5_base", ["backbone.path=random", "backbone.dtype=float32"]),
        ("sni_qwen_0_6b", ["backbone.path=random", "backbone.architecture.layers=2"]),
    ],
)
def test_planned_parameters_are_those_of_the_model_that_is_built(name, overrides, tmp_path):
    prepare_tokenizer(BackboneSettings(path="demo"), tmp_path / "shards", tmp_path / "tokenizer")
    experiment = recipes.load(name, [*NEEDS.get(name, []), *overrides])
    model = build_model(experiment, tmp_path / "tokenizer", "hypernetwork", 0)
    made = planned(name, *overrides)
    assert made.backbone == sum(p.numel() for p in model.backbone.parameters())
    assert made.hypernetwork == sum(p.numel() for p in model.trainable().values())
    assert made.stage("finetune").frozen == made.backbone
    assert made.stage("metatrain").trained == made.backbone
    model.backbone.requires_grad_(True)
    assert made.stage("metatrain").frozen == 0


def by_hand(experiment: Experiment) -> dict[str, int]:
    """Parameters of a tied, gated T5 with q and v as sites, of its hypernetwork and fusion."""
    shape, lora, hyper = experiment.backbone.architecture, experiment.lora, experiment.hypernetwork
    assert shape is not None
    d, ff, inner, n = shape.d_model, shape.d_ff, shape.heads * shape.d_kv, shape.layers
    attention = 4 * d * inner
    block = attention + 3 * d * ff + 2 * d
    backbone = (
        shape.vocabulary * d  # pyright: ignore[reportOptionalOperand]
        + n * block
        + n * (block + attention + d)
        + 2 * (32 * shape.heads + d)  # relative positions, last norm
    )
    w = hyper.width
    trunk_block = 3 * 2 * w + 2 * (4 * w * w + 4 * w) + (8 * w * w + 5 * w)
    mix = w * lora.rank * hyper.capacity + lora.rank * hyper.capacity
    sites = 6 * n
    basis = sites * hyper.capacity * (d + inner)
    network = (
        (3 * n + 2 + 2) * w  # places of sites: one for each attention, module and side
        + (2 * d + d * w + w)
        + hyper.layers * trunk_block
        + 2 * w
        + 2 * mix
        + basis
    )
    network += n * (2 * d + 4 * d * inner)  # the cross-attention of each encoder block
    factors = sites * lora.rank * (d + inner)
    start = sites * lora.rank * d
    return {"backbone": backbone, "network": network, "factors": factors, "start": start}


def test_rows_of_every_zero_stage_are_what_arithmetic_says():
    overrides = (
        "backbone.path=random",
        "backbone.architecture={d_model: 48, d_ff: 80, d_kv: 16, heads: 2, layers: 3,"
        " vocabulary: 512, feed_forward: gated-gelu}",
        "backbone.dtype=bfloat16",
        "lora={rank: 4, alpha: 8, targets: [q, v]}",
        "hypernetwork={width: 32, layers: 2, heads: 2, capacity: 8}",
        "resources.workers=4",
        "pretrain.micro_groups=2",
        "teachers.micro_groups=23",
        "teachers.groups=92",
        "oracle.micro_groups=5",
        "finetune.micro_groups=2",
        "metatrain.micro_groups=2",
    )
    experiment, made = recipes.load("demo", list(overrides)), planned("demo", *overrides)
    hand = by_hand(experiment)
    assert (made.backbone, made.hypernetwork) == (hand["backbone"], hand["network"])
    assert made.generated == hand["factors"]
    frozen, trained, start = 2 * hand["backbone"], hand["network"], 4 * hand["start"]
    quarter = -(-trained // 4)
    rows = made.stage("finetune").memory
    assert [row.zero_stage for row in rows] == [0, 1, 2, 3]
    assert [row.weights for row in rows] == [
        *[frozen + 4 * trained + start] * 3,
        -(-(frozen + 4 * trained) // 4) + start,
    ]
    assert [row.gradients for row in rows] == [
        4 * trained,
        8 * trained,  # from stage 1 on with the bucket that reduces them
        4 * trained + 4 * quarter,
        4 * trained + 4 * quarter,
    ]
    assert [row.optimizer for row in rows] == [8 * trained, *[12 * quarter] * 3]
    assert [row.gathered for row in rows] == [0, 0, 0, frozen + 4 * trained]
    assert {row.bank for row in rows} == {4 * 92 * hand["factors"]}

    # Weights in bfloat16 are trained by ZeRO alone, with fp32 copies beside the moments.
    whole, share = hand["backbone"], -(-hand["backbone"] // 4)
    tuned = made.stage("metatrain")
    assert tuned.zero_stage == 2
    assert [row.optimizer for row in tuned.memory] == [12 * share] * 3
    assert [row.weights for row in tuned.memory] == [2 * whole, 2 * whole, -(-2 * whole // 4)]

    teachers = made.stage("teachers")
    assert teachers.trained == 92 * hand["factors"]
    assert {row.gradients for row in teachers.memory} == {4 * teachers.trained}
    assert {row.optimizer for row in teachers.memory} == {8 * teachers.trained}


def test_memory_falls_with_the_zero_stage_where_it_must():
    made = planned("sni_t5_xl").stage("metatrain")
    one, two, three = (made.at(stage) for stage in (1, 2, 3))
    assert one.weights == two.weights > three.weights
    assert one.gradients > two.gradients == three.gradients
    assert one.peak > two.peak > three.peak
    frozen = planned("sni_t5_xxl").stage("finetune")
    assert frozen.at(0).peak > frozen.at(3).peak
    assert frozen.at(3).offloaded > 0


def test_offloaded_state_is_counted_beside_the_gpu_and_in_the_process_without_one():
    on_gpu = planned("sni_t5_xxl").stage("metatrain").at(3)
    assert on_gpu.optimizer == 0
    assert on_gpu.offloaded > 12 * planned("sni_t5_xxl").backbone // 2
    overrides = ["resources.zero_stage=3", "resources.offload_optimizer=true"]
    with_it, without = planned("demo", *overrides), planned("demo", overrides[0])
    assert with_it.stage("finetune").at(3).peak == without.stage("finetune").at(3).peak


SHAPES = {
    "t5": "feed_forward: gated-gelu, tied_embeddings: false",
    "llama": "family: llama, kv_heads: 2",
    "qwen3": "family: qwen3, kv_heads: 2, tied_embeddings: false",
    "gpt2": "family: gpt2",
}
TARGETS = {"t5": "q, v", "llama": "q_proj, v_proj", "qwen3": "q_proj, v_proj", "gpt2": "c_attn"}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["teachers", "finetune", "metatrain"])
@pytest.mark.parametrize("family", SHAPES)
def test_activations_are_those_of_a_real_step(family, kind, checkpointing, tmp_path):
    causal = family != "t5"
    prepare_tokenizer(
        BackboneSettings(path="demo"), tmp_path / "shards", tmp_path / "tokenizer", causal
    )
    experiment = recipes.load(
        "demo",
        [
            "backbone.path=random",
            "backbone.architecture={d_model: 64, d_ff: 128, d_kv: 16, heads: 4, layers: 2,"
            f" vocabulary: 1024, {SHAPES[family]}}}",
            f"lora.targets=[{TARGETS[family]}]",
            f"fusion.kind={'kv_prefix' if causal else 'concat'}",
            f"backbone.activation_checkpointing={checkpointing}",
        ],
    )
    lengths, slots = Lengths(64, 48, 96, 16), 30
    model = meta_model(experiment, kind)
    bank = None if kind == "metatrain" else meta_bank(model, experiment, slots)
    expected = measure(model, experiment, kind, lengths, bank).peak(1.0)
    real = real_peak(experiment, kind, lengths, slots, tmp_path / "tokenizer")
    assert expected == pytest.approx(real, rel=0.1)


def real_peak(
    experiment: Experiment, kind: Kind, lengths: Lengths, slots: int, tokenizer: Path
) -> int:
    """Peak of what torch's allocator gave out in one forward and backward, gradients included."""
    role = {"teachers": "teacher", "metatrain": "metatrain"}.get(kind, "hypernetwork")
    model = build_model(experiment, tokenizer, role, 0)  # pyright: ignore[reportArgumentType]
    settings, bank = experiment.stages()[kind], None
    if kind != "metatrain":
        bank = meta_bank(model, experiment, slots).map(lambda f: torch.randn(f.shape) * 0.01)
    if kind == "teachers":
        assert bank is not None
        bank = bank.map(lambda factor: factor.requires_grad_())
        objective = objectives.teacher(bank, "full")
    elif kind == "metatrain":
        objective = objectives.metatrain()
    else:
        objective = objectives.finetune(experiment.distillation, bank, "full")
    batch = full_batch(settings.micro_groups, settings.instances, lengths)
    totals = objective.denominators(batch)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled, ExitStack() as scope:  # fmt: skip
        objective.loss(model, batch, totals, scope).loss.backward()
    assert profiled.profiler is not None
    events = profiled.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    live = peak = 0
    for _, change in changes:
        live += change
        peak = max(peak, live)
    return peak


def full_batch(groups: int, instances: int, lengths: Lengths) -> Batch:
    def texts(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
        mask = torch.ones(shape, dtype=torch.bool)
        mask.view(-1)[-1] = False  # one text is shorter: without any padding there is no mask
        return torch.randint(3, 100, shape), mask

    instruction, instruction_mask = texts(groups, lengths.instruction)
    inputs, input_mask = texts(groups, instances, lengths.source)
    prompts, prompt_mask = texts(groups, instances, lengths.prompt)
    return Batch(
        instruction, instruction_mask, inputs, input_mask, prompts, prompt_mask,
        texts(groups, instances, lengths.target)[0], torch.arange(groups),
        ("",) * groups, ("",) * groups, 0, 0,
    )  # fmt: skip


def test_tokens_and_downloads_of_the_base_recipe():
    made = planned("sni_t5_base")
    assert made.stage("finetune").tokens == 16 * (1024 + 1024 + 1024 + 128)
    assert made.stage("metatrain").tokens == 16 * (1024 + 128)
    assert made.stage("teachers").tokens == 960 * (1024 + 128)
    assert (made.stage("finetune").tasks, made.stage("finetune").instances) == (16, 16)
    assert made.stage("pretrain").tokens == 8 * 1024
    assert (made.teachers, made.teachers_known) == (60, True)
    inputs = {one.field: one for one in made.inputs}
    model = inputs["backbone.path"]
    assert (model.kind, model.revision, model.size) == ("hub", "main", 4 * made.backbone)
    assert inputs["data.path"].kind == "missing"
    assert inputs["pretrain.path"].kind == "hub"
    assert "data.path=natural-instructions/tasks: is NOT there" in as_text(made)


@pytest.mark.parametrize(
    ("overrides", "texts"),
    [
        ([], 1024 + 512),
        (["distillation.logits=cached"], 512),
        (["distillation.lambda_kl=0"], 512),
        (["teachers.prompt=input"], 512),
        (["distillation.student_prompt=full"], 1024),
        (["teachers.enabled=false"], 512),
    ],
)
def test_only_the_texts_that_finetuning_reads_are_counted(overrides, texts):
    made = planned("sni_t5_base", "data.max_input_tokens=512", *overrides)
    assert made.stage("finetune").tokens == 16 * (1024 + texts + 128)


def test_a_tuned_teacher_is_listed_and_held_only_while_it_reads_batches():
    teacher = "distillation.checkpoint=demo"
    live = planned("demo", teacher, "distillation.logits=live").stage("finetune")
    cached = planned("demo", teacher, "distillation.logits=cached")
    assert live.at(0).weights - cached.stage("finetune").at(0).weights > 3e6
    named = planned("demo", "distillation.checkpoint=owner/model", "distillation.logits=cached")
    listed = {one.field: one for one in named.inputs}
    assert listed["distillation.checkpoint"].kind == "hub"


def test_what_is_there_is_not_fetched(tmp_path):
    made = planned("sni_small", f"data.path={tmp_path}")
    assert next(one for one in made.inputs if one.field == "data.path").kind == "local"
    assert planned("demo").inputs == ()
    assert as_text(planned("demo")).endswith("ships with the package\n")


def test_teachers_that_only_the_data_can_count_are_said_to_be_assumed():
    made = planned("sni_small")
    assert not made.teachers_known
    assert "assumed" in as_text(made)
    assert planned("sni_small", "data.train_categories=6").teachers == 6
    assert planned("demo").teachers == 92


def test_adafactor_has_stage_0_alone():
    assert [one.zero_stage for one in planned("sni_t5_base").stage("pretrain").memory] == [0]


def test_a_vocabulary_that_nobody_gives_is_asked_for():
    with pytest.raises(ConfigError, match=r"backbone\.architecture\.vocabulary is not set"):
        planned("demo", "backbone.path=random", "backbone.tokenizer=elsewhere")


def test_as_text_is_a_pure_function():
    made = planned("demo")
    assert as_text(made) == as_text(replace(made))


def test_the_job_prints_a_plan_and_starts_nothing(tmp_path):
    script = f"""
import runpy, socket, sys
def refuse(*arguments, **options): raise AssertionError("network")
socket.create_connection = socket.socket.connect = refuse
sys.path.insert(0, {str(ROOT)!r})
sys.argv = ["finetune.py", "sni_t5_xxl", "--plan", "lora.rank=16"]
try:
    runpy.run_path({str(ROOT / "jobs/finetune.py")!r}, run_name="__main__")
finally:
    started = {{"ray", "deepspeed"}} & set(sys.modules)
    assert not started, started
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("sni_t5_xxl: 2 workers, memory for each GPU in GiB\n")
    assert "18.87 M, at 144 sites" in done.stdout
    assert list(tmp_path.iterdir()) == []
