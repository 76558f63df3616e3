"""The cache of the teacher's logits: what is in it, how it is read, and when it is written."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

from tagi_ray import batches, groups, teacher_logits
from tagi_ray.config import Experiment
from tagi_ray.errors import ConfigError, DataError, RunConflictError
from tagi_ray.families import load_backbone
from tagi_ray.groups import TextGroup, taught_definition, teacher_file
from tagi_ray.losses import log_probabilities
from tagi_ray.order import OrderPlan
from tagi_ray.shards import read_manifest, read_tasks_of, row_bucket
from tagi_ray.stages import build_stage, fingerprint
from tagi_ray.teacher_logits import cached_entries, folder_of, write_teacher_logits
from tagi_ray.teachers import FOLDERS, read_teachers
from tagi_ray.train_loop import Worker, run_stage
from tagi_ray.tuned_teacher import load_tuned_teacher, pinned_teachers
from tagi_ray.vocabulary import TextTokenizer
from tests.tiny_run import (
    stage_of,
    tiny_experiment,
    tiny_run,
    trained,
    write_random_teachers,
)

CPU = torch.device("cpu")
KEPT = 5
HALF = 1e-3
"""Relative: the cache holds half precision."""
CACHED = {"logits": "cached", "top_k": KEPT, "temperature": 2.0, "standardize": True}


def experiment_of(storage: Path, **distillation: Any) -> Experiment:
    base = tiny_experiment(storage, taught=True, steps=4, save_every=0)
    values = base.model_dump(mode="json")
    values["data"]["max_target_tokens"] = 6  # some targets are cut
    values["distillation"] = distillation
    return Experiment.model_validate(values)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of which half of the training tasks have teachers, and whose cache is written."""
    storage = tmp_path_factory.mktemp("storage")
    experiment = experiment_of(storage, **CACHED)
    run = tiny_run(experiment)
    write_random_teachers(experiment, run)
    write_teacher_logits([experiment], run, parallel=False)
    return run


def teacher_says(
    experiment: Experiment, run: Path, group: TextGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """The log-probabilities [N, T, V] that the task's teacher has, and the targets [N, T]."""
    tokenizer = run / "tokenizer"
    backbone = load_backbone(experiment.backbone, experiment.lora, tokenizer)
    manifest = read_manifest(run / "shards")
    bank, slots = read_teachers(run / FOLDERS["train"], manifest, backbone.sites, experiment)
    batch = batches.text_batch([group], TextTokenizer(tokenizer), experiment.data, ("prompt",))
    with torch.no_grad(), backbone.bound(bank.take(torch.tensor([slots[group.task]]))):
        logits = backbone.logits(batch.prompt_ids_KNS, batch.prompt_mask_KNS, batch.target_ids_KNT)
    settings = experiment.distillation
    logp = log_probabilities(logits[0], settings.temperature, settings.standardize)
    return logp, batch.target_ids_KNT[0]


def drawn(run: Path, stop: int = 60) -> tuple[OrderPlan, dict[str, Any]]:
    plan = OrderPlan(read_manifest(run / "shards").splits["train"], 0, 2)
    return plan, {"start_position": 0, "stop_position": stop, "micro_groups": 4}


def test_batches_hold_what_the_teacher_says_of_their_targets(run: Path) -> None:
    experiment = experiment_of(run.parent, **CACHED)
    plan, fields = drawn(run)
    folder = folder_of(experiment, run)
    read = list(
        batches.local_batches(
            run / "shards", plan, run / "tokenizer", experiment.data,
            parts=("input", "teacher"), teacher_folder=folder, **fields,
        )
    )  # fmt: skip
    tasks = {one.task.name: one for one in read_tasks_of(run / "shards", "train")}
    table = plan.table(np.arange(fields["stop_position"]))
    files = [str(run / "shards" / name) for name in plan.index.files]
    texts = groups.fetch(table, files, plan.seed)
    taught = set(read_taught(experiment, run))
    assert {group.task in taught for group in texts} == {True, False}
    seen = 0
    for position, group in enumerate(texts):
        batch, k = read[position // 4], position % 4
        ids, logp = batch.teacher_ids_KNTC[k], batch.teacher_logp_KNTC[k]
        assert ids.shape == (2, batch.target_ids_KNT.shape[2], KEPT)
        if group.task not in taught:
            assert not ids.any()
            assert not logp.any()
            continue
        for n, text in enumerate(group.inputs):
            one = next(i for i in tasks[group.task].instances if i.input == text)
            definitions = tasks[group.task].task.definitions
            # Not the definition of the group, but one for each instance.
            chosen = definitions[taught_definition(0, one.id, len(definitions))]
            alone = replace(group, definition=chosen, inputs=(text,), targets=(group.targets[n],))
            expected, targets = teacher_says(experiment, run, alone)
            length = targets.shape[1]
            assert torch.equal(batch.target_ids_KNT[k, n, :length], targets[0])
            top = expected[0].topk(KEPT)
            torch.testing.assert_close(logp[n, :length], top.values, rtol=HALF, atol=1e-5)
            gathered = expected[0].gather(-1, ids[n, :length])
            torch.testing.assert_close(gathered, top.values, rtol=HALF, atol=1e-5)
            assert not logp[n, length:].any()
        seen += 1
        if seen == 6:
            break
    assert seen == 6


def read_taught(experiment: Experiment, run: Path) -> dict[str, int]:
    backbone = load_backbone(experiment.backbone, experiment.lora, run / "tokenizer")
    manifest = read_manifest(run / "shards")
    return read_teachers(run / FOLDERS["train"], manifest, backbone.sites, experiment)[1]


def test_every_reference_of_an_instance_has_its_own_part(run: Path, monkeypatch) -> None:
    """The embedded world has one reference for each instance; here an instance has three."""
    experiment = experiment_of(run.parent, **CACHED)
    reader = teacher_logits.TeacherReader(experiment, run)
    manifest = read_manifest(run / "shards")
    task = next(iter(read_taught(experiment, run)))
    one = next(t for t in read_tasks_of(run / "shards", "train") if t.task.name == task)
    first, second = one.instances[:2]
    many = replace(first, outputs=(*first.outputs, *second.outputs, "begin"))
    bucket = replace(one, instances=(many, second))
    row = reader.read(bucket)
    assert [len(counts) for counts in row["tokens"][0].as_py()] == [3, 1]
    monkeypatch.setattr(groups, "reference_choice", lambda seed, name, epoch, count: count - 1)
    ref = {"offsets": [1, 0], "epoch": 0}
    found = list(groups._taught(ref, row, [second.id, many.id], 0))
    assert [len(ids) // KEPT for ids, _ in found] == [
        len(TextTokenizer(run / "tokenizer").encode_batch([text], 6)[0])
        for text in (second.outputs[0], "begin")
    ]
    total = sum(len(ids) for ids, _ in found)
    assert total < len(row["ids"][0])
    ids, logp = found[1]
    assert np.array_equal(ids, _part(row, "ids", 2))
    assert np.array_equal(logp, _part(row, "logp", 2))
    assert manifest.tasks[task].split == "train"


def _part(row: Any, name: str, reference: int) -> np.ndarray:
    """What a row has of a reference, counted from its first."""
    counts = [count for references in row["tokens"][0].as_py() for count in references]
    start = sum(counts[:reference]) * KEPT
    return row[name][0].values.to_numpy()[start : start + counts[reference] * KEPT]


def test_files_lie_beside_the_row_groups_of_the_shards(run: Path) -> None:
    experiment = experiment_of(run.parent, **CACHED)
    folder = folder_of(experiment, run)
    index = read_manifest(run / "shards").splits["train"]
    taught = read_taught(experiment, run)
    for name in index.files:
        shards = pq.ParquetFile(run / "shards" / name)
        for number in range(shards.num_row_groups):
            rows = [row_bucket(row) for row in shards.read_row_group(number).to_pylist()]
            file = pq.ParquetFile(teacher_file(str(folder), str(run / "shards" / name), number))
            assert file.num_row_groups == len(rows)
            for place, bucket in enumerate(rows):
                row = file.read_row_group(place).to_pylist()[0]
                counts = row["tokens"]
                assert len(counts) == (len(bucket.instances) if bucket.task.name in taught else 0)
                assert len(row["ids"]) == len(row["logp"]) == KEPT * sum(map(sum, counts))
    assert cached_entries(folder) == 512  # the rows of the backbone's embedding


def test_a_cache_is_written_once_and_again_for_other_teachers(run: Path, monkeypatch) -> None:
    experiment = experiment_of(run.parent, **CACHED)
    folder = folder_of(experiment, run)
    said: list[str] = []
    monkeypatch.setattr(teacher_logits, "TeacherReader", None)  # would fail if it were used
    write_teacher_logits([experiment], run, said.append, parallel=False)
    assert said == [f"teacher logits: all are in {folder}"]
    others = [
        folder_of(experiment_of(run.parent, **{**CACHED, **change}), run)
        for change in ({"top_k": 6}, {"temperature": 1.0}, {"standardize": False})
    ]
    assert len({folder, *others}) == 4
    # What only weighs the losses needs no other cache, and without KL none is needed.
    assert folder_of(experiment_of(run.parent, **CACHED, lambda_pred=0.0), run) == folder
    assert folder_of(experiment_of(run.parent, **CACHED, lambda_kl=0.0), run) is None
    assert folder_of(experiment_of(run.parent, temperature=2.0), run) is None
    index = run / FOLDERS["train"] / "index.json"
    before = index.read_text()
    index.write_text(before.replace('"steps": 0', '"steps": 1'))
    assert folder_of(experiment, run) != folder
    index.write_text(before)


def test_a_cache_that_was_begun_is_continued_and_one_that_nobody_reads_is_dropped(
    tmp_path: Path, monkeypatch
) -> None:
    experiment = experiment_of(tmp_path, **CACHED)
    run = tiny_run(experiment)
    write_random_teachers(experiment, run)
    folder = folder_of(experiment, run)
    stale = run / teacher_logits.FOLDER / "0123456789abcdef"
    stale.mkdir(parents=True)
    original, written = teacher_logits.TeacherReader.write, list[Path]()

    def dies(self: Any, unit: Any, into: Path) -> None:
        if written:
            raise OSError("disk full")
        original(self, unit, into)
        written.append(unit.path(into))

    with monkeypatch.context() as patch:
        patch.setattr(teacher_logits.TeacherReader, "write", dies)
        with pytest.raises(OSError, match="disk full"):
            write_teacher_logits([experiment], run, parallel=False)
    assert not folder.exists()
    assert not stale.exists()
    (first,) = written
    time = first.stat().st_mtime_ns
    with pytest.raises(ConfigError, match=r"jobs/finetune\.py"):
        build_stage(stage_of(experiment, run, "finetune"), CPU)
    write_teacher_logits([experiment], run, parallel=False)
    parts = sorted(folder.rglob("*.parquet"))
    assert len(parts) > 1
    assert (folder / first.relative_to(first.parents[2])).stat().st_mtime_ns == time
    assert not list(folder.parent.glob("*.partial"))


def test_logits_of_other_texts_are_refused(run: Path) -> None:
    experiment = experiment_of(run.parent, **CACHED)
    plan, fields = drawn(run, stop=8)
    longer = experiment.data.model_copy(update={"max_target_tokens": 24})
    with pytest.raises(DataError, match="remove the run's teacher_logits"):
        list(
            batches.local_batches(
                run / "shards", plan, run / "tokenizer", longer, parts=("teacher",),
                teacher_folder=folder_of(experiment, run), **fields,
            )
        )  # fmt: skip


def test_with_all_entries_kept_finetuning_learns_what_it_learns_live(tmp_path: Path) -> None:
    """Where each task has one definition, so that both teachers read the same."""
    results = {}
    for kind in ("live", "cached"):
        experiment = experiment_of(tmp_path / kind, logits=kind, top_k=4096, temperature=2.0)
        run = tiny_run(experiment)
        _keep_one_definition(run)
        write_random_teachers(experiment, run)
        write_teacher_logits([experiment], run, parallel=False)
        spec = stage_of(experiment, run, "finetune")
        run_stage(spec, Worker())
        results[kind] = trained(spec)
    live, cached = results["live"], results["cached"]
    assert live["records"][-1]["kl"] > 1e-4
    for before, after in zip(live["records"], cached["records"], strict=True):
        assert before.keys() == after.keys()
        for name in {"loss", "kl", "alignment", "cross_entropy", "valid_loss"} & before.keys():
            assert after[name] == pytest.approx(before[name], rel=1e-3), name


def _keep_one_definition(run: Path) -> None:
    """Leave each task one definition, which any draw draws."""
    for path in sorted((run / "shards").rglob("*.parquet")):
        file = pq.ParquetFile(path)
        tables = [file.read_row_group(n) for n in range(file.num_row_groups)]
        with pq.ParquetWriter(path, file.schema_arrow) as writer:
            for table in tables:
                rows = [{**row, "definitions": row["definitions"][:1]} for row in table.to_pylist()]
                writer.write_table(table.from_pylist(rows, schema=table.schema))


def test_a_tuned_teacher_teaches_all_tasks_live_and_cached(tmp_path: Path) -> None:
    """Its vocabulary has more rows than the student's, and the cache keeps what both have."""
    results = {}
    for kind in ("live", "cached"):
        experiment = experiment_of(
            tmp_path / kind, logits=kind, top_k=4096, checkpoint=str(tmp_path / "tuned")
        )
        run = tiny_run(experiment)
        _keep_one_definition(run)
        save_tuned(tmp_path / "tuned")
        write_random_teachers(experiment, run)
        experiment = pinned_teachers(experiment, run)
        write_teacher_logits([experiment], run, parallel=False)
        spec = stage_of(experiment, run, "finetune")
        if kind == "live":
            stage = build_stage(spec, CPU)
            assert not any("teacher" in name for name in stage.engine.state())
            stage.engine.close()
        run_stage(spec, Worker())
        results[kind] = trained(spec)
        assert not any("teacher" in name for name in results[kind]["tensors"])
    for before, after in zip(results["live"]["records"], results["cached"]["records"], strict=True):
        assert after["kl"] == pytest.approx(before["kl"], rel=1e-3)
    assert results["live"]["records"][-1]["kl"] > 1e-4
    folder = folder_of(experiment, run)
    assert cached_entries(folder) == 512
    for path in folder.rglob("*.parquet"):
        assert all(len(tokens) for tokens in pq.read_table(path)["tokens"].to_pylist())


def save_tuned(folder: Path, seed: int = 3, rows: int = 576, **changes: Any) -> None:
    """Write a T5 that could have been tuned: untied, as T5 v1.1 is."""
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=rows, d_model=16, d_ff=16, d_kv=8, num_heads=2, num_layers=1,
        dropout_rate=0.0, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0, **changes,
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(folder)


def test_a_tuned_teacher_is_known_by_its_weights(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_tuned(tmp_path / "tuned")
    experiment = experiment_of(tmp_path, checkpoint="tuned")
    run = tiny_run(experiment)
    write_random_teachers(experiment, run)
    pinned = pinned_teachers(experiment, run)
    assert pinned.distillation.checkpoint == str(tmp_path / "tuned")
    before = fingerprint(stage_of(pinned, run, "finetune"))
    # Elsewhere it is the same teacher.
    (tmp_path / "tuned").rename(tmp_path / "moved")
    moved = experiment_of(tmp_path, checkpoint="moved")
    assert fingerprint(stage_of(pinned_teachers(moved, run), run, "finetune")) == before
    # Other weights in the place of the first are not.
    save_tuned(tmp_path / "tuned", seed=4)
    with pytest.raises(RunConflictError, match=r"distillation\.checkpoint=tuned"):
        pinned_teachers(experiment, run)
    other = pinned_teachers(experiment, tmp_path)
    assert fingerprint(stage_of(other, run, "finetune")) != before


def test_variants_have_teachers_of_their_own(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_tuned(tmp_path / "one")
    save_tuned(tmp_path / "two", seed=4)
    values = experiment_of(tmp_path, checkpoint="one").model_dump(mode="json")
    values["variants"] = {
        "tagi": {},
        "other": {"distillation": {"checkpoint": "two"}},
        "own": {"distillation": {"checkpoint": None}},
    }
    experiment = pinned_teachers(Experiment.model_validate(values), tmp_path)
    found = {name: experiment.varied(name).distillation for name in experiment.variants}
    assert found["tagi"].checkpoint == str(tmp_path / "one")
    assert found["other"].checkpoint == str(tmp_path / "two")
    assert found["own"].checkpoint is None
    assert found["tagi"].checkpoint_revision != found["other"].checkpoint_revision


def test_a_tuned_teacher_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    experiment = experiment_of(tmp_path, checkpoint=str(tmp_path / "small"))
    run = tiny_run(experiment)
    with pytest.raises(ConfigError, match=r"distillation\.checkpoint=.*small"):
        pinned_teachers(experiment, run)  # nothing is there
    save_tuned(tmp_path / "small", rows=64)
    settings = experiment.distillation
    with pytest.raises(ConfigError, match=r"embeds 64 entries, the tokenizer has 512"):
        load_tuned_teacher(settings, experiment.backbone, run / "tokenizer")
    weights = tmp_path / "small" / "model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ConfigError, match=r"distillation\.checkpoint=.*pickles are never"):
        pinned_teachers(experiment, run)


def test_a_tuned_teacher_of_another_kind_is_refused(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=512, n_embd=16, n_layer=1, n_head=2, n_positions=128)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    experiment = experiment_of(tmp_path, checkpoint=str(tmp_path / "gpt2"))
    with pytest.raises(ConfigError, match=r"gpt2 is decoder-only, backbone\.path=random is an enc"):
        pinned_teachers(experiment, tmp_path)


def test_a_checkpoint_that_nothing_would_read_is_refused() -> None:
    for settings in ({"checkpoint": "a/b", "lambda_kl": 0.0}, {"checkpoint_revision": "main"}):
        with pytest.raises(ValueError, match="would not be read"):
            Experiment.model_validate({"name": "x", "distillation": settings})
