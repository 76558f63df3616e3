"""How many teachers to train side by side: where another doubling would gain nothing, or not fit.

Axes: K slots, N instances.
"""

from __future__ import annotations

import statistics
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tagi_ray.model import TagiModel
from tagi_ray.teacher_pack import PackSettings, Teacher, TeacherPack
from tagi_ray.teacher_rows import Row

MOST = 64
GAIN = 0.05
"""Least gain for which a pack is doubled."""
ROUNDS = 5
COPIES = 4
"""Of a slot's factors: themselves, their gradient, and two moments."""
GIB = 2**30


@dataclass(frozen=True, slots=True)
class PackWidth:
    """How wide a pack is, and why."""

    width: int
    rates: dict[int, float]
    """Width -> instances per second, of the widths that were tried."""
    bytes: dict[int, int]
    """Width -> estimated memory, of these and the next one, without the backbone."""
    reason: str


def pack_width(
    model: TagiModel,
    settings: PackSettings,
    typical: Sequence[Row],
    longest: Sequence[Row],
    *,
    rank: int,
    memory: int,
    most: int = MOST,
    device: torch.device | str = "cpu",
    rounds: int = ROUNDS,
) -> PackWidth:
    """Double a pack while it gets faster and fits; a few steps of each width are timed.

    typical: rows of one step of one teacher, which all slots train on. longest: such rows as take
    the most memory. memory: bytes besides those of the backbone. A pack of one is never refused.
    """
    place = torch.device(device)
    need = _Need.measured(model, settings, longest, rank, place)
    packs = {1: _pack(model, settings, typical, rank, 1, place)}
    rates: dict[int, float] = {}
    width = 1
    while True:
        wider, bytes_then = 2 * width, need.of(2 * width)
        told = f"pack {width}: "
        if wider > most or bytes_then > memory:
            limit = f"at most {most} are tried" if wider > most else (
                f"{wider} would take {bytes_then / GIB:.1f} GiB"
            )  # fmt: skip
            rates = rates or {1: _rates(packs, len(typical), rounds, place)[1]}
            reason = f"{told}{limit}"
            break
        packs = {width: packs[width], wider: _pack(model, settings, typical, rank, wider, place)}
        measured = _rates(packs, len(typical), rounds, place)
        rates |= measured
        gain = measured[wider] / measured[width] - 1
        if gain < GAIN:
            reason = f"{told}{wider} would give {max(0.0, 100 * gain):.0f} % more"
            break
        width = wider
    reason += f"; memory {need.of(width) / GIB:.1f} of {memory / GIB:.1f} GiB"
    tried = {*rates, width, 2 * width}
    return PackWidth(width, rates, {one: need.of(one) for one in sorted(tried)}, reason)


@dataclass(frozen=True, slots=True)
class _Need:
    """Memory of a pack, in bytes."""

    slot: int
    """Factors, gradients and moments of a slot."""
    forward: int
    """The most that a forward and backward of one slot holds besides."""
    at_once: int
    """Slots in one forward, at most."""

    def of(self, width: int) -> int:
        return width * self.slot + min(width, self.at_once) * self.forward

    @classmethod
    def measured(
        cls, model: TagiModel, settings: PackSettings, rows: Sequence[Row], rank: int,
        device: torch.device,
    ) -> _Need:  # fmt: skip
        sites = model.backbone.sites
        slot = COPIES * 4 * sum(rank * (site.d_in + site.d_out) for site in sites)
        pack = _pack(model, settings, rows, rank, 1, device)
        with _live_bytes() as live:
            pack.step()
        tokens = len(rows) * max(row.tokens for row in rows)
        return cls(slot, live.most, max(1, settings.most_tokens // tokens))


@dataclass(frozen=True, slots=True, eq=False)
class FixedRows:
    """The same rows in every step."""

    rows: Sequence[Row]
    valid: Sequence[Row] = ()

    def of_step(self, step: int) -> Sequence[Row]:
        """Return the rows."""
        return self.rows


def _pack(
    model: TagiModel, settings: PackSettings, rows: Sequence[Row], rank: int, width: int,
    device: torch.device,
) -> TeacherPack:  # fmt: skip
    """Return a pack whose slots all train on the same rows, without end."""
    pack = TeacherPack(model, settings, width, rank, device)
    queue = iter(range(width))
    alpha = float(rank)

    def pull() -> Teacher | None:
        number = next(queue, None)
        if number is None:
            return None
        return Teacher(str(number), FixedRows(rows), 10**9, rank, alpha)

    pack.fill(pull)
    return pack


def _rates(
    packs: dict[int, TeacherPack], instances: int, rounds: int, device: torch.device
) -> dict[int, float]:
    """Time a step of each pack in turns, after one that warms up; return instances per second."""
    spent: dict[int, list[float]] = {width: [] for width in packs}
    for turn in range(rounds + 1):
        for width, pack in packs.items():
            started = time.perf_counter()
            pack.step()  # waits for the device: it reads the losses
            if turn:
                spent[width].append(time.perf_counter() - started)
    return {
        width: width * instances / statistics.median(seconds) for width, seconds in spent.items()
    }


class _LiveBytes(TorchDispatchMode):
    """Counts the storages that operations make, while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._live = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage(), made=False)
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage, made: bool = True) -> None:
        """made: by an operation; what was there before takes no more."""
        key, size = storage._cdata, storage.nbytes() if made else 0
        if key not in self._known:
            self._known.add(key)
            self._live += size
            self.most = max(self.most, self._live)
            weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._live -= size


@contextmanager
def _live_bytes() -> Iterator[_LiveBytes]:
    mode = _LiveBytes()
    with mode:
        yield mode
