"""A run folder small enough to train in a second: synthetic tasks, a random backbone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tagi_ray import checkpoint, history
from tagi_ray.config import Experiment
from tagi_ray.shard_writer import write_shards
from tagi_ray.stages import StageSpec
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
    """An experiment without teachers; `changes` replace whole sections, or fields of all stages."""
    sections = {key: changes.pop(key) for key in ("resources", "seeds") if key in changes}
    stage = {**STAGE, **changes}
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
            "teachers": {**stage, "enabled": False},
            "oracle": stage,
            "finetune": stage,
            "metatrain": stage,
            **sections,
        }
    )


def tiny_run(experiment: Experiment) -> Path:
    """Write shards and tokenizer of an experiment, in this process; returns the run folder."""
    run = Path(experiment.storage) / experiment.name
    run.mkdir(parents=True, exist_ok=True)
    write_shards(experiment.data, run / "shards", seed=0, parallel=False)
    prepare_tokenizer(experiment.backbone, run / "shards", run / "tokenizer")
    return run


def trained(spec: StageSpec) -> dict[str, Any]:
    """What a finished stage left: its tensors, and its records without what depends on speed."""
    path = checkpoint.latest(spec.checkpoints)
    assert path is not None
    tensors, meta = checkpoint.load(path)
    assert meta["progress"]["done"]
    timing = {"tokens_per_second", "step_time", "data_wait", "seconds_left"}
    records = [
        {name: value for name, value in record.items() if name not in timing}
        for record in history.read(spec.run_folder / history.METRICS)
        if (record["stage"], record["seed"]) == (spec.name, spec.seed)
    ]
    return {"tensors": tensors, "records": records}
