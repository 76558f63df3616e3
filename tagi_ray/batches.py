"""Batches: tokenised groups padded to tensors, from Ray Data tasks or from this process.

Both ways call the same pure functions in the same order, so they give the same batches.

Axes: K tasks (groups), N instances of each, I instruction, S source and T target tokens, C entries
of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from tagi_ray.errors import DataError
from tagi_ray.groups import Part, TextGroup, load_tokenizer, prepare, tokenise
from tagi_ray.order import OrderPlan, micro_batches, rank_positions
from tagi_ray.sections import DataSettings
from tagi_ray.vocabulary import TextTokenizer

IGNORED = -100
READ: Mapping[str, Literal["prompt", "input"]] = {"full": "prompt", "input": "input"}
"""Part of a batch that a model reads, by what settings call its prompt."""
BLOCK = 64
"""Groups in one Ray Data block, about."""
SEGMENT = 1024
"""Blocks handed to one Ray Data execution; bounds what a long run keeps in the object store."""


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """K groups of N instances, padded on the right to the longest text of each kind.

    Texts end with the end token, but for those that a decoder-only model goes on from. A part that
    was not asked for has zero tokens.
    """

    instruction_ids_KI: Tensor
    instruction_mask_KI: Tensor
    input_ids_KNS: Tensor
    input_mask_KNS: Tensor
    prompt_ids_KNS: Tensor
    """Instruction and input together, as one text."""
    prompt_mask_KNS: Tensor
    target_ids_KNT: Tensor
    """-100 where padded."""
    slots_K: Tensor
    """Teacher slot of each task, -1 without one."""
    tasks: tuple[str, ...]
    categories: tuple[str, ...]
    position: int
    """Global position of the first group."""
    cut_texts: int
    """Texts of this batch that were longer than allowed."""
    teacher_ids_KNTC: Tensor = field(default_factory=lambda: torch.zeros(0, 0, 0, 0).long())
    """What the teacher takes to be most likely at each target token."""
    teacher_logp_KNTC: Tensor = field(default_factory=lambda: torch.zeros(0, 0, 0, 0))
    """Their log-probabilities; 0, as the ids are, where padded and of tasks without a teacher."""

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch with its tensors on a device."""
        tensors = {
            one.name: getattr(self, one.name).to(device)
            for one in fields(self)
            if one.name.endswith(("_K", "_KI", "_KNS", "_KNT", "_KNTC"))
        }
        return replace(self, **tensors)

    def texts(self, part: Literal["prompt", "input"]) -> tuple[Tensor, Tensor]:
        """Return ids and mask, both [K, N, S], of what a model reads of each instance."""
        if part == "prompt":
            return self.prompt_ids_KNS, self.prompt_mask_KNS
        return self.input_ids_KNS, self.input_mask_KNS

    def valid_tokens(self) -> Tensor:
        """Return the number of target tokens, a scalar tensor."""
        return (self.target_ids_KNT != IGNORED).sum()


def text_batch(
    groups: Sequence[TextGroup],
    tokenizer: TextTokenizer,
    settings: DataSettings,
    parts: Sequence[Part],
) -> Batch:
    """Return the batch of some groups, which must have the same number of instances."""
    return collate(tokenise(groups, tokenizer, settings, parts), tokenizer.pad_id)


def local_batches(
    shards_folder: Path,
    plan: OrderPlan,
    tokenizer_folder: Path,
    settings: DataSettings,
    *,
    start_position: int,
    stop_position: int,
    micro_groups: int,
    parts: Sequence[Part],
    teacher_folder: Path | None = None,
    rank: int = 0,
    world: int = 1,
) -> Iterator[Batch]:
    """Yield a rank's batches of the positions in [start, stop), prepared in this process.

    teacher_folder: where the part `teacher` is read.
    """
    step = _block_step(shards_folder, plan, tokenizer_folder, settings, parts, teacher_folder)
    tokenizer = load_tokenizer(str(Path(tokenizer_folder).absolute()))
    positions = rank_positions(start_position, stop_position, rank, world)
    for block in micro_batches(positions, _block_size(micro_groups)):
        yield from _cut(step(plan.table(block)), micro_groups, tokenizer.pad_id)


def iterate_batches(
    shards_folder: Path,
    plan: OrderPlan,
    tokenizer_folder: Path,
    settings: DataSettings,
    *,
    start_position: int,
    stop_position: int,
    micro_groups: int,
    parts: Sequence[Part],
    teacher_folder: Path | None = None,
    rank: int,
    world: int,
) -> Iterator[Batch]:
    """Yield what `local_batches` yields, prepared by Ray Data tasks ahead of the consumer."""
    import ray.data

    step = _block_step(shards_folder, plan, tokenizer_folder, settings, parts, teacher_folder)
    pad_id = load_tokenizer(str(Path(tokenizer_folder).absolute())).pad_id
    size = _block_size(micro_groups)
    positions = rank_positions(start_position, stop_position, rank, world)
    for segment in micro_batches(positions, size * SEGMENT):
        blocks = [plan.table(block) for block in micro_batches(segment, size)]
        dataset = ray.data.from_arrow(blocks)
        dataset = dataset.map_batches(step, batch_size=None, batch_format="pyarrow")
        dataset.context.execution_options.preserve_order = True
        # Progress bars would interleave with the training log.
        dataset.context.enable_progress_bars = False
        for table in dataset.iter_batches(batch_size=size, batch_format="pyarrow"):
            yield from _cut(table, micro_groups, pad_id)


def _block_step(
    shards_folder: Path,
    plan: OrderPlan,
    tokenizer_folder: Path,
    settings: DataSettings,
    parts: Sequence[Part],
    teacher_folder: Path | None,
) -> partial[pa.Table]:
    # The shards' files are named from the root: a task on another node has another working folder.
    files = tuple(str((Path(shards_folder) / name).absolute()) for name in plan.index.files)
    return partial(
        prepare,
        files=files,
        seed=plan.seed,
        tokenizer_folder=str(Path(tokenizer_folder).absolute()),
        settings=settings,
        parts=tuple(parts),
        teacher_folder=teacher_folder and str(Path(teacher_folder).absolute()),
    )


def _block_size(micro_groups: int) -> int:
    return micro_groups * max(1, BLOCK // micro_groups)


def _cut(table: pa.Table, micro_groups: int, pad_id: int) -> Iterator[Batch]:
    for start in range(0, table.num_rows, micro_groups):
        yield collate(table.slice(start, micro_groups), pad_id)


def collate(table: pa.Table, pad_id: int) -> Batch:
    """Pad a table of tokenised groups to a batch of tensors."""
    groups = table.num_rows

    def padded(name: str, fill: int) -> tuple[Tensor, Tensor]:
        texts = table[name].combine_chunks()
        if name != "instruction":
            texts = texts.flatten()
        lengths = texts.value_lengths().to_numpy(zero_copy_only=False)
        mask = np.arange(lengths.max(initial=0)) < lengths[:, None]
        ids = np.full(mask.shape, fill, np.int64)
        ids[mask] = texts.flatten().to_numpy()
        per_group = () if name == "instruction" else (len(texts) // groups,)
        shape = (groups, *per_group, mask.shape[1])
        return torch.from_numpy(ids.reshape(shape)), torch.from_numpy(mask.reshape(shape))

    instruction_ids, instruction_mask = padded("instruction", pad_id)
    input_ids, input_mask = padded("input", pad_id)
    prompt_ids, prompt_mask = padded("prompt", pad_id)
    target_ids, target_mask = padded("target", IGNORED)
    teacher_ids, teacher_logp = _taught(table, target_mask)
    return Batch(
        instruction_ids_KI=instruction_ids,
        instruction_mask_KI=instruction_mask,
        input_ids_KNS=input_ids,
        input_mask_KNS=input_mask,
        prompt_ids_KNS=prompt_ids,
        prompt_mask_KNS=prompt_mask,
        target_ids_KNT=target_ids,
        slots_K=torch.from_numpy(table["slot"].to_numpy().astype(np.int64)),
        tasks=tuple(table["task"].to_pylist()),
        categories=tuple(table["category"].to_pylist()),
        position=table["position"][0].as_py(),
        cut_texts=int(np.sum(table["cut"].to_numpy())),
        teacher_ids_KNTC=teacher_ids,
        teacher_logp_KNTC=teacher_logp,
    )


def _taught(table: pa.Table, target_mask_KNT: Tensor) -> tuple[Tensor, Tensor]:
    """Return what the teacher knows, ids and log-probabilities, beside the target tokens."""
    ids, logp = (table[f"teacher_{name}"].combine_chunks().flatten() for name in ("ids", "logp"))
    counts_KN = torch.from_numpy(
        ids.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
    )
    tokens_KN = target_mask_KNT.sum(-1)
    counts_KN = counts_KN.view_as(tokens_KN)
    kept = int((counts_KN // tokens_KN.clamp_min(1)).max())
    taught_KN = counts_KN > 0
    if not torch.equal(counts_KN, tokens_KN * taught_KN * kept):
        raise DataError("the teacher's logits are of other texts: remove the run's teacher_logits")
    places_KNT = target_mask_KNT & taught_KN[..., None]
    found: list[Tensor] = []
    for values, dtype in ((ids, torch.long), (logp, torch.float32)):
        known = torch.zeros(*target_mask_KNT.shape, kept, dtype=dtype)
        if kept:
            flat = torch.tensor(values.flatten().to_numpy(), dtype=dtype)
            known[places_KNT] = flat.view(-1, kept)
        found.append(known)
    return found[0], found[1]
