"""The frozen language model behind one small interface.

What differs between model families stays in here: which linears are sites, how an instruction is
encoded, how the decoder's memory is built. Encoder-decoder models of the T5 family are supported.

Axes: K tasks, N instances, S source tokens, T target tokens, I instruction tokens, D features,
V vocabulary.
"""

from __future__ import annotations

import hashlib
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tagi_ray.errors import ConfigError
from tagi_ray.lora import Binding, LoraBank, Site, bound, inject
from tagi_ray.sections import ArchitectureSettings, BackboneSettings, LoraSettings
from tagi_ray.vocabulary import TextTokenizer

DEMO = Path(__file__).parent / "demo_backbone"
FAMILIES = ("t5", "mt5", "umt5", "longt5")
"""Model types that the interface below fits."""

logger = logging.getLogger(__name__)


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
        memory, mask = self._memory(input_ids_KNS, input_mask_KNS, instruction)
        targets = target_ids_KNT.flatten(0, 1)
        decoder_ids = self.model.prepare_decoder_input_ids_from_labels(labels=targets)
        output = self.model(
            encoder_outputs=(memory,),
            attention_mask=mask,
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

        memory, mask = self._memory(input_ids_KNS, input_mask_KNS, instruction)
        recomputes = self.model.decoder.block[0].training
        self._recompute(False)  # a block that recomputes drops the cache of earlier tokens
        try:
            ids = self.model.generate(
                encoder_outputs=BaseModelOutput(last_hidden_state=memory),  # pyright: ignore[reportArgumentType]
                attention_mask=mask,
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
    ) -> tuple[Tensor, Tensor]:
        """Return the decoder's memory [K*N, I + S, D] and its mask, the instruction first."""
        ids, mask = ids_KNS.flatten(0, 1), mask_KNS.flatten(0, 1)
        states = self._encoder_states(ids, mask)
        if instruction is None:
            return states, mask.long()
        instances = ids_KNS.shape[1]
        prefix = instruction.states_KID.to(states.dtype).repeat_interleave(instances, dim=0)
        prefix_mask = instruction.mask_KI.repeat_interleave(instances, dim=0)
        return torch.cat([prefix, states], 1), torch.cat([prefix_mask, mask], 1).long()


def load_backbone(
    settings: BackboneSettings, lora: LoraSettings, tokenizer_folder: Path, seed: int = 0
) -> Backbone:
    """Load the backbone and give its target linears their sites.

    Raises ConfigError for a path that is no model of the T5 family, or a tokenizer with more
    entries than the model has embeddings.
    """
    tokenizer = TextTokenizer(tokenizer_folder)
    model = (
        _random_model(settings, tokenizer, seed)
        if settings.path == "random"
        else _pretrained_model(settings)
    )
    rows = model.get_input_embeddings().weight.shape[0]
    if tokenizer.size > rows:
        raise ConfigError([
            f"backbone.tokenizer has {tokenizer.size} entries, the backbone {settings.path}"
            f" embeds {rows}: use the backbone's own tokenizer"
        ])  # fmt: skip
    backbone = Backbone(model, lora.targets, settings.path)
    if settings.activation_checkpointing:
        backbone.checkpoint_activations()
    return backbone


def identify(settings: BackboneSettings) -> str:
    """Say which weights the settings name: a hash of local files, or a commit of the hub.

    Loads no weights. Raises ConfigError for what is no model of the T5 family.
    """
    if settings.path == "random":
        return "random"
    config, folder = _pretrained_config(settings), Path(_source(settings))
    if not folder.is_dir():
        commit = getattr(config, "_commit_hash", None) or settings.revision or "main"
        return f"{settings.path}@{commit}"
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ConfigError([f"backbone.path={settings.path} holds no .safetensors file"])
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return f"sha256:{digest.hexdigest()}"


def _source(settings: BackboneSettings) -> str:
    return str(DEMO) if settings.path == "demo" else settings.path


def _pretrained_config(settings: BackboneSettings) -> Any:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(_source(settings), revision=settings.revision)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError([f"backbone.path={settings.path} cannot be loaded: {reason}"]) from error
    if config.model_type not in FAMILIES:
        raise ConfigError([
            f"backbone.path={settings.path} is a model of type {config.model_type}: name an"
            f" encoder-decoder model of the T5 family ({', '.join(FAMILIES)})"
        ])  # fmt: skip
    return config


def _pretrained_model(settings: BackboneSettings) -> Any:
    from transformers import AutoModelForSeq2SeqLM
    from transformers.utils import logging as transformers_logging

    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()  # in a log its bars are noise
    config = _pretrained_config(settings)
    try:
        return AutoModelForSeq2SeqLM.from_pretrained(
            _source(settings),
            config=config,
            revision=settings.revision,
            dtype=getattr(torch, settings.dtype),
            use_safetensors=True,
        )
    except (OSError, ValueError) as error:
        raise ConfigError([f"backbone.path={settings.path} cannot be loaded: {error}"]) from error


def _random_model(settings: BackboneSettings, tokenizer: TextTokenizer, seed: int) -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    shape = settings.architecture or ArchitectureSettings()
    config = T5Config(
        vocab_size=shape.vocabulary or -(-tokenizer.size // 64) * 64,
        d_model=shape.d_model,
        d_ff=shape.d_ff,
        d_kv=shape.d_kv,
        num_heads=shape.heads,
        num_layers=shape.layers,
        feed_forward_proj=shape.feed_forward,
        dropout_rate=0.0,
        pad_token_id=tokenizer.pad_id,
        eos_token_id=tokenizer.eos_id,
        tie_word_embeddings=shape.tied_embeddings,  # pyright: ignore[reportCallIssue] # no field
    )
    config.decoder_start_token_id = tokenizer.start_id
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = T5ForConditionalGeneration(config)
        if not shape.tied_embeddings:
            # The class ties the output layer whatever it is told; files with both come untied.
            model.lm_head.weight = nn.Parameter(torch.randn_like(model.shared.weight))
        return model.to(getattr(torch, settings.dtype))
