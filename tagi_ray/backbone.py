"""The frozen language model behind one small interface.

What differs between model families stays in here: which linears are sites, how an instruction is
encoded, how the decoder's memory is built. Encoder-decoder models of the T5 family are supported.

Axes: K tasks, N instances, S source tokens, T target tokens, I instruction tokens, D features,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tagi_ray.architecture import pretrained_model, random_model
from tagi_ray.errors import ConfigError
from tagi_ray.lora import Binding, LoraBank, Site, bound, inject
from tagi_ray.sections import BackboneSettings, LoraSettings
from tagi_ray.vocabulary import TextTokenizer


class EncodedInstruction(NamedTuple):
    """Encoder states of K instructions."""

    states_KID: Tensor
    mask_KI: Tensor
    """True at tokens, False at padding."""


class Backbone(nn.Module):
    """A frozen encoder-decoder model with adapter sites.

    Always in evaluation mode: teacher and student must differ in adapters alone, not in dropout.
    """

    def __init__(self, model: Any, targets: tuple[str, ...], identity: str) -> None:
        super().__init__()
        self.sites: tuple[Site, ...]
        self.binding: Binding
        self.sites, self.binding = inject(model, targets)
        self.model = model.eval().requires_grad_(False)
        self.identity = identity

    @property
    def width(self) -> int:
        """Features D of the encoder's states."""
        return int(self.model.config.d_model)

    def train(self, mode: bool = True) -> Backbone:
        """Stay in evaluation mode."""
        return self

    def checkpoint_activations(self) -> None:
        """Recompute each block's activations in the backward instead of keeping them."""
        self.model.activation_checkpointing_enable({"use_reentrant": False})
        self._recompute(True)

    @property
    def _recomputes(self) -> bool:
        return self.model.decoder.block[0].training

    def _recompute(self, switch: bool) -> None:
        for block in (*self.model.encoder.block, *self.model.decoder.block):
            block.training = switch  # the block's own flag switches recomputation, nothing else

    @contextmanager
    def bound(self, bank: LoraBank | None) -> Iterator[None]:
        """Apply a bank in the block, which must span forward and backward; None: none.

        Its factors are cast once, here, to the dtype of the weights that they are added to.
        """
        if bank is not None:
            dtypes = {s.name: self.model.get_submodule(s.name).weight.dtype for s in self.sites}
            bank = LoraBank(
                {name: bank.a[name].to(dtype) for name, dtype in dtypes.items()},
                {name: bank.b[name].to(dtype) for name, dtype in dtypes.items()},
                bank.scaling,
            )
        with bound(self.binding, bank):
            yield

    def encode(self, ids_KI: Tensor, mask_KI: Tensor) -> EncodedInstruction:
        """Encode instructions with the bare encoder.

        Raises RuntimeError while a bank is bound: an instruction is what banks are made from.
        """
        if self.binding.bank is not None:
            raise RuntimeError("instructions are encoded without a bank: encode before binding one")
        return EncodedInstruction(self._encoder_states(ids_KI, mask_KI), mask_KI)

    def logits(
        self,
        input_ids_KNS: Tensor,
        input_mask_KNS: Tensor,
        target_ids_KNT: Tensor,
        instruction: EncodedInstruction | None = None,
    ) -> Tensor:
        """Return logits [K, N, T, V] under teacher forcing; targets are -100 where padded."""
        memory = self._memory(input_ids_KNS, input_mask_KNS, instruction)
        targets = target_ids_KNT.flatten(0, 1)
        decoder_ids = self.model.prepare_decoder_input_ids_from_labels(labels=targets)
        output = self.model(
            encoder_outputs=(memory.states,),
            attention_mask=memory.mask,
            past_key_values=memory.cache,
            decoder_input_ids=decoder_ids,
            use_cache=False,
        )
        return output.logits.unflatten(0, target_ids_KNT.shape[:2])

    @torch.no_grad()
    def decode_greedy(
        self,
        input_ids_KNS: Tensor,
        input_mask_KNS: Tensor,
        instruction: EncodedInstruction | None,
        max_new_tokens: int,
    ) -> Tensor:
        """Return greedily decoded ids [K, N, T], padded after the end of each."""
        from transformers.modeling_outputs import BaseModelOutput

        recomputes = self._recomputes
        self._recompute(False)  # a block that recomputes drops the cache of earlier tokens
        try:
            memory = self._memory(input_ids_KNS, input_mask_KNS, instruction)
            ids = self.model.generate(
                encoder_outputs=BaseModelOutput(last_hidden_state=memory.states),  # pyright: ignore[reportArgumentType]
                attention_mask=memory.mask,
                past_key_values=memory.cache,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
            )
        finally:
            self._recompute(recomputes)
        return ids.unflatten(0, input_ids_KNS.shape[:2])

    def _encoder_states(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.model.encoder(input_ids=ids, attention_mask=mask.long()).last_hidden_state

    def _memory(
        self, ids_KNS: Tensor, mask_KNS: Tensor, instruction: EncodedInstruction | None
    ) -> _Memory:
        """Return the memory [K*N, I + S, D] that the decoder attends to, the instruction first."""
        ids, mask = ids_KNS.flatten(0, 1), mask_KNS.flatten(0, 1)
        states = self._encoder_states(ids, mask)
        if instruction is None:
            return _Memory(states, mask.long())
        prefix = instruction.states_KID.to(states.dtype)
        mask = _before_each_row(instruction.mask_KI, mask).long()
        if self._recomputes:  # a block that recomputes is given no cache
            return _Memory(_before_each_row(prefix, states), mask)
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
                _before_each_row(project(prefix_KID), project(states))
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


def _before_each_row(prefix_KI: Tensor, rows: Tensor) -> Tensor:
    """Join [K, I, ...] to each of its task's rows [K*N, S, ...]: [K*N, I + S, ...]."""
    rows_KN = rows.unflatten(0, (prefix_KI.shape[0], -1))
    prefix_KN = prefix_KI.unsqueeze(1).expand(-1, rows_KN.shape[1], *prefix_KI.shape[1:])
    return torch.cat([prefix_KN, rows_KN], 2).flatten(0, 1)


def load_backbone(
    settings: BackboneSettings, lora: LoraSettings, tokenizer_folder: Path, seed: int = 0
) -> Backbone:
    """Load the backbone and give its target linears their sites.

    Raises ConfigError for a path that is no model of the T5 family, or a tokenizer with more
    entries than the model has embeddings.
    """
    tokenizer = TextTokenizer(tokenizer_folder)
    model = (
        random_model(settings, tokenizer, seed)
        if settings.path == "random"
        else pretrained_model(settings)
    )
    rows = model.get_input_embeddings().num_embeddings  # sharded weights have no shape
    if tokenizer.size > rows:
        raise ConfigError([
            f"backbone.tokenizer has {tokenizer.size} entries, the backbone {settings.path}"
            f" embeds {rows}: use the backbone's own tokenizer"
        ])  # fmt: skip
    backbone = Backbone(model, lora.targets, settings.path)
    if settings.activation_checkpointing:
        backbone.checkpoint_activations()
    return backbone
