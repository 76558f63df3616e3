"""Decoder-only backbones: Llama, Mistral, Qwen with grouped queries, GPT-2 with learned positions.

The bare model reads an instruction at positions 0..len-1. A fusion hands on its keys and values of
each layer: they stand before the input's, once for a task and not for each of its rows, and the
input continues at the task's own length.

A row is a text's tokens and its target's, then padding: no token sees what follows it, so that
padding needs no mask. The begin token, where the model has one, stands at the start of a sequence.

Axes: K tasks, N instances, S source tokens, T target tokens, I instruction tokens, P positions of a
row, H heads of keys, E features of a head, D features, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from tagi_ray.backbone import Backbone, before_each_row
from tagi_ray.instruction import EncodedInstruction
from tagi_ray.lora import Binding

ATTENTION = "tagi_prefix"
"""Name under which transformers finds `prefix_attention`."""


class DecoderOnly(Backbone):
    """A frozen causal language model.

    Its configuration names the special tokens: `bos_token_id` stands at the start of a sequence, if
    there is one, `eos_token_id` ends a target, `pad_token_id` fills what is never read.
    """

    fusions = ("none", "kv_prefix")
    task_type = "CAUSAL_LM"

    def __init__(self, model: Any, targets: tuple[str, ...], identity: str) -> None:
        super().__init__(model, targets, identity)
        _register_attention()
        model.set_attn_implementation(ATTENTION)
        for block in self.blocks:
            attention: Any = block.attn if hasattr(block, "attn") else block.self_attn
            attention.binding = self.binding

    @property
    def width(self) -> int:
        """Features D of the states after the last norm."""
        return int(self.model.config.hidden_size)

    @property
    def heads(self) -> int:
        """Query heads of an attention."""
        return int(self.model.config.num_attention_heads)

    @property
    def prefix_shape(self) -> tuple[int, int, int]:
        """Layers, heads H of keys, features E of a head."""
        config = self.model.config
        features = getattr(config, "head_dim", None) or self.width // self.heads
        keys = getattr(config, "num_key_value_heads", self.heads)
        return int(config.num_hidden_layers), int(keys), int(features)

    @property
    def blocks(self) -> nn.ModuleList:
        """Blocks of the model."""
        inner = self.model.base_model
        return inner.h if hasattr(inner, "h") else inner.layers

    @torch.no_grad()
    def encode(self, ids_KI: Tensor, mask_KI: Tensor) -> EncodedInstruction:
        """Read instructions with the bare model; the begin token counts as one of theirs."""
        from transformers.cache_utils import DynamicCache

        self._refuse_bound()
        ids, mask = self._begun(ids_KI, mask_KI)
        cache = DynamicCache()
        with self._kept():
            states = self._states(ids, torch.arange(ids.shape[1], device=ids.device)[None], cache)
        layers: Any = cache.layers
        return EncodedInstruction(states, mask, tuple((one.keys, one.values) for one in layers))

    def logits(
        self, input_ids_KNS: Tensor, input_mask_KNS: Tensor, target_ids_KNT: Tensor
    ) -> Tensor:
        """Return logits [K, N, T, V] under teacher forcing; targets are -100 where padded."""
        texts = self._texts(input_ids_KNS, input_mask_KNS)
        targets = target_ids_KNT.flatten(0, 1)[:, :-1].clamp_min(0)  # the last predicts nothing
        ids = torch.cat([texts.ids, targets], 1)
        columns = torch.arange(ids.shape[1], device=ids.device)
        ends = texts.lengths[:, None]
        padding = texts.ids.shape[1] - ends
        source = torch.where(columns < ends, columns, columns + padding)
        states = self._states(
            ids.gather(1, source.clamp_max(ids.shape[1] - 1)), texts.starts + columns
        )
        predicting = ends - 1 + columns[: target_ids_KNT.shape[2]]
        states = states.gather(1, predicting[..., None].expand(-1, -1, states.shape[2]))
        logits = self.model.get_output_embeddings()(states)
        return self.binding.leased(logits).unflatten(0, target_ids_KNT.shape[:2])

    @torch.no_grad()
    def decode_greedy(
        self, input_ids_KNS: Tensor, input_mask_KNS: Tensor, max_new_tokens: int
    ) -> Tensor:
        """Return greedily decoded ids [K, N, T], padded after the end of each."""
        from transformers.cache_utils import DynamicCache

        config = self.model.config
        texts = self._texts(input_ids_KNS, input_mask_KNS)
        width = texts.ids.shape[1]
        columns = torch.arange(width + max_new_tokens, device=texts.ids.device)
        ends = texts.lengths[:, None]
        seen = (columns < ends) | (columns >= width)  # what is decoded stands after the padding
        cache, written = DynamicCache(), []
        ended = torch.zeros_like(texts.lengths, dtype=torch.bool)
        with self._kept():
            states = self._states(texts.ids, texts.starts + columns[:width], cache)
            last = states[torch.arange(len(states), device=states.device), texts.lengths - 1]
            for step in range(max_new_tokens):
                chosen = self.model.get_output_embeddings()(last).argmax(-1)
                chosen = chosen.masked_fill(ended, config.pad_token_id)
                written.append(chosen)
                ended = ended | (chosen == config.eos_token_id)
                if step == max_new_tokens - 1 or ended.all():
                    break
                mask = seen[:, None, None, : width + step + 1]
                position = texts.starts + ends + step
                last = self._states(chosen[:, None], position, cache, mask)[:, -1]
        return torch.stack(written, 1).unflatten(0, input_ids_KNS.shape[:2])

    def _begun(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Put the begin token before each text, if the model has one."""
        begin = self.model.config.bos_token_id
        if begin is None:
            return ids, mask
        column = (*ids.shape[:-1], 1)
        ids = torch.cat([ids.new_full(column, begin), ids], -1)
        return ids, torch.cat([mask.new_ones(column), mask], -1)

    def _texts(self, ids_KNS: Tensor, mask_KNS: Tensor) -> _Texts:
        """Return the texts of the rows, which continue the instruction's keys where these are."""
        instruction = self.binding.instruction
        starts_K = mask_KNS.new_zeros(len(mask_KNS), dtype=torch.long)
        if instruction is not None and instruction.prefix:
            starts_K = instruction.mask_KI.sum(1)
        if instruction is None or not (instruction.prefix and instruction.begun):
            ids_KNS, mask_KNS = self._begun(ids_KNS, mask_KNS)
        return _Texts(
            ids_KNS.flatten(0, 1),
            mask_KNS.flatten(0, 1).sum(1).clamp_min(1),
            starts_K.repeat_interleave(ids_KNS.shape[1], output_size=ids_KNS[..., 0].numel())[
                :, None
            ],
        )

    def _states(
        self, ids: Tensor, positions: Tensor, cache: Any = None, mask: Tensor | None = None
    ) -> Tensor:
        """Return the states [K*N, P, D] after the last norm; without a mask a token sees all before."""
        return self.model.base_model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state


class _Texts(NamedTuple):
    """What the rows begin with."""

    ids: Tensor
    """[K*N, S], padded on the right."""
    lengths: Tensor
    """[K*N]: tokens of each."""
    starts: Tensor
    """[K*N, 1]: position of the first."""


def prefix_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **rest: Any,
) -> tuple[Tensor, None]:
    """Attend to the row's keys, and before them to the instruction's where these are bound.

    query: [K*N, H G, P, E] for G queries to a key; key, value: [K*N, H, P', E]. attention_mask:
    None (causal), or [K*N, 1, P, P'], True where a key is seen.
    """
    binding: Binding = module.binding
    instruction = binding.instruction
    if instruction is None or not instruction.prefix:
        return _attention(query, key, value, attention_mask, scaling), None
    prefix, mask_KI = instruction.prefix[module.layer_idx], instruction.mask_KI.bool()
    if query.shape[2] == 1 and attention_mask is not None:
        return _decoding(query, key, value, attention_mask, prefix, mask_KI, scaling), None

    def joined(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        own, shape = attention_mask, (len(query), 1, query.shape[2], -1)
        if own is None:
            own = mask_KI.new_ones(query.shape[2], key.shape[2]).tril()
        seen = mask_KI[:, None, None].expand(-1, 1, query.shape[2], -1)
        mask = before_each_row(seen, own.expand(shape), 3)
        key, value = (
            before_each_row(cached.to(given.dtype), given, 2)
            for cached, given in zip(prefix, (key, value), strict=True)
        )
        return _attention(query, key, value, mask, scaling)

    if not torch.is_grad_enabled():
        return joined(query, key, value), None
    # Joined again in the backward: kept for it, the prefix would stand there once for each row.
    output: Any = checkpoint(
        joined, query, key, value, use_reentrant=False, preserve_rng_state=False
    )
    return output, None


def _decoding(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    prefix: tuple[Tensor, Tensor],
    mask_KI: Tensor,
    scaling: float,
) -> Tensor:
    """Attend with one token of each row; the prefix is read once for a task, and not joined."""
    tasks = len(mask_KI)
    keys, values = (one.to(query.dtype) for one in prefix)
    rows_k, rows_v = (one.unflatten(0, (tasks, -1)) for one in (key, value))
    q = query.reshape(*rows_k.shape[:3], -1, query.shape[3])  # [K, N, H, G, E]
    shared = torch.einsum("knhge,khie->knhgi", q, keys)
    own = torch.einsum("knhge,knhpe->knhgp", q, rows_k)
    shared = shared.masked_fill(~mask_KI[:, None, None, None], -torch.inf)
    own = own.masked_fill(~mask.unflatten(0, (tasks, -1)), -torch.inf)
    scores = scaling * torch.cat([shared, own], -1)
    precise = torch.promote_types(scores.dtype, torch.float32)
    weights = scores.softmax(-1, dtype=precise).to(query.dtype)
    taken = torch.einsum("knhgi,khie->knhge", weights[..., : keys.shape[2]], values)
    taken = taken + torch.einsum("knhgp,knhpe->knhge", weights[..., keys.shape[2] :], rows_v)
    return taken.reshape(query.shape).transpose(1, 2)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float
) -> Tensor:
    """Return [K*N, P, H G, E]; shapes as in `prefix_attention`."""
    shape, causal, native = query.shape, mask is None and query.shape[2] > 1, False
    groups = shape[1] // key.shape[1]
    if shape[2] == 1:
        query = query.reshape(shape[0], key.shape[1], groups, -1)  # no key has to be repeated
    elif groups > 1:
        # Of the kernels that keep no scores, those without a mask in half precision have groups.
        native = mask is None and query.dtype in (torch.bfloat16, torch.float16)
        if not native:
            key, value = (one.repeat_interleave(groups, 1) for one in (key, value))
    output = functional.scaled_dot_product_attention(
        query, key, value, mask, is_causal=causal, scale=scaling, enable_gqa=native
    )
    return output.reshape(shape).transpose(1, 2)


def _register_attention() -> None:
    from transformers import AttentionInterface

    # As a mask it is not registered: transformers then makes none, and hands on those it is given.
    AttentionInterface.register(ATTENTION, prefix_attention)
