"""What the trials of a sweep share: shards, teachers and pretrained weights, each made once.

A shared part is a run of its own in `<sweep>/shared/`, with the sweep's settings but for the
sections that the part depends on, and named by a hash of these; a trial is a run in
`<sweep>/trials/` that holds links to the parts that it needs. So every job takes a trial's folder.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from tagi_ray import corpus, pipeline, recipes
from tagi_ray.config import Experiment
from tagi_ray.recipes.yaml_source import inline
from tagi_ray.shards import MANIFEST
from tagi_ray.space import METHOD
from tagi_ray.stages import StageSpec
from tagi_ray.teachers import FOLDERS

Part = Literal["data", "teachers", "pretrained"]
READ: Mapping[Part, tuple[str, ...]] = {
    "data": ("data", "backbone", "pretrain", "seeds"),
    "teachers": ("data", "backbone", "pretrain", "seeds", "lora", "teachers"),
    "pretrained": ("data", "backbone", "pretrain", "seeds", "lora", "hypernetwork", "fusion"),
}
"""Sections of the settings that a part depends on."""
_MAKE: Mapping[Part, Callable[..., Path]] = {
    "data": pipeline.prepare_data,
    "teachers": pipeline.train_teachers,
    "pretrained": pipeline.pretrain,
}

CLAIM_SECONDS = 1.0

logger = logging.getLogger(__name__)


def trial_run(
    base: Experiment, sweep: Path, folder: str, changes: Mapping[str, str], seeds: tuple[int, ...]
) -> Experiment:
    """Return the settings of a trial, which is a run in the sweep's folder `trials`.

    Raises ConfigError where the changes do not fit each other.
    """
    return recipes.changed(
        base,
        [
            *(f"{field}={value}" for field, value in changes.items()),
            f"name={inline(folder)}",
            f"storage={inline(str(sweep / 'trials'))}",
            f"seeds={inline(list(seeds))}",
            f"evaluation.systems=[{METHOD}]",
        ],
    )


def parts(base: Experiment, sweep: Path, trial: Experiment) -> dict[Part, Experiment]:
    """Return the runs that make the parts which a trial needs, in the order of their making."""
    needed: list[Part] = ["data"]
    if trial.teachers.enabled:
        needed.append("teachers")
    if trial.pretrain.enabled and trial.varied(METHOD).pretrain.enabled:
        needed.append("pretrained")
    return {part: _run_of(part, base, sweep, trial) for part in needed}


def _run_of(part: Part, base: Experiment, sweep: Path, trial: Experiment) -> Experiment:
    read = {name: getattr(trial, name) for name in READ[part]}
    # Trials have the first seed alone.
    read["seeds"] = trial.seeds[:1]
    told = base.model_copy(update=read).model_dump(mode="json", include=set(READ[part]))
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:10]
    name = f"rank_{trial.lora.rank}_{digest}" if part == "teachers" else digest
    fields = {
        "name": f"{part}_{name}",
        "storage": str(sweep / "shared"),
        "evaluation": base.evaluation.model_copy(update={"systems": (METHOD,)}),
    }
    return base.model_copy(update={**read, **fields})


def make(part: Part, run: Experiment, made: Mapping[Part, Experiment]) -> None:
    """Make a part, or what is missing of it; what it needs itself is `made`."""
    if part != "data":
        link_data(_folder(made["data"]), _folder(run))
    _MAKE[part](run, logger.info)


def link_parts(trial: Experiment, made: Mapping[Part, Experiment]) -> None:
    """Give a trial the parts that it needs."""
    run = _folder(trial)
    link_data(_folder(made["data"]), run)
    if "teachers" in made:
        _link(run / FOLDERS["train"], _folder(made["teachers"]) / FOLDERS["train"])
    if "pretrained" in made:
        here = StageSpec(trial, "finetune", run, trial.seeds[0], METHOD).pretrained
        assert here is not None
        there = replace(here, run_folder=_folder(made["pretrained"]))
        _link(here.checkpoints.parent, there.checkpoints.parent)


def link_data(data: Path, run: Path) -> None:
    """Give a run the shards, the tokenizer and, where there is one, the corpus of another."""
    for name in ("shards", "tokenizer", corpus.FOLDER):
        if name != corpus.FOLDER or (data / name / MANIFEST).exists():
            _link(run / name, data / name)


def _link(place: Path, target: Path) -> None:
    if place.is_symlink():
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    # Relative: the storage may be mounted elsewhere on another machine.
    place.symlink_to(os.path.relpath(target, place.parent), target_is_directory=True)


def _folder(run: Experiment) -> Path:
    return Path(run.storage) / run.name


class Maker:
    """Makes each shared part once, whichever trials ask for it first: an actor of a sweep.

    It and the trials run on the driver's machine, and in its folder, from which paths are taken.
    """

    def __init__(self, folder: str) -> None:
        os.chdir(folder)
        self._held: dict[str, tuple[str, int]] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self._made: set[str] = set()

    async def make(self, part: Part, run: Experiment, made: Mapping[Part, Experiment]) -> None:
        """Make a part; who asks meanwhile waits. Raises what its making raises, to each of them."""
        async with self._locks.setdefault(run.name, asyncio.Lock()):
            if run.name not in self._made:
                await asyncio.to_thread(make, part, run, made)
                self._made.add(run.name)

    async def claim(self, folder: str, trial_id: str, pid: int) -> None:
        """Wait until no other trial's process writes to a trial's folder.

        A search that learns may ask for the same settings twice.
        """
        while (held := self._held.get(folder)) and held[0] != trial_id and runs(held[1]):
            await asyncio.sleep(CLAIM_SECONDS)
        self._held[folder] = (trial_id, pid)


def runs(pid: int) -> bool:
    """Say whether a process of this machine runs."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def start_maker() -> Any:
    """Start the maker on this machine, as an actor that ends with this process."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(Maker).options(
        num_cpus=0, scheduling_strategy=here, max_restarts=-1, max_task_retries=2
    )
    return actor.remote(os.getcwd())
