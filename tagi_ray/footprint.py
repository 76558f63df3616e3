"""What a training stage holds in memory, found by running it on torch's meta device.

The stage's own objective runs forward and backward with tensors that have shapes and no data, while
every storage that is made and dropped is counted: what autograd keeps, what is recomputed, and what
lives for a moment. Nothing is downloaded, and no weight exists.

Axes: K tasks, N instances, S source tokens, T target tokens, I instruction tokens, R rank,
D features, P positions.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tagi_ray import objectives
from tagi_ray.architecture import backbone_config, new_model
from tagi_ray.backbone import Backbone
from tagi_ray.batches import Batch
from tagi_ray.config import Experiment
from tagi_ray.families import wrapped
from tagi_ray.lora import LoraBank
from tagi_ray.model import ModelKind, TagiModel, assemble
from tagi_ray.objectives import Objective
from tagi_ray.sections import BackboneSettings

Kind = Literal["teachers", "pretrain", "finetune", "metatrain"]

META = torch.device("meta")
_aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of the longest texts of a stage."""

    instruction: int
    source: int
    prompt: int
    target: int


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes that one micro-batch holds besides weights, teachers and finished gradients."""

    levels: tuple[tuple[int, int], ...]
    """(bytes of gradients finished so far, the most that lived besides them until the next)."""

    @property
    def activations(self) -> int:
        """The most that lives at any time."""
        return max(live for _, live in self.levels)

    def peak(self, gradient_share: float) -> int:
        """Return the most that lives when this share of the finished gradients stays."""
        return max(live + round(gradient_share * done) for done, live in self.levels)


def meta_model(experiment: Experiment, kind: Kind) -> TagiModel:
    """Build the model of a stage on the meta device."""
    settings, distillation = experiment.backbone, experiment.distillation
    dtype = experiment.pretrain.dtype if kind == "pretrain" else settings.dtype
    backbone = _meta_backbone(settings, experiment.lora.targets, dtype)
    if settings.activation_checkpointing:
        backbone.checkpoint_activations()
    roles: dict[str, ModelKind] = {"teachers": "teacher", "metatrain": "metatrain"}
    with META:
        model = assemble(experiment, backbone, roles.get(kind, "hypernetwork"), 0).to(META)
    if kind == "finetune" and distillation.reads_checkpoint:
        teacher = BackboneSettings(
            path=str(distillation.checkpoint), revision=distillation.checkpoint_revision
        )
        model.teacher = _meta_backbone(teacher, (), settings.dtype)
    return model


def _meta_backbone(settings: BackboneSettings, targets: tuple[str, ...], dtype: str) -> Backbone:
    config, tied = backbone_config(settings)
    with META:
        model = new_model(config, tied).to(getattr(torch, dtype))
        return wrapped(model, targets, settings.path)


def meta_bank(model: TagiModel, experiment: Experiment, slots: int) -> LoraBank:
    """Return K adapters without data, in fp32 as teachers are kept."""
    rank, sites = experiment.lora.rank, model.backbone.sites
    return LoraBank(
        {site.name: torch.empty(slots, rank, site.d_in, device=META) for site in sites},
        {site.name: torch.empty(slots, site.d_out, rank, device=META) for site in sites},
        experiment.lora.alpha / rank,
    )


def measure(
    model: TagiModel, experiment: Experiment, kind: Kind, lengths: Lengths, bank: LoraBank | None
) -> Footprint:
    """Run one micro-batch of a stage forward and backward.

    bank: the teachers, trained by `teachers` and read by `finetune`; None without any.
    """
    settings = experiment.stages()[kind]
    cached = experiment.distillation.top_k if experiment.distillation.logits == "cached" else 0
    batch = _meta_batch(settings.micro_groups, settings.instances, lengths, cached)
    trained = list(model.trainable().values())
    if kind == "teachers":
        assert bank is not None
        bank = bank.map(lambda factor: factor.requires_grad_())
        trained = [*bank.a.values(), *bank.b.values()]
    objective = _objective(experiment, kind, bank)
    totals = objective.denominators(batch) if kind != "teachers" else _teacher_totals(bank)
    live = _LiveStorages([*model.parameters(), *model.buffers(), *_tensors(batch), *_factors(bank)])
    hooks = [tensor.register_post_accumulate_grad_hook(live.finish_gradient) for tensor in trained]
    kernel = _fused_attention(experiment.resources.gpus_per_worker > 0)
    with ExitStack() as scope, live, kernel:
        objective.loss(model, batch, totals, scope).loss.backward()
    for hook in hooks:
        hook.remove()
    return Footprint(tuple(sorted(live.highest.items())))


def _objective(experiment: Experiment, kind: Kind, bank: LoraBank | None) -> Objective:
    if kind == "metatrain":
        return objectives.metatrain()
    if kind == "pretrain":
        return objectives.pretrain()
    prompt = experiment.teachers.prompt
    if kind == "teachers":
        assert bank is not None
        return objectives.teacher(bank, prompt)
    return objectives.finetune(experiment.distillation, bank, prompt)


def _teacher_totals(bank: LoraBank | None) -> dict[str, Tensor]:
    assert bank is not None
    return {"target_tokens": torch.empty(bank.slots, device=META)}


def _meta_batch(groups: int, instances: int, lengths: Lengths, cached: int) -> Batch:
    """Return K x N rows; cached: tokens C kept of each of the teacher's distributions."""

    def texts(*shape: int) -> tuple[Tensor, Tensor]:
        ids = torch.empty(shape, dtype=torch.long, device=META)
        return ids, torch.empty(shape, dtype=torch.bool, device=META)

    instruction_ids, instruction_mask = texts(groups, lengths.instruction)
    input_ids, input_mask = texts(groups, instances, lengths.source)
    prompt_ids, prompt_mask = texts(groups, instances, lengths.prompt)
    return Batch(
        instruction_ids_KI=instruction_ids,
        instruction_mask_KI=instruction_mask,
        input_ids_KNS=input_ids,
        input_mask_KNS=input_mask,
        prompt_ids_KNS=prompt_ids,
        prompt_mask_KNS=prompt_mask,
        target_ids_KNT=texts(groups, instances, lengths.target)[0],
        slots_K=torch.empty(groups, dtype=torch.long, device=META),
        tasks=("",) * groups,
        categories=("",) * groups,
        position=0,
        cut_texts=0,
        teacher_ids_KNTC=texts(groups, instances, lengths.target, cached)[0],
        teacher_logp_KNTC=torch.empty(groups, instances, lengths.target, cached, device=META),
    )


def _tensors(batch: Batch) -> list[Tensor]:
    values = (getattr(batch, name) for name in Batch.__slots__)
    return [value for value in values if isinstance(value, Tensor)]


def _factors(bank: LoraBank | None) -> list[Tensor]:
    return [] if bank is None else [*bank.a.values(), *bank.b.values()]


class _LiveStorages(TorchDispatchMode):
    """Counts the storages that operations make, while they live.

    Answers what would need data as a full batch would: every target token is valid, every text is
    padded by another, every task has a teacher.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.live = 0
        self.finished = 0
        """Bytes of gradients that are whole; they are dropped, and accounted for by the caller."""
        self.highest: dict[int, int] = {}
        self._known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        answer = _ANSWERS.get(func)
        result = answer(*args) if answer else None
        if result is None:
            result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.device == META:
                self._count(leaf.untyped_storage())
        self.highest[self.finished] = max(self.highest.get(self.finished, 0), self.live)
        return result

    def finish_gradient(self, tensor: Tensor) -> None:
        """Drop a gradient that autograd has finished."""
        assert tensor.grad is not None
        self.finished += tensor.grad.numel() * tensor.grad.element_size()
        tensor.grad = None

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        size = storage.nbytes()
        self.live += size
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def _all_valid(values: Tensor, indices: list[Tensor | None]) -> Tensor | None:
    """`values[mask]`, where the mask is true everywhere: [..., D] -> [P, D]."""
    if not _is_mask(indices):
        return None
    (mask,) = indices
    assert mask is not None
    return values.new_empty(mask.numel(), *values.shape[mask.dim() :])


def _is_mask(indices: list[Tensor | None]) -> bool:
    return len(indices) == 1 and indices[0] is not None and indices[0].dtype == torch.bool


_ANSWERS: Mapping[Any, Callable[..., Tensor | None]] = {
    _aten.index.Tensor: _all_valid,
    # The gradient of `values[mask]` is written into zeros that were made before.
    _aten._index_put_impl_.default: lambda zeros, indices, *_: zeros if _is_mask(indices) else None,
    _aten.nonzero.default: lambda mask: mask.new_empty(mask.numel(), mask.dim(), dtype=torch.long),
    _aten.any.default: lambda _: torch.tensor(True),
    _aten.all.default: lambda _: torch.tensor(False),
}


@contextmanager
def _fused_attention(on_gpu: bool) -> Iterator[None]:
    """Attend with the worker's kernel: of torch's own choice meta tensors would get the naive one.

    In its place, and not by one of torch's modes, which the backward leaves: it recomputes.
    """
    naive = functional.scaled_dot_product_attention

    def fused(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
        dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        if not on_gpu and attn_mask is not None and attn_mask.requires_grad:
            # A trained position bias has no fused kernel on the CPU.
            return naive(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)
        if not on_gpu:
            return _aten._scaled_dot_product_flash_attention_for_cpu(
                query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
            )[0]
        if attn_mask is None and query.element_size() == 2:
            return _aten._scaled_dot_product_flash_attention(
                query, key, value, dropout_p, is_causal, scale=scale
            )[0]
        keeps = torch.is_grad_enabled()
        return _aten._scaled_dot_product_efficient_attention(
            query, key, value, attn_mask, keeps, dropout_p, is_causal, scale=scale
        )[0]

    functional.scaled_dot_product_attention = fused
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = naive
