"""The sections of a run's settings, and the only source of their defaults.

Imports neither torch nor ray, so that `--help` and `--dry-run` answer at once.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Count = Annotated[int, Field(gt=0)]
CountOrZero = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0.0)]
NonNegative = Annotated[float, Field(ge=0.0)]

T = TypeVar("T")


def _distinct(items: tuple[T, ...]) -> tuple[T, ...]:
    repeated = sorted({str(item) for item in items if items.count(item) > 1})
    if repeated:
        raise ValueError(f"{', '.join(repeated)} stands there twice: keep one")
    return items


Distinct = Annotated[tuple[T, ...], Field(min_length=1), AfterValidator(_distinct)]
"""At least one, and no two the same."""


class Section(BaseModel):
    """A part of the settings tree: frozen, and closed to unknown fields."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
    )


class DataSettings(Section):
    """Where the tasks come from, how they are split, and how they are rendered."""

    source: Literal["synthetic", "sni", "records", "hub"] = "synthetic"
    """`sni`: a JSON file for each task. `records`: rows of one instance, .jsonl, .jsonl.gz, .json
    or .parquet, in the columns task, instruction, input, output(s) and perhaps category, or in
    Alpaca's. `hub`: such rows of a hub dataset. `synthetic`: the embedded world, which reads
    nothing."""
    path: str | None = None
    """Folder or file, local or s3:// or gs://, or the hub dataset id."""
    revision: str | None = None
    """Commit or tag of a hub dataset."""
    subset: str | None = None
    """Configuration of a hub dataset that has several."""
    hub_split: str = "train"
    """Split of a hub dataset that holds the rows."""
    train_tasks_file: str | None = None
    """Text file with one training task per line (the official SNI split format)."""
    test_tasks_file: str | None = None
    """Text file with one held-out task per line."""
    test_categories: tuple[str, ...] = ()
    """Held-out categories: every task of them is a test task."""
    test_tasks: tuple[str, ...] = ()
    """Held-out tasks by name."""
    train_categories: Literal["all"] | Count | Distinct[str] = "all"
    """Categories to train on: all, the N with the most tasks, or those named (the paper: 6, 15, 30
    and 60 of SNI, 5, 10, 20 and 36 of P3)."""
    valid_fraction: Fraction = 0.1
    """Share of the training tasks set aside for validation, drawn over the categories."""
    train_instances: Count = 100
    """Instances kept of each training or validation task (the paper: 100)."""
    test_instances: Count = 100
    """Instances scored of each held-out task: the first ones (the paper: 100)."""
    oracle_instances: CountOrZero = 100
    """Instances of each held-out task for oracle teachers, none of them scored. A task with fewer
    to spare gives up to a third of its instances, and is scored on fewer."""
    prompt: Literal["def", "def_2pos"] = "def"
    """Tk-Instruct prompt: definition alone, or with two positive examples."""
    max_instruction_tokens: Count = 1024
    max_input_tokens: Count = 1024
    """Longest input without its instruction; longer ones are cut, and counted."""
    max_prompt_tokens: Count = 1024
    """Longest instruction and input together."""
    max_target_tokens: Count = 128

    @model_validator(mode="after")
    def _one_split(self) -> DataSettings:
        if self.source == "synthetic":
            files = ("path", "train_tasks_file", "test_tasks_file")
            given = [f"data.{name}" for name in (*files, "test_categories", "test_tasks")
                     if getattr(self, name)]  # fmt: skip
            if self.train_categories != "all":
                given.append("data.train_categories")
            if given:
                raise ValueError(
                    f"{' and '.join(given)} would not be read, for data.source=synthetic has tasks"
                    " and held-out tasks of its own: set another data.source, or leave that out"
                )
            return self
        problems: list[str] = []
        if self.path is None:
            problems.append(
                f"data.path is not set, and data.source={self.source} reads from it:"
                " give data.path=PATH, the folder or file of the tasks or a hub dataset id"
            )
        named = {
            "data.test_tasks_file": self.test_tasks_file,
            "data.test_categories": self.test_categories,
            "data.test_tasks": self.test_tasks,
        }
        given = [field for field, value in named.items() if value]
        if not given:
            problems.append(
                "data.test_tasks_file is not set: give data.test_tasks_file=FILE, which names one"
                " held-out task per line (or name them in data.test_tasks or data.test_categories)"
            )
        elif len(given) > 1:
            problems.append(f"{' and '.join(given)} both name the held-out tasks: keep one of them")
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @model_validator(mode="after")
    def _places(self) -> DataSettings:
        problems: list[str] = []
        fields = type(self).model_fields
        given = [name for name in ("revision", "subset", "hub_split")
                 if getattr(self, name) != fields[name].default]  # fmt: skip
        if given and self.source != "hub":
            problems.append(
                f"{' and '.join(f'data.{name}' for name in given)} would not be read: only"
                " data.source=hub has them"
            )
        for name in ("path", "train_tasks_file", "test_tasks_file"):
            place = str(getattr(self, name))
            scheme, is_url, _ = place.partition("://")
            if is_url and self.source == "hub" and name == "path":
                problems.append(f"data.path={place} is no id of a hub dataset: give OWNER/NAME")
            elif is_url and scheme not in ("s3", "gs"):
                problems.append(f"data.{name}={place}: only local paths, s3:// and gs:// are read")
        if problems:
            raise ValueError("\n".join(problems))
        return self


Family = Literal["t5", "llama", "mistral", "qwen2", "qwen3", "gpt2"]


class ArchitectureSettings(Section):
    """Shape of a backbone."""

    family: Family = "t5"
    """`t5` is an encoder-decoder (Flan-T5 and mT5 too), the others are decoder-only."""
    d_model: Count = 128
    d_ff: Count = 256
    d_kv: Count = 32
    """Features of an attention head."""
    heads: Count = 4
    kv_heads: Count | None = None
    """Key and value heads, if fewer than `heads` (grouped queries; llama, mistral, qwen2, qwen3)."""
    layers: Count = 2
    """Blocks of a decoder-only model; of `t5` those in the encoder, and again in the decoder."""
    vocabulary: Count | None = None
    """Rows of the embedding; if not set, the tokenizer's size rounded up to a multiple of 64."""
    feed_forward: Literal["relu", "gated-gelu"] = "relu"
    """Of `t5`; the other families have one each."""
    tied_embeddings: bool = True
    """Whether the output layer is the embedding."""

    @model_validator(mode="after")
    def _of_the_family(self) -> ArchitectureSettings:
        where = "backbone.architecture"
        problems: list[str] = []
        if self.family in ("t5", "gpt2") and self.kv_heads not in (None, self.heads):
            problems.append(
                f"{where}.kv_heads={self.kv_heads}: {self.family} has as many as"
                f" {where}.heads={self.heads}: leave it out"
            )
        elif self.kv_heads and self.heads % self.kv_heads:
            problems.append(
                f"{where}.heads={self.heads} is not a multiple of {where}.kv_heads={self.kv_heads}"
            )
        if self.family == "gpt2" and self.heads * self.d_kv != self.d_model:
            problems.append(
                f"{where}: gpt2 has d_model = heads x d_kv, not {self.d_model} and"
                f" {self.heads} x {self.d_kv}"
            )
        if self.family != "t5" and self.feed_forward != "relu":
            problems.append(
                f"{where}.feed_forward={self.feed_forward} would not be read: only t5 has a choice"
            )
        if problems:
            raise ValueError("\n".join(problems))
        return self


class BackboneSettings(Section):
    """The frozen language model that adapters are generated for."""

    path: str = "demo"
    """`demo` or `demo_decoder` (shipped with the package), `random`, a local directory, or a hub
    model id."""
    revision: str | None = None
    """Branch, tag or commit of a hub model; a run keeps the commit that it was started with."""
    architecture: ArchitectureSettings | None = None
    """Shape of a `random` backbone; of another, what its files must hold, so that a run can be
    planned before they are there."""
    tokenizer: str | None = None
    """Directory, hub id, or `train` (fitted on the training split); if not set the backbone's."""
    tokenizer_vocabulary: Count = 4096
    """Size of a tokenizer fitted on the training split."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    activation_checkpointing: bool = False


class LoraSettings(Section):
    """Shape of every adapter of the run, generated or trained."""

    rank: Count = 32
    alpha: Positive = 64.0
    """The update is scaled by alpha / rank."""
    targets: Distinct[str] = ("q", "v")
    """Last part of the names of the linears that get an adapter."""
    start_seed: int = 0
    """Seed of the common A factors that every teacher and the hypernetwork start from."""


class OptimizerSettings(Section):
    """Optimiser and learning-rate schedule of one stage."""

    name: Literal["adamw", "adafactor"] = "adamw"
    learning_rate: Positive = 1e-4
    schedule: Literal["constant", "linear", "inverse_sqrt"] = "linear"
    """What follows the warm-up."""
    warmup_fraction: Fraction = 0.02
    weight_decay: NonNegative = 0.0
    clip_norm: Positive = 1.0


class StageSettings(Section):
    """One training stage: how long, on how much, how often it reports."""

    steps: Count = 20000
    """Optimiser steps."""
    groups: Count = 16
    """Task groups per optimiser step, over all workers and accumulation steps."""
    micro_groups: Count = 8
    """Task groups K in one forward of one worker; the rest of a step is accumulated."""
    instances: Count = 1
    """Instances n of the task in each group."""
    optimizer: OptimizerSettings = OptimizerSettings()
    log_every: Count = 50
    """Steps between two log lines."""
    save_every: CountOrZero = 500
    """Steps between two checkpoints besides the last one (0: the last one only)."""
    valid_every: CountOrZero = 0
    """Steps between two losses on the validation tasks (0: at the end only)."""
    valid_groups: Count = 32
    """Groups of validation tasks in that loss."""


class BankSettings(StageSettings):
    """Adapters trained with instances, several in one bank; they are not validated."""

    per: Literal["task", "category"] = "task"
    prompt: Literal["full", "input"] = "full"
    """What a teacher reads: instruction and input (Eq. 5), or the input alone."""


class TeacherSettings(BankSettings):
    """Teachers of the training tasks."""

    enabled: bool = True
    """Without teachers only the cross-entropy is trained."""


class MetatrainSettings(StageSettings):
    """Instruction tuning of the whole backbone: the baseline."""

    learning_rates: Distinct[Positive] = (1e-4,)
    """Each is trained, the best on validation is scored. Replaces optimizer.learning_rate."""


class PretrainSettings(StageSettings):
    """Pretraining of the hypernetwork on raw text, cut at random into instruction, input, target.

    A group is one text (n = 1).
    """

    enabled: bool = False
    """Whether finetuning starts from a pretrained hypernetwork."""
    path: str | None = None
    """Text, JSONL or Parquet (column `text`): a file or folder, local or s3:// or gs://, or the id
    of a hub dataset, of which the split train is read; `demo`: texts of the embedded world."""
    revision: str | None = None
    """Commit or tag of a hub dataset."""
    subset: str | None = None
    """Configuration of a hub dataset that has several (en of allenai/c4)."""
    max_tokens: Annotated[int, Field(ge=4)] = 1024
    """Longer texts are cut there before they are divided (App. A.2)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the frozen backbone in this stage."""


class ResourceSettings(Section):
    """What the training workers ask of the cluster."""

    workers: Count = 1
    cpus_per_worker: Count = 1
    gpus_per_worker: NonNegative = 0
    """Whole GPUs, or of one worker alone a share of one: several runs of a sweep then share it."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """What DeepSpeed shards over the workers: 1 the optimiser's state, 2 the gradients too, 3 also
    all weights, those of the frozen backbone included."""
    offload_optimizer: bool = False
    """Keep the optimiser's state in CPU memory (from stage 1 on)."""
    offload_parameters: bool = False
    """Keep the sharded weights in CPU memory (stage 3)."""
    max_failures: CountOrZero = 0
    """Worker failures after which a stage is given up."""

    @model_validator(mode="after")
    def _whole_gpus(self) -> ResourceSettings:
        gpus = self.gpus_per_worker
        if gpus > 1 and gpus != int(gpus):
            raise ValueError(
                f"resources.gpus_per_worker={gpus:g}: a worker has whole GPUs, or a share of one"
            )
        if 0 < gpus < 1 and self.workers > 1:
            raise ValueError(
                f"resources.gpus_per_worker={gpus:g} with resources.workers={self.workers}: two"
                " workers of a run cannot share a GPU (NCCL): set resources.workers=1"
            )
        return self


SYSTEMS = (
    "base", "metatrain", "tagi", "tagi_no_bank", "tagi_no_fusion", "tagi_shuffled", "tagi_empty",
    "teacher",
)  # fmt: skip

Logger = Literal["tensorboard", "mlflow", "wandb"]


class EvaluationSettings(Section):
    """Which systems are scored on the held-out tasks, and in which batches."""

    systems: Distinct[str] = SYSTEMS
    """`base`, `metatrain`, `teacher`, and for each of the variants its name, which may be followed
    by _no_bank, _no_fusion, _shuffled (another task's instruction) or _empty."""
    tasks_per_batch: Count = 8
    instances_per_batch: Count = 50
    actors: Count = 1
    """Parallel evaluation actors, each with the whole backbone."""
