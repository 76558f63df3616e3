"""Evaluation on actors gives what one process gives, and leaves its files."""

import json

import pyarrow.parquet as pq
import pytest
from safetensors.torch import save_file

from tagi_ray.config import Experiment
from tagi_ray.evaluate import Evaluator, evaluate, plan_jobs
from tagi_ray.method_sections import HypernetworkSettings
from tagi_ray.metrics import aggregate
from tagi_ray.model import build_model
from tagi_ray.report import write_report
from tagi_ray.sections import (
    ArchitectureSettings,
    BackboneSettings,
    DataSettings,
    EvaluationSettings,
    LoraSettings,
)
from tagi_ray.shard_writer import write_shards
from tagi_ray.shards import read_tasks_of
from tagi_ray.vocabulary import prepare_tokenizer

pytestmark = pytest.mark.ray

EXPERIMENT = Experiment(
    name="scored",
    seeds=(1, 2),
    data=DataSettings(train_instances=1, test_instances=3, max_target_tokens=4),
    backbone=BackboneSettings(
        path="random",
        tokenizer="train",
        tokenizer_vocabulary=300,
        architecture=ArchitectureSettings(d_model=16, d_ff=16, d_kv=8, heads=2, layers=1),
    ),
    lora=LoraSettings(rank=2, alpha=4.0),
    hypernetwork=HypernetworkSettings(width=16, layers=1, heads=2, capacity=2),
    evaluation=EvaluationSettings(
        systems=("base", "tagi", "tagi_shuffled"),
        tasks_per_batch=8,
        instances_per_batch=2,
        actors=2,
    ),
)


@pytest.mark.usefixtures("ray_session")
def test_actors_score_what_one_process_scores(tmp_path):
    write_shards(EXPERIMENT.data, tmp_path / "shards", seed=0)
    prepare_tokenizer(EXPERIMENT.backbone, tmp_path / "shards", tmp_path / "tokenizer")
    weights = {}
    for seed in EXPERIMENT.seeds:
        model = build_model(EXPERIMENT, tmp_path / "tokenizer", "hypernetwork", seed)
        trained = {
            f"model.{name}": value.detach() + 0.1 for name, value in model.trainable().items()
        }
        path = tmp_path / f"seed_{seed}.safetensors"
        save_file(trained, path)
        weights[seed] = {"tagi": path}

    lines = []
    scores = evaluate(EXPERIMENT, tmp_path, weights, lines.append)

    tasks = list(read_tasks_of(tmp_path / "shards", "test"))
    alone = Evaluator(EXPERIMENT, tmp_path)
    expected = {}
    for job in plan_jobs(EXPERIMENT, tasks, weights):
        expected.setdefault((job.seed, job.system), []).extend(alone.score(job))
    assert len(expected) == len(lines) == 5
    for (seed, system), predictions in expected.items():
        rows = pq.read_table(tmp_path / "predictions" / str(seed) / f"{system}.parquet").to_pylist()
        assert [row["prediction"] for row in rows] == [one.prediction for one in predictions]
        assert [row["task"] for row in rows] == [one.task for one in predictions]
    ours = [aggregate(expected[seed, "tagi"])["rouge_l"] for seed in EXPERIMENT.seeds]
    assert scores["systems"]["tagi"]["rouge_l"] == pytest.approx(sum(ours) / 2)
    assert [seed["seed"] for seed in scores["systems"]["base"]["seeds"]] == [1]
    assert scores["systems"]["tagi"]["n_instances"] == 3 * len(tasks)
    assert scores == json.loads((tmp_path / "scores.json").read_text("utf-8"))
    assert "tagi_shuffled" in write_report(tmp_path).read_text("utf-8")
