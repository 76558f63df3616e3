"""Encoder-decoder backbones: the T5 family.

The encoder reads the instruction. A fusion puts its states before the input's in the decoder's
memory, lets each encoder block attend to them, or both. Of a prefix each self-attention of the
encoder reads its keys and values, at the positions before the input's.

Axes: K tasks, N instances, S source tokens, T target tokens, I instruction tokens, D features,
V vocabulary, H heads, E features of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from tagi_ray.backbone import Backbone, before_each_row
from tagi_ray.errors import ConfigError
from tagi_ray.instruction import EncodedInstruction, FusedInstruction


class EncoderDecoder(Backbone):
    """A frozen T5."""

    fusions = ("none", "concat", "cross_attention", "cross_attention+concat")
    task_type = "SEQ_2_SEQ_LM"

    def __init__(self, model: Any, targets: tuple[str, ...], identity: str) -> None:
        super().__init__(model, targets, identity)
        for number, block in enumerate(model.encoder.block):
            if attention := getattr(block.layer[0], "SelfAttention", None):
                for side, projection in enumerate((attention.k, attention.v)):
                    projection.register_forward_hook(self._prefixing(number, side))

    @property
    def width(self) -> int:
        """Features D of the encoder's states."""
        return int(self.model.config.d_model)

    @property
    def heads(self) -> int:
        """Heads of an attention."""
        return int(self.model.config.num_heads)

    @property
    def attention_width(self) -> int:
        """Features inside an attention, of all heads."""
        return self.heads * int(self.model.config.d_kv)

    @property
    def prefix_shape(self) -> tuple[int, int, int]:
        """Layers of the encoder, heads H, features E of a head."""
        config = self.model.config
        if not hasattr(self.model.encoder.block[0].layer[0], "SelfAttention"):
            raise ConfigError([
                f"hypernetwork.generator=prefix is not for the backbone {self.identity}, most of"
                " whose encoder would not see the prefix: choose another generator, or a T5"
            ])  # fmt: skip
        return int(config.num_layers), self.heads, int(config.d_kv)

    @property
    def blocks(self) -> list[nn.Module]:
        """Blocks of encoder and decoder."""
        return [*self.model.encoder.block, *self.model.decoder.block]

    def after_self_attention(
        self, change: Callable[[int, Tensor, FusedInstruction], Tensor]
    ) -> None:
        """Let `change(block, states [K*N, S, D], instruction)` replace what the self-attention of
        each encoder block leaves, wherever the bound instruction is to be attended to.
        """

        def hook_of(number: int) -> Callable[..., Any]:
            def hook(module: nn.Module, given: Any, output: tuple[Any, ...]) -> tuple[Any, ...]:
                instruction = self.binding.instruction
                if instruction is None or instruction.attended_KID is None:
                    return output
                return (change(number, output[0], instruction), *output[1:])

            return hook

        for number, block in enumerate(self.model.encoder.block):
            block.layer[0].register_forward_hook(hook_of(number))

    def encode(self, ids_KI: Tensor, mask_KI: Tensor) -> EncodedInstruction:
        """Encode instructions with the bare encoder."""
        self._refuse_bound()
        return EncodedInstruction(self._encoder_states(ids_KI, mask_KI), mask_KI)

    def logits(
        self, input_ids_KNS: Tensor, input_mask_KNS: Tensor, target_ids_KNT: Tensor
    ) -> Tensor:
        """Return logits [K, N, T, V] under teacher forcing; targets are -100 where padded."""
        memory = self._memory(input_ids_KNS, input_mask_KNS)
        targets = target_ids_KNT.flatten(0, 1)
        decoder_ids = self.model.prepare_decoder_input_ids_from_labels(labels=targets)
        output = self.model(
            encoder_outputs=(memory.states,),
            attention_mask=memory.mask,
            past_key_values=memory.cache,
            decoder_input_ids=decoder_ids,
            use_cache=False,
        )
        return self.binding.leased(output.logits).unflatten(0, target_ids_KNT.shape[:2])

    @torch.no_grad()
    def decode_greedy(
        self, input_ids_KNS: Tensor, input_mask_KNS: Tensor, max_new_tokens: int
    ) -> Tensor:
        """Return greedily decoded ids [K, N, T], padded after the end of each."""
        from transformers.modeling_outputs import BaseModelOutput

        with self._kept():
            memory = self._memory(input_ids_KNS, input_mask_KNS)
            ids = self.model.generate(
                encoder_outputs=BaseModelOutput(last_hidden_state=memory.states),  # pyright: ignore[reportArgumentType]
                attention_mask=memory.mask,
                past_key_values=memory.cache,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
            )
        return ids[:, 1:].unflatten(0, input_ids_KNS.shape[:2])  # without the start token

    def _encoder_states(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return the states of the tokens [K*N, S, D]; a prefix has none that anything reads."""
        instruction = self.binding.instruction
        held = instruction.mask_KI.shape[1] if instruction and instruction.prefix else 0
        ids, mask = functional.pad(ids, (held, 0)), functional.pad(mask.long(), (held, 0), value=1)
        return self.model.encoder(input_ids=ids, attention_mask=mask).last_hidden_state[:, held:]

    def _prefixing(self, number: int, side: int) -> Callable[..., Tensor | None]:
        """Return a hook that puts the bound prefix where a projection's output holds its place.

        The self-attention then reads it as it reads tokens, with the position bias of their places;
        what the held places themselves come to is read by nothing. side: 0 of keys, 1 of values.
        """

        def hook(module: nn.Module, given: Any, output: Tensor) -> Tensor | None:
            instruction = self.binding.instruction
            if instruction is None or not instruction.prefix:
                return None
            prefix_KIX = instruction.prefix[number][side].transpose(1, 2).flatten(2)
            tokens = output[:, prefix_KIX.shape[1] :]
            return before_each_row(prefix_KIX.to(output.dtype), tokens)

        return hook

    def _memory(self, ids_KNS: Tensor, mask_KNS: Tensor) -> _Memory:
        """Return the memory [K*N, I + S, D] that the decoder attends to, the instruction first."""
        ids, mask = ids_KNS.flatten(0, 1), mask_KNS.flatten(0, 1)
        states = self._encoder_states(ids, mask)
        instruction = self.binding.instruction
        if instruction is None or instruction.memory_KID is None:
            return _Memory(states, mask.long())
        prefix = instruction.memory_KID.to(states.dtype)
        mask = before_each_row(instruction.mask_KI, mask).long()
        if self._recomputes:  # a block that recomputes is given no cache
            return _Memory(before_each_row(prefix, states), mask)
        return _Memory(
            states.new_zeros(()).expand(*mask.shape, self.width), mask, self._cached(prefix, states)
        )

    def _cached(self, prefix_KID: Tensor, states: Tensor) -> Any:
        """Return the keys and values of the memory in each decoder block, as a cache holds them.

        Those of an instruction are computed once for its task, not for each of its N rows. states:
        [K*N, S, D].
        """
        from transformers.cache_utils import DynamicCache, DynamicLayer, EncoderDecoderCache

        memory = DynamicCache()
        for block in self.model.decoder.block:
            attention, layer = block.layer[1].EncDecAttention, DynamicLayer()
            keys, values = (
                before_each_row(project(prefix_KID), project(states))
                .unflatten(2, (-1, attention.key_value_proj_dim))
                .transpose(1, 2)
                for project in (attention.k, attention.v)
            )
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values  # `update` would copy them
            memory.layers.append(layer)
        return EncoderDecoderCache(DynamicCache(), memory)


class _Memory(NamedTuple):
    """What the decoder attends to."""

    states: Tensor
    """[K*N, I + S, D]; with a cache a stand-in that has their shape alone."""
    mask: Tensor
    """[K*N, I + S], 1 at tokens."""
    cache: Any = None
    """Keys and values of the states, where they are known already."""
