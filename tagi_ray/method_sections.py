"""The sections that say what the method is: its generator, its fusion, its losses.

Imports neither torch nor ray, so that `--help` and `--dry-run` answer at once.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from tagi_ray.sections import Count, NonNegative, Positive, Section

Generator = Literal["attention", "mlp", "t2l_l", "t2l_m", "t2l_s", "shared", "prefix", "none"]


class HypernetworkSettings(Section):
    """What makes adapters from encoded instructions, for all sites of all tasks in one pass."""

    generator: Generator = "attention"
    """`attention`: a transformer trunk over (layer, module, A or B) queries, and a factored head.
    `mlp`: the paper's Eq. 2, a two-layer perceptron for each layer. `t2l_l`, `t2l_m`, `t2l_s`:
    the heads of Text-to-LoRA, large to small. For all tasks, whatever their instructions, as in
    Table 4: `shared`, one trained adapter (Tk-Instruct-LoRA), or `prefix`, trained virtual tokens
    before all that is read (Tk-Instruct-Prefix). `none`: no adapters, fusion alone."""
    width: Count = 256
    """Of the trunk; of Text-to-LoRA the latent size, whose heads read four times as many."""
    layers: Count = 2
    """Of the attention's trunk."""
    heads: Count = 4
    """Of the attention's trunk."""
    capacity: Count = 64
    """The one capacity knob: number k of basis rows from which `attention` mixes each factor,
    hidden units of each `mlp` (the released code: 8), or virtual tokens of `prefix` (the paper:
    32)."""

    @model_validator(mode="after")
    def _whole_heads(self) -> HypernetworkSettings:
        if self.width % self.heads:
            raise ValueError(
                f"hypernetwork.width={self.width} is not a multiple of"
                f" hypernetwork.heads={self.heads}"
            )
        return self


FusionKind = Literal[
    "none", "concat", "cross_attention", "cross_attention+concat", "kv_prefix"
]  # fmt: skip


class FusionSettings(Section):
    """How the instruction reaches the student besides its adapter."""

    kind: FusionKind = "cross_attention+concat"
    """Of an encoder-decoder: `concat`, the encoded instruction stands before the input in the
    decoder's memory; `cross_attention`, every encoder block attends to it (Eq. 1); the paper has
    both. Of a decoder-only model: `kv_prefix`, its keys and values stand before the input's."""
    shared: bool = False
    """One cross-attention for all encoder blocks, with a gate for each, instead of one each."""
    low_rank: Count | None = None
    """Features inside a cross-attention, which bound the rank of its projections; if not set,
    those of the backbone's own attention."""

    @property
    def concat(self) -> bool:
        """Whether the decoder's memory begins with the instruction."""
        return self.kind in ("concat", "cross_attention+concat")

    @property
    def cross_attention(self) -> bool:
        """Whether the encoder blocks attend to the instruction."""
        return self.kind in ("cross_attention", "cross_attention+concat")

    @model_validator(mode="after")
    def _attends(self) -> FusionSettings:
        if (self.shared or self.low_rank) and not self.cross_attention:
            name = "shared" if self.shared else "low_rank"
            raise ValueError(
                f"fusion.{name} would not be read: fusion.kind={self.kind} has no cross-attention"
            )
        return self


class DistillationSettings(Section):
    """The loss lambda_pred L_pred + lambda_kl L_kl + lambda_ins L_ins (Eq. 6)."""

    student_prompt: Literal["input", "full"] = "input"
    """What the student reads: the input alone, or the instruction too, as in instruction tuning."""
    lambda_pred: NonNegative = 1.0
    """Weight of the cross-entropy with the labels (the paper: 1)."""
    lambda_kl: NonNegative = 5.0
    temperature: Positive = 1.0
    standardize: bool = False
    """Compare logits less their mean and divided by their deviation over the vocabulary, as the
    released code does."""
    checkpoint: str | None = None
    """Fully tuned model whose logits are learnt instead of those of the backbone with the task's
    teacher adapter (Eq. 5): a local folder or a hub id, with the backbone's tokenizer."""
    checkpoint_revision: str | None = None
    """Branch, tag or commit of a hub model."""
    logits: Literal["live", "cached"] = "live"
    """`live`: the teacher reads each batch. `cached`: its most likely tokens are written once,
    and read with the batches."""
    top_k: Count = 64
    """Tokens that `cached` keeps of each of the teacher's distributions."""
    lambda_ins: Literal["sigmoid"] | NonNegative = "sigmoid"
    """`sigmoid`: sigmoid(L_ins) of each task (App. B.4); or a fixed weight."""
    sigmoid_gradient: bool = False
    """Let the gradient through sigmoid(L_ins), as the released code does."""
    alignment: Literal["delta_w", "factors"] = "delta_w"

    @property
    def reads_checkpoint(self) -> bool:
        """Whether the tuned teacher reads each batch."""
        return self.checkpoint is not None and self.lambda_kl > 0 and self.logits == "live"


class VariantSettings(Section):
    """What a variant of the method changes: of each section the fields given, the others stay."""

    hypernetwork: dict[str, Any] = Field(default_factory=dict[str, Any])
    fusion: dict[str, Any] = Field(default_factory=dict[str, Any])
    distillation: dict[str, Any] = Field(default_factory=dict[str, Any])
    pretrain: dict[Literal["enabled"], bool] = Field(default_factory=dict[Literal["enabled"], bool])
