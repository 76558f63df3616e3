"""Spawned gloo ranks, without Ray."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor


def _rank(rank: int, world: int, folder: Path, work: Callable[..., Any], cases: list[Any]) -> None:
    os.environ.update(LOCAL_RANK=str(rank), RANK=str(rank), WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "rendezvous"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    for number, case in enumerate(cases):
        save_file(work(folder, case), folder / f"result_{number}_{rank}.safetensors")
    dist.barrier()
    # Not through the interpreter's teardown, which races with the threads of gloo's groups that
    # DeepSpeed still holds, and then aborts the process.
    os._exit(0)


def on_ranks(
    world: int, folder: Path, work: Callable[..., Any], cases: list[Any]
) -> list[dict[str, Tensor]]:
    """Run a function on spawned ranks for each case in turn, and return rank 0's results.

    What another rank returns too must be the same there.
    """
    (folder / "rendezvous").unlink(missing_ok=True)
    torch.multiprocessing.spawn(_rank, (world, folder, work, cases), nprocs=world)
    firsts = []
    for number in range(len(cases)):
        first, *others = [
            load_file(folder / f"result_{number}_{rank}.safetensors") for rank in range(world)
        ]
        for other in others:
            for key, value in other.items():
                assert torch.equal(value, first[key]), key
        firsts.append(first)
    return firsts
