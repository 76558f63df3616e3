"""What the teacher says of every training instance, written once: its most likely tokens.

A folder for each teacher and scale, whose files lie beside the training shards' row groups (see
`groups.teacher_file`). Every reference of an instance is scored. The definition that the teacher
reads is drawn once for each instance, while a live one reads that of the group.

Axes: N texts, S source tokens, T target tokens, C kept entries of the vocabulary, P target tokens
of all texts.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from tagi_ray import errors
from tagi_ray.batches import IGNORED, READ, Batch, text_batch
from tagi_ray.config import Experiment
from tagi_ray.errors import ConfigError, TagiError
from tagi_ray.families import load_backbone
from tagi_ray.groups import TextGroup, taught_definition, teacher_file
from tagi_ray.json_files import write_whole
from tagi_ray.lora import LoraBank
from tagi_ray.losses import log_probabilities
from tagi_ray.shards import ShardTask, SplitIndex, read_manifest, row_bucket
from tagi_ray.teachers import FOLDERS, read_teachers, store_hash
from tagi_ray.tuned_teacher import compared_entries, load_tuned_teacher
from tagi_ray.vocabulary import TextTokenizer

logger = logging.getLogger(__name__)

FOLDER = "teacher_logits"
FORMAT_VERSION = 1
BLOCKS = 1024
"""Blocks of row groups that Ray Data is given, at most."""
ABOUT = "about.json"
"""Last file of a folder: what its distributions are of, and over."""
SCHEMA = pa.schema(
    [
        ("tokens", pa.list_(pa.list_(pa.int32()))),
        ("ids", pa.list_(pa.int32())),
        ("logp", pa.list_(pa.float16())),
    ]
)
"""A row a bucket: the target tokens of each reference of each instance, and for each of these
tokens, one after another, C ids and log-probabilities. Empty lists of a task without a teacher.

Half precision changes the KL by less than 1e-4 of it; to keep 256 of 320 entries changes it by ten
times that (`benchmark.py distillation`)."""


def folder_of(experiment: Experiment, run_folder: Path) -> Path | None:
    """Return where the logits of a run's teacher are cached, or None where none are to be.

    experiment: with the changes of a variant. The name is a hash of all that the logits depend on
    and that is not the same for the whole run.
    """
    settings = experiment.distillation
    taught = experiment.teachers.enabled or settings.checkpoint is not None
    if settings.logits == "live" or settings.lambda_kl == 0 or not taught:
        return None
    parts = {
        "version": FORMAT_VERSION,
        "shards": read_manifest(run_folder / "shards").fingerprint,
        "scale": (settings.temperature, settings.standardize, settings.top_k),
        # A pinned revision is the hash or the commit of its weights.
        "checkpoint": settings.checkpoint_revision or settings.checkpoint,
        "data": experiment.data.model_dump(mode="json", include=_RENDERING),
        "seed": experiment.seeds[0],
    }
    if settings.checkpoint is None:
        parts["teachers"] = store_hash(run_folder / FOLDERS["train"])
        parts["prompt"] = experiment.teachers.prompt
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return run_folder / FOLDER / digest[:16]


_RENDERING = {"prompt", "max_prompt_tokens", "max_input_tokens", "max_target_tokens"}


def cached_entries(folder: Path) -> int:
    """Return the entries of the vocabulary that the distributions of a folder are over.

    Raises ConfigError where it was not written.
    """
    path = folder / ABOUT
    if not path.exists():
        raise ConfigError([
            f"distillation.logits=cached, and {folder} holds none: run `python jobs/finetune.py`,"
            " which writes them first"
        ])  # fmt: skip
    return int(json.loads(path.read_text("utf-8"))["entries"])


def write_teacher_logits(
    experiments: Sequence[Experiment],
    run_folder: Path,
    say: Callable[[str], None] = logger.info,
    parallel: bool = True,
) -> None:
    """Write what finetuning with these settings reads of its teachers, and drop what none reads.

    A folder appears when all of it is there; one that was begun is continued. Not `parallel`, this
    process reads with the teacher, without Ray.
    """
    run_folder = run_folder.absolute()  # actors start in another folder
    found = [(folder_of(one, run_folder), one) for one in experiments]
    wanted = {folder: one for folder, one in found if folder is not None}
    kept = {name for folder in wanted for name in (folder.name, f"{folder.name}.partial")}
    for other in (run_folder / FOLDER).glob("*"):
        if other.name not in kept:
            shutil.rmtree(other)
    for folder, experiment in wanted.items():
        if (folder / ABOUT).exists():
            say(f"teacher logits: all are in {folder}")
            continue
        partial = folder.with_name(f"{folder.name}.partial")
        partial.mkdir(parents=True, exist_ok=True)
        units = _units(read_manifest(run_folder / "shards").splits["train"])
        missing = [unit for unit in units if not unit.path(partial).exists()]
        run = _by_ray if parallel else _here
        run(experiment, run_folder, partial, missing)
        entries = compared_entries(experiment, run_folder / "tokenizer")
        write_whole(partial / ABOUT, json.dumps({"entries": entries}))
        partial.replace(folder)
        size = sum(path.stat().st_size for path in folder.rglob("*.parquet"))
        say(f"teacher logits: {len(units)} row groups, {size / 2**20:.1f} MiB in {folder}")


@dataclass(frozen=True, slots=True)
class Unit:
    """A row group of the training shards."""

    file: str
    """Relative to the shards folder."""
    row_group: int

    def path(self, folder: Path) -> Path:
        """Return where the teacher's part of it is."""
        return Path(teacher_file(str(folder), self.file, self.row_group))


def _units(index: SplitIndex) -> list[Unit]:
    pairs = sorted(set(zip(index.file.tolist(), index.row_group.tolist(), strict=True)))
    return [Unit(index.files[file], group) for file, group in pairs]


def _here(experiment: Experiment, run_folder: Path, folder: Path, units: Sequence[Unit]) -> None:
    reader = TeacherReader(experiment, run_folder)
    for unit in units:
        reader.write(unit, folder)


def _by_ray(experiment: Experiment, run_folder: Path, folder: Path, units: Sequence[Unit]) -> None:
    import ray.data

    if not units:
        return
    resources = experiment.resources
    dataset = ray.data.range(len(units), override_num_blocks=min(len(units), BLOCKS)).map_batches(
        _Actor,
        batch_size=1,
        fn_constructor_args=(experiment, run_folder, folder, list(units)),
        concurrency=min(resources.workers, len(units)),
        num_cpus=resources.cpus_per_worker,
        num_gpus=resources.gpus_per_worker,
    )
    dataset.context.enable_progress_bars = False
    for batch in dataset.iter_batches(batch_size=None):
        for refusal in filter(None, batch["refusal"].tolist()):
            name, *arguments = json.loads(refusal)
            raise getattr(errors, name)(*arguments)


class _Actor:
    """Holds a teacher, and writes the files of the row groups that Ray Data gives it."""

    def __init__(
        self, experiment: Experiment, run_folder: Path, folder: Path, units: Sequence[Unit]
    ) -> None:
        torch.set_num_threads(experiment.resources.cpus_per_worker)
        self._source = (experiment, run_folder)
        self._folder, self._units = folder, units
        self._reader: TeacherReader | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        try:
            # Not where the actor is made: of what fails there Ray tells nothing but that it did.
            self._reader = self._reader or TeacherReader(*self._source)
            for number in batch["id"].tolist():
                self._reader.write(self._units[number], self._folder)
        except TagiError as error:
            # Raised, it would come to the driver as Ray Data's own error, with a text alone.
            return {"refusal": [json.dumps([type(error).__name__, *error.args])]}
        return {"refusal": [""]}


class TeacherReader:
    """A frozen teacher in this process, which reads the buckets of the training shards."""

    def __init__(self, experiment: Experiment, run_folder: Path) -> None:
        resources, settings = experiment.resources, experiment.distillation
        self._experiment = experiment
        self._shards = run_folder / "shards"
        tokenizer_folder = run_folder / "tokenizer"
        self._tokenizer = TextTokenizer(tokenizer_folder)
        self._entries = compared_entries(experiment, tokenizer_folder)
        self._device = torch.device("cuda" if resources.gpus_per_worker else "cpu")
        self._bank: LoraBank | None = None
        self._slots: dict[str, int] = {}
        self._part: Literal["prompt", "input"] = "prompt"
        if settings.checkpoint is not None:
            backbone = load_tuned_teacher(settings, experiment.backbone, tokenizer_folder)
        else:
            backbone = load_backbone(
                experiment.backbone, experiment.lora, tokenizer_folder, experiment.seeds[0]
            )
            bank, self._slots = read_teachers(
                run_folder / FOLDERS["train"],
                read_manifest(self._shards),
                backbone.sites,
                experiment,
            )
            self._bank = bank.to(self._device)
            self._part = READ[experiment.teachers.prompt]
        self._backbone = backbone.to(self._device)

    def write(self, unit: Unit, folder: Path) -> None:
        """Read a row group, and write the teacher's part of it; the file appears complete."""
        rows = pq.ParquetFile(self._shards / unit.file).read_row_group(unit.row_group).to_pylist()
        path = unit.path(folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.tmp")
        with pq.ParquetWriter(draft, SCHEMA, compression="zstd", use_dictionary=False) as writer:
            for row in rows:
                writer.write_table(self.read(row_bucket(row)))
        draft.replace(path)

    @torch.no_grad()
    def read(self, bucket: ShardTask) -> pa.Table:
        """Return the row of `SCHEMA` of a bucket."""
        taught = self._bank is None or bucket.task.name in self._slots
        groups = list(self._groups(bucket)) if taught else []
        rows = self._experiment.finetune.micro_groups * self._experiment.finetune.instances
        counts: list[int] = []
        ids, logp = [np.empty(0, np.int32)], [np.empty(0, np.float16)]
        for start in range(0, len(groups), rows):
            batch = text_batch(
                groups[start : start + rows],
                self._tokenizer,
                self._experiment.data,
                (self._part,),
            )
            counts += (batch.target_ids_KNT[:, 0] != IGNORED).sum(-1).tolist()
            top = self._top(batch.to(self._device), bucket.task.name)
            ids.append(top.indices.cpu().numpy().astype(np.int32).ravel())
            logp.append(top.values.cpu().numpy().astype(np.float16).ravel())
        left = iter(counts)
        tokens = [[next(left) for _ in one.outputs] for one in bucket.instances] if taught else []
        columns = {"tokens": [tokens], "ids": [np.concatenate(ids)], "logp": [np.concatenate(logp)]}
        return pa.table(columns, schema=SCHEMA)

    def _groups(self, bucket: ShardTask) -> Iterator[TextGroup]:
        """Yield each reference of each instance as a group of its own."""
        task = bucket.task
        for instance in bucket.instances:
            seed, definitions = self._experiment.seeds[0], task.definitions
            chosen = taught_definition(seed, instance.id, len(definitions))
            for output in instance.outputs:
                yield TextGroup(
                    task=task.name,
                    category=task.category,
                    definition=definitions[chosen],
                    examples=task.positive_examples,
                    inputs=(instance.input,),
                    targets=(output.strip(),),
                )

    def _top(self, batch: Batch, task: str) -> Any:
        """Return `values` and `indices`, both [P, C], of groups of one text of the same task."""
        ids, mask = batch.texts(self._part)
        # All texts are of one task: as its N instances they share the task's adapter.
        ids_1NS, mask_1NS = ids.transpose(0, 1), mask.transpose(0, 1)
        targets_1NT = batch.target_ids_KNT.transpose(0, 1)
        bank = self._bank and self._bank.take(torch.tensor([self._slots[task]]))
        with self._backbone.bound(bank):
            logits_1NTV = self._backbone.logits(ids_1NS, mask_1NS, targets_1NT)
        logits_PV = logits_1NTV[..., : self._entries][targets_1NT != IGNORED]
        settings = self._experiment.distillation
        logp_PV = log_probabilities(logits_PV, settings.temperature, settings.standardize)
        return logp_PV.topk(min(settings.top_k, self._entries), -1)
