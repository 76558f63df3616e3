"""From nothing to scored and exported adapters, by the jobs themselves, on a tiny recipe."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import T5ForConditionalGeneration

from tagi_ray import recipes
from tagi_ray.batches import text_batch
from tagi_ray.evaluate import load_weights
from tagi_ray.export import read_adapter, read_instruction
from tagi_ray.groups import TextGroup
from tagi_ray.model import build_model
from tagi_ray.pipeline import trained_weights
from tagi_ray.report import read_records
from tagi_ray.sections import SYSTEMS
from tagi_ray.shards import read_tasks_of
from tagi_ray.vocabulary import TextTokenizer

pytestmark = pytest.mark.ray
ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "tests" / "recipes" / "tiny.yaml"


def _job(name: str, storage: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, ROOT / "jobs" / f"{name}.py", RECIPE, f"storage={storage}", *arguments],
        capture_output=True,
        text=True,
        cwd=storage,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )


@pytest.fixture(scope="module")
def storage(tmp_path_factory) -> Path:
    """A finished run of the tiny recipe."""
    folder = tmp_path_factory.mktemp("runs")
    done = _job("finetune", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "stdout.txt").write_text(done.stdout)
    return folder


@pytest.mark.timeout(600)
def test_one_command_leaves_scores_report_and_adapters(storage):
    run = storage / "tiny"
    scores = json.loads((run / "scores.json").read_text())["systems"]
    assert set(scores) == set(SYSTEMS)
    for system in scores.values():
        assert 0 <= system["exact_match"] <= 100
        assert 0 <= system["rouge_l"] <= 100
        assert (system["n_tasks"], system["n_instances"]) == (20, 60)
    assert len([path for path in (run / "adapters").iterdir() if path.is_dir()]) == 20
    assert "<svg" in (run / "report.html").read_text()
    stages = {record["stage"] for record in read_records(run / "metrics.jsonl")}
    assert stages == {"teachers", "oracle", "finetune_tagi", "metatrain_0.001", "metatrain_0.003"}
    last = [r for r in read_records(run / "metrics.jsonl") if r["stage"] == "finetune_tagi"][-1]
    assert {"cross_entropy", "kl", "alignment", "valid_loss"} <= last.keys()
    stdout = (storage / "stdout.txt").read_text()
    assert "step 6/6" in stdout
    assert "tagi_shuffled" in stdout


def _loaded(storage: Path):
    experiment = recipes.load(str(RECIPE), [f"storage={storage}"])
    run = storage / "tiny"
    model = build_model(experiment, run / "tokenizer", "hypernetwork", 0)
    load_weights(model, trained_weights(experiment, run, "tagi", 0))
    task = next(iter(read_tasks_of(run / "shards", "test")))
    group = TextGroup(
        task.task.name,
        task.task.category,
        task.task.definitions[0],
        task.task.positive_examples,
        tuple(i.input for i in task.instances),
        tuple(i.outputs[0] for i in task.instances),
    )
    tokenizer = TextTokenizer(run / "tokenizer")
    batch = text_batch([group], tokenizer, experiment.data, ("instruction", "input"))
    return experiment, model, batch, run / "adapters" / task.task.name


def test_an_exported_adapter_gives_the_same_logits_in_stock_peft(storage, recwarn):
    _, model, batch, folder = _loaded(storage)
    encoded = model.encode_instruction(batch.instruction_ids_KI, batch.instruction_mask_KI)
    with torch.no_grad(), model.backbone.bound(model.generate_bank(encoded)):
        ours = model.backbone.logits(
            batch.input_ids_KNS, batch.input_mask_KNS, batch.target_ids_KNT
        )
    plain = T5ForConditionalGeneration(model.backbone.model.config)
    plain.load_state_dict(model.backbone.model.state_dict())
    peft = PeftModel.from_pretrained(plain, folder).eval()
    assert not [w for w in recwarn if "missing" in str(w.message).lower()]
    with torch.no_grad():
        theirs = peft(
            input_ids=batch.input_ids_KNS[0],
            attention_mask=batch.input_mask_KNS[0].long(),
            labels=batch.target_ids_KNT[0],
        ).logits
    bare = model.backbone.logits(batch.input_ids_KNS, batch.input_mask_KNS, batch.target_ids_KNT)
    torch.testing.assert_close(ours[0], theirs, atol=1e-5, rtol=0)
    assert (bare[0] - theirs).abs().max() > 1e-4  # the adapter does something


def test_an_exported_directory_reloads_as_the_full_model_with_fusion(storage):
    experiment, model, batch, folder = _loaded(storage)
    lora = experiment.lora
    bank = read_adapter(
        folder, model.backbone.sites, rank=lora.rank, alpha=lora.alpha, base_model="random"
    )
    encoded = model.encode_instruction(batch.instruction_ids_KI, batch.instruction_mask_KI)
    texts = batch.input_ids_KNS, batch.input_mask_KNS, batch.target_ids_KNT
    with torch.no_grad():
        with model.backbone.bound(model.generate_bank(encoded), model.fused(encoded)):
            full = model.backbone.logits(*texts)
        with model.backbone.bound(bank, read_instruction(folder)):
            reloaded = model.backbone.logits(*texts)
        with model.backbone.bound(bank):
            alone = model.backbone.logits(*texts)
    torch.testing.assert_close(full, reloaded, atol=1e-5, rtol=0)
    assert (full - alone).abs().max() > 1e-4  # the fused instruction does something


def test_the_same_command_again_trains_nothing_and_other_settings_are_refused(storage):
    before = (storage / "tiny" / "metrics.jsonl").read_text()
    again = _job("finetune", storage)
    assert again.returncode == 0, again.stderr
    assert "teachers: all 92 are in" in again.stdout
    assert (storage / "tiny" / "metrics.jsonl").read_text() == before
    refused = _job("finetune", storage, "lora.rank=8")
    assert refused.returncode == 2
    assert "lora.rank: was 4, is 8" in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_one_command_with_cached_logits_reads_no_prompt_and_scores(storage):
    """Teachers, their logits by Ray Data, finetuning from them, scores, adapters."""
    cached = ["distillation.logits=cached", "distillation.top_k=8", "evaluation.systems=[tagi]"]
    done = _job("finetune", storage, "name=cached", *cached)
    assert done.returncode == 0, done.stdout + done.stderr
    run = storage / "cached"
    records = {name: read_records(storage / name / "metrics.jsonl") for name in ("tiny", "cached")}
    last = {n: [r for r in rs if r["stage"] == "finetune_tagi"][-1] for n, rs in records.items()}
    assert last["cached"]["kl"] > 0
    # The same groups in the same order: only the teacher's part differs, by the tokens left out.
    assert last["cached"]["cross_entropy"] == pytest.approx(last["tiny"]["cross_entropy"], rel=0.02)
    assert set(json.loads((run / "scores.json").read_text())["systems"]) == {"tagi"}
    assert len([path for path in (run / "adapters").iterdir() if path.is_dir()]) == 20
    again = _job("finetune", storage, "name=cached", *cached)
    assert again.returncode == 0, again.stderr
    assert read_records(run / "metrics.jsonl") == records["cached"]


def test_generate_writes_an_adapter_for_an_instruction_and_for_each_line(storage, tmp_path):
    one = _job(
        "generate", storage, "--instruction", "Take every tool .", f"--output={tmp_path}/one"
    )
    assert one.returncode == 0, one.stderr
    assert len(list(tmp_path.glob("one/instruction_*/adapter_model.safetensors"))) == 1
    lines = tmp_path / "lines.jsonl"
    lines.write_text(
        '{"instruction": "Take every tool .", "task": "tools"}\n{"instruction": "Say it twice ."}\n'
    )
    many = _job("generate", storage, f"--path={lines}", f"--output={tmp_path}/many")
    assert many.returncode == 0, many.stderr
    assert (tmp_path / "many" / "tools" / "adapter_config.json").exists()
    assert len(list(tmp_path.glob("many/*/adapter_config.json"))) == 2
    lines.write_text('{"instruction": "Take every tool .", "task": "../x"}\n')
    refused = _job("generate", storage, f"--path={lines}")
    assert refused.returncode == 2
    assert "lines.jsonl:1" in refused.stderr
