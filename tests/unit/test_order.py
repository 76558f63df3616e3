"""The order plan: every group once per epoch, the same for any number of workers."""

from collections import Counter

import numpy as np
import pytest

from tagi_ray import order
from tagi_ray.order import OrderPlan, hashed, micro_batches, rank_positions
from tagi_ray.shards import SplitIndex


def index_of(counts: dict[str, list[int]], seed: int = 0) -> SplitIndex:
    """Index of a split with these bucket counts per task, in shuffled order."""
    buckets = [(t, n, c) for t, task in enumerate(counts) for n, c in enumerate(counts[task])]
    np.random.default_rng(seed).shuffle(buckets)
    task, number, count = np.asarray(buckets, np.int32).reshape(-1, 3).T
    place = np.arange(len(buckets), dtype=np.int32)
    return SplitIndex(
        ("train/part-00000.parquet",), tuple(counts),
        file=np.zeros_like(place), row_group=place // 16, row=place % 16,
        task=task, number=number, count=count,
    )  # fmt: skip


MIXED = {"a": [64, 36], "b": [64, 64, 2], "c": [5], "d": [64]}


@pytest.mark.parametrize("instances", [1, 4, 8])
def test_each_epoch_draws_every_instance_and_wraps_only_tails(instances):
    index = index_of(MIXED)
    plan = OrderPlan(index, 7, instances)
    for epoch in range(3):
        positions = np.arange(plan.groups_per_epoch) + epoch * plan.groups_per_epoch
        bucket, offsets, epochs, slot = plan.draw(positions)
        assert (epochs == epoch).all()
        assert (slot == -1).all()
        drawn = Counter(zip(np.repeat(bucket, instances), offsets.reshape(-1), strict=True))
        assert len(drawn) == index.count.sum()
        assert sum(drawn.values()) - len(drawn) == plan.wrapped_instances
        groups = Counter(bucket.tolist())
        assert groups == {b: -(-int(c) // instances) for b, c in enumerate(index.count)}


def test_a_group_repeats_an_instance_only_if_its_bucket_is_too_small():
    index = index_of(MIXED)
    plan = OrderPlan(index, 0, 8)
    bucket, offsets, *_ = plan.draw(np.arange(plan.groups_per_epoch))
    distinct = [len(set(row)) for row in offsets.tolist()]
    assert distinct == [min(8, int(index.count[b])) for b in bucket]


def test_epochs_and_seeds_differ():
    index = index_of(MIXED)
    plan, other = OrderPlan(index, 0, 4), OrderPlan(index, 1, 4)
    n = plan.groups_per_epoch
    first, second = plan.draw(np.arange(n)), plan.draw(np.arange(n, 2 * n))
    assert (first[0] != second[0]).any()
    assert (first[0] != other.draw(np.arange(n))[0]).any()
    place = {(b, tuple(sorted(o))) for b, o in zip(first[0], first[1].tolist(), strict=True)}
    assert place != {
        (b, tuple(sorted(o))) for b, o in zip(second[0], second[1].tolist(), strict=True)
    }


def test_any_position_can_be_entered_alone():
    plan = OrderPlan(index_of(MIXED), 3, 4)
    positions = np.arange(5, 3 * plan.groups_per_epoch, 7)
    bucket, offsets, epoch, _ = plan.draw(positions)
    fresh = OrderPlan(index_of(MIXED), 3, 4)
    for i in reversed(range(len(positions))):
        one_bucket, one_offsets, one_epoch, _ = fresh.draw(positions[i : i + 1])
        assert (one_bucket[0], tuple(one_offsets[0])) == (bucket[i], tuple(offsets[i]))
        assert one_epoch[0] == epoch[i]


def test_windows_keep_reads_together(monkeypatch):
    monkeypatch.setattr(order, "WINDOW", 4)
    index = index_of({task: [32] for task in "abcdefghijkl"})
    plan = OrderPlan(index, 0, 8)
    bucket = plan.draw(np.arange(plan.groups_per_epoch))[0].reshape(3, 16)
    assert all(len(set(row // 4)) == 1 for row in bucket)
    assert sorted(int(row[0] // 4) for row in bucket) == [0, 1, 2]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "counts",
    [
        {"a": [64], "b": [64]},
        {"a": [64, 64, 8], "b": [64], "c": [64]},
        {task: [64, 36] for task in "abcdefgh"},
        {"a": [64] * 4, "b": [64] * 3, "c": [8], "d": [64]},
    ],
)
def test_neighbours_are_distinct_tasks_whenever_possible(counts, seed):
    index = index_of(counts)
    plan = OrderPlan(index, seed, 8)
    tasks = index.task[plan.draw(np.arange(plan.groups_per_epoch))[0]]
    assert (tasks[1:] != tasks[:-1]).all()


def test_a_task_too_large_to_be_parted_loses_nothing():
    index = index_of({"a": [64] * 10, "b": [16]})
    plan = OrderPlan(index, 0, 8)
    tasks = index.task[plan.draw(np.arange(plan.groups_per_epoch))[0]]
    assert Counter(tasks.tolist()) == {0: 80, 1: 2}
    assert (tasks[1:] == tasks[:-1]).sum() == 80 - 3


def test_groups_of_a_task_are_spread_over_the_epoch():
    index = index_of({task: [64] for task in "abcdefghijklmnop"})
    plan = OrderPlan(index, 0, 8)
    tasks = index.task[plan.draw(np.arange(plan.groups_per_epoch))[0]]
    for task in range(16):
        gaps = np.diff(np.flatnonzero(tasks == task))
        assert gaps.min() >= 4
        assert gaps.max() <= 32


def test_round_robin_gives_each_slot_its_turn_and_its_own_epochs():
    index = index_of(MIXED)
    plan = OrderPlan(index, 0, 8, slots={"a": 1, "b": 0, "c": 1}, round_robin=True)
    positions = np.arange(200)
    bucket, _, epoch, slot = plan.draw(positions)
    assert (slot == positions % 2).all()
    names = [index.tasks[task] for task in index.task[bucket]]
    assert set(names[0::2]) == {"b"}
    assert set(names[1::2]) == {"a", "c"}
    # 17 groups in slot 0, 14 in slot 1: each once per epoch of its slot.
    for number, groups in ((0, 17), (1, 14)):
        mine = bucket[number::2][:groups]
        assert (epoch[number::2][:groups] == 0).all()
        assert Counter(mine.tolist()) == {
            int(b): -(-int(index.count[b]) // 8) for b in np.unique(mine)
        }
        assert epoch[number::2][groups] == 1


def test_slots_without_round_robin_only_label():
    index = index_of(MIXED)
    plain, labelled = OrderPlan(index, 0, 8), OrderPlan(index, 0, 8, slots={"a": 4})
    positions = np.arange(60)
    bucket, _, _, slot = labelled.draw(positions)
    assert (plain.draw(positions)[0] == bucket).all()
    tasks = [index.tasks[task] for task in index.task[bucket]]
    labels = set(zip(tasks, slot.tolist(), strict=True))
    assert labels == {("a", 4), ("b", -1), ("c", -1), ("d", -1)}


def test_nothing_to_draw_from_is_refused():
    with pytest.raises(ValueError, match=r"in slots \[1\]"):
        OrderPlan(index_of(MIXED), 0, 8, slots={"a": 0, "absent": 1}, round_robin=True)
    with pytest.raises(ValueError, match="no instances"):
        OrderPlan(index_of({}), 0, 8)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("start", [0, 12, 24])
def test_ranks_share_every_step_without_overlap(world, start):
    groups, micro, steps = 12, 2, 5
    stop = start + steps * groups
    steps_of: dict[int, list[int]] = {step: [] for step in range(start // groups, stop // groups)}
    for rank in range(world):
        share = list(micro_batches(rank_positions(start, stop, rank, world), micro))
        accumulated = groups // (micro * world)
        assert len(share) == steps * accumulated
        for number, batch in enumerate(share):
            assert (batch % world == rank).all()
            steps_of[start // groups + number // accumulated] += batch.tolist()
    for step, positions in steps_of.items():
        assert sorted(positions) == list(range(step * groups, (step + 1) * groups))


def test_table_says_where_groups_lie():
    index = index_of(MIXED)
    plan = OrderPlan(index, 0, 4, slots={"a": 2})
    positions = np.asarray([9, 3])
    rows = plan.table(positions).to_pylist()
    for row, position, *drawn in zip(rows, positions, *plan.draw(positions), strict=True):
        bucket, offsets, epoch, slot = drawn
        assert row["position"] == position
        assert row["row_group"] * 16 + row["row"] == bucket
        assert row["offsets"] == offsets.tolist()
        assert (row["epoch"], row["slot"]) == (epoch, slot)


def test_hash_is_fixed_and_uniform():
    # A change here would reorder every run that continues.
    assert int(hashed(1, 2, 3)) == int(hashed(np.asarray(1), 2, np.uint64(3)))
    bits = np.unpackbits(hashed(5, np.arange(4096)).view(np.uint8)).mean()
    assert abs(bits - 0.5) < 0.005
    assert len(set(hashed(5, np.arange(4096)).tolist())) == 4096


def test_a_large_split_is_drawn_in_numpy():
    counts = {f"t{i:04d}": [64] * 8 for i in range(1000)}
    index = index_of(counts)
    plan = OrderPlan(index, 0, 1)
    assert plan.groups_per_epoch == 512_000
    tasks = index.task[plan.draw(np.arange(100_000, 104_096))[0]]
    assert (tasks[1:] == tasks[:-1]).mean() < 0.001
