"""A run folder small enough to train in a second: synthetic tasks, a random backbone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tagi_ray import checkpoint, history
from tagi_ray.config import Experiment
from tagi_ray.corpus import write_corpus
from tagi_ray.families import load_backbone
from tagi_ray.report import read_records
from tagi_ray.shard_writer import write_shards
from tagi_ray.shards import read_manifest
from tagi_ray.stages import Kind, StageSpec, starting_bank
from tagi_ray.teachers import FOLDERS, teacher_names, write_teachers
from tagi_ray.vocabulary import prepare_tokenizer

STAGE = {
    "steps": 8,
    "groups": 4,
    "micro_groups": 2,
    "instances": 2,
    "log_every": 2,
    "save_every": 3,
    "valid_groups": 4,
    "optimizer": {"learning_rate": 3e-3, "warmup_fraction": 0.2},
}


def tiny_experiment(storage: Path, **changes: Any) -> Experiment:
    """An experiment; `changes` replace whole sections, or fields of all stages.

    `taught=True` lets finetuning learn from the teachers that `write_random_teachers` writes, and
    `pretrain=` fields, the path of raw text among them, lets it start from pretrained weights.
    """
    taught = changes.pop("taught", False)
    pretrain = changes.pop("pretrain", None)
    sections = {key: changes.pop(key) for key in ("resources", "seeds") if key in changes}
    stage = {**STAGE, **changes}
    bank = {name: value for name, value in stage.items() if not name.startswith("valid_")}
    optimizer = dict(stage["optimizer"])
    rates = [optimizer.pop("learning_rate")]
    return Experiment.model_validate(
        {
            "name": "tiny",
            "storage": str(storage),
            "data": {
                "train_instances": 8,
                "test_instances": 4,
                "oracle_instances": 4,
                "max_instruction_tokens": 64,
                "max_input_tokens": 48,
                "max_prompt_tokens": 96,
                "max_target_tokens": 24,
            },
            "backbone": {
                "path": "random",
                "architecture": {"d_model": 32, "d_ff": 32, "d_kv": 8, "heads": 2, "layers": 1},
                "tokenizer": "train",
                "tokenizer_vocabulary": 512,
            },
            "lora": {"rank": 2, "alpha": 4},
            "hypernetwork": {"width": 16, "layers": 1, "heads": 2, "capacity": 4},
            "teachers": {**bank, "enabled": taught},
            "oracle": bank,
            "pretrain": {**stage, "enabled": True, "instances": 1, **pretrain} if pretrain else {},
            "finetune": stage,
            "metatrain": {**stage, "optimizer": optimizer, "learning_rates": rates},
            **sections,
        }
    )


def tiny_run(experiment: Experiment) -> Path:
    """Write shards and tokenizer of an experiment, in this process; returns the run folder."""
    run = Path(experiment.storage) / experiment.name
    run.mkdir(parents=True, exist_ok=True)
    write_shards(experiment.data, run / "shards", seed=0, parallel=False)
    prepare_tokenizer(experiment.backbone, run / "shards", run / "tokenizer")
    if experiment.pretrain.enabled:
        write_corpus(experiment.pretrain, run / "tokenizer", run / "corpus")
    return run


def stage_of(experiment: Experiment, run: Path, kind: Kind) -> StageSpec:
    """A stage of the first seed; `teachers` trains six of them."""
    slots = teacher_names(read_manifest(run / "shards"), "train", "task")[:6]
    return StageSpec(
        experiment,
        kind,
        run,
        experiment.seeds[0],
        learning_rate=experiment.metatrain.learning_rates[0] if kind == "metatrain" else None,
        slots=slots if kind == "teachers" else (),
    )


def write_random_teachers(experiment: Experiment, run: Path) -> None:
    """Write a store of untrained teachers that change every site, for half of the tasks."""
    manifest = read_manifest(run / "shards")
    names = teacher_names(manifest, "train", "task")[::2]
    backbone = load_backbone(experiment.backbone, experiment.lora, run / "tokenizer")
    bank = starting_bank(backbone.sites, experiment, len(names))
    generator = torch.Generator().manual_seed(0)
    for factor in bank.b.values():
        factor.normal_(std=0.3, generator=generator)
    write_teachers(
        run / FOLDERS["train"],
        bank,
        names,
        experiment,
        role="train",
        steps=0,
        final_loss=0.0,
        manifest=manifest,
    )


def trained(spec: StageSpec) -> dict[str, Any]:
    """What a finished stage left: its tensors, and its records without what depends on speed."""
    path = checkpoint.latest(spec.checkpoints)
    assert path is not None
    tensors, meta = checkpoint.load(path)
    assert meta["progress"]["done"]
    timing = {"tokens_per_second", "step_time", "data_wait", "seconds_left", "peak_memory"}
    records = [
        {name: value for name, value in record.items() if name not in timing}
        for record in read_records(spec.run_folder / history.METRICS)
        if (record["stage"], record["seed"]) == (spec.name, spec.seed)
    ]
    return {"tensors": tensors, "records": records}
