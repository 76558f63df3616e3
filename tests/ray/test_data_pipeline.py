"""Ray Data gives the same shards and the same batches as one process."""

from pathlib import Path

import pytest
import torch

from tagi_ray import batches
from tagi_ray.batches import iterate_batches, local_batches
from tagi_ray.order import OrderPlan
from tagi_ray.sections import BackboneSettings, DataSettings
from tagi_ray.shard_writer import write_shards
from tagi_ray.shards import read_manifest
from tagi_ray.vocabulary import prepare_tokenizer

SETTINGS = DataSettings(train_instances=70, test_instances=10, oracle_instances=5)


@pytest.fixture(scope="module")
def run(ray_session, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_shards(SETTINGS, folder / "shards", 0)
    settings = BackboneSettings(path="random", tokenizer="train", tokenizer_vocabulary=600)
    prepare_tokenizer(settings, folder / "shards", folder / "tokenizer")
    return folder


def test_files_do_not_depend_on_who_reads(run, tmp_path):
    alone = write_shards(SETTINGS, tmp_path / "shards", 0, parallel=False)
    assert read_manifest(run / "shards").fingerprint == alone.fingerprint
    files = sorted(p.relative_to(run) for p in (run / "shards").rglob("*") if p.is_file())
    assert len(files) == 5
    for file in files:
        assert (run / file).read_bytes() == (tmp_path / file).read_bytes(), file


@pytest.mark.parametrize(
    ("rank", "world", "start", "stop", "micro"),
    [(0, 1, 0, 200, 8), (1, 2, 96, 400, 4), (2, 3, 12, 318, 3)],
)
def test_batches_equal_the_local_ones(run, monkeypatch, rank, world, start, stop, micro):
    # Short segments, so that the stream crosses from one execution into the next.
    monkeypatch.setattr(batches, "SEGMENT", 2)
    plan = OrderPlan(read_manifest(run / "shards").splits["train"], 0, 4, {"none": 0})
    arguments = (run / "shards", plan, run / "tokenizer", SETTINGS)
    fields = {
        "start_position": start, "stop_position": stop, "micro_groups": micro,
        "parts": ("instruction", "input", "prompt"), "rank": rank, "world": world,
    }  # fmt: skip
    local = list(local_batches(*arguments, **fields))
    streamed = list(iterate_batches(*arguments, **fields))
    assert [b.position for b in streamed] == [b.position for b in local]
    assert len(local) == -(-len(range(start + (rank - start) % world, stop, world)) // micro)
    for a, b in zip(local, streamed, strict=True):
        for name in type(a).__dataclass_fields__:
            left, right = getattr(a, name), getattr(b, name)
            equal = torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right
            assert equal, name


def test_leaving_early_ends_the_execution(run):
    plan = OrderPlan(read_manifest(run / "shards").splits["train"], 0, 4)
    stream = iterate_batches(
        run / "shards", plan, run / "tokenizer", SETTINGS,
        start_position=0, stop_position=10_000, micro_groups=8, parts=("input",), rank=0, world=1,
    )  # fmt: skip
    assert next(stream).position == 0
    stream.close()
    again = iterate_batches(
        run / "shards", plan, run / "tokenizer", SETTINGS,
        start_position=8, stop_position=16, micro_groups=8, parts=("input",), rank=0, world=1,
    )  # fmt: skip
    assert [batch.position for batch in again] == [8]
