"""Checkpoints that are verified, not trusted: safetensors and JSON, hashed, committed last.

A checkpoint is a folder `step_00000100` with `state.safetensors`, `state.json`, `MANIFEST.json`
(sha256 and size of both) and `COMMIT`. It is written under another name and renamed when complete,
so that a crash leaves no half checkpoint behind; what damages one later is found by its hashes.
Trainable state only.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tagi_ray.errors import CheckpointError

STATE, META, MANIFEST, COMMIT = "state.safetensors", "state.json", "MANIFEST.json", "COMMIT"
KEPT = 2
"""Newest checkpoints that are kept, besides the best one."""

_NAME = re.compile(r"^step_(\d{8})$")
_PARTIAL = "partial_"
_TORN = "torn_"

logger = logging.getLogger(__name__)


def path_of(folder: Path, step: int) -> Path:
    """Return where the checkpoint of a step is."""
    return folder / f"step_{step:08d}"


def step_of(path: Path) -> int:
    """Return the step of a checkpoint's folder."""
    return int(path.name.removeprefix("step_"))


def save(
    folder: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    meta: Mapping[str, Any],
    *,
    best: int | None = None,
) -> Path:
    """Write a checkpoint, and delete all but the newest two and that of step `best`.

    One process writes. A checkpoint of the same step is replaced.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(f"{_PARTIAL}*"):
        shutil.rmtree(leftover)
    final = path_of(folder, step)
    partial = folder / f"{_PARTIAL}{final.name}"
    partial.mkdir()
    save_file({name: t.contiguous() for name, t in tensors.items()}, partial / STATE)
    (partial / META).write_text(json.dumps({"step": step, **meta}, indent=1), encoding="utf-8")
    files = {
        name: {"sha256": _sha256(partial / name), "bytes": (partial / name).stat().st_size}
        for name in (STATE, META)
    }
    (partial / MANIFEST).write_text(json.dumps(files, indent=1), encoding="utf-8")
    for name in (STATE, META, MANIFEST):
        _flush(partial / name)
    (partial / COMMIT).write_text(_sha256(partial / MANIFEST), encoding="utf-8")
    _flush(partial / COMMIT)
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    _flush(folder)
    for old in steps(folder)[:-KEPT]:
        if old != best:
            shutil.rmtree(path_of(folder, old))
    return final


def steps(folder: Path) -> list[int]:
    """Return the steps that there are checkpoints of, verified or not, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(int(match[1]) for path in folder.iterdir() if (match := _NAME.match(path.name)))


def latest(folder: Path, *, set_aside: bool = True) -> Path | None:
    """Return the newest checkpoint that verifies; None where none was ever written.

    Torn ones that are newer are renamed, with one warning: then one process calls this.
    Raises CheckpointError when there are checkpoints and all of them are torn.
    """
    torn: list[str] = []
    found = None
    for step in reversed(steps(folder)):
        path = path_of(folder, step)
        problem = damage(path)
        if problem is None:
            found = path
            break
        torn.append(f"{path.name} ({problem})")
        if not set_aside:
            continue
        aside = folder / f"{_TORN}{path.name}"
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
    if found is None and (torn or any(folder.glob(f"{_TORN}*"))):
        raise CheckpointError(
            f"{folder}: every checkpoint is damaged: {', '.join(torn) or 'all were set aside'};"
            " delete this folder to train the stage from the start"
        )
    if found is not None and torn and set_aside:
        logger.warning(
            "%s: set aside as %s*: %s; continuing from %s",
            folder, _TORN, ", ".join(torn), found.name,
        )  # fmt: skip
    return found


def best(newest: Path) -> Path:
    """Return the checkpoint that was best in validation, as the newest one tells; else itself.

    Raises CheckpointError if it does not verify.
    """
    chosen = meta(newest)["progress"]["best"]
    path = newest if chosen is None else path_of(newest.parent, chosen["step"])
    if (problem := damage(path)) is not None:
        raise CheckpointError(f"{path}, the best in validation, is damaged: {problem}")
    return path


def best_loss(newest: Path) -> float:
    """Return the lowest validation loss, as the newest checkpoint tells; infinity without one."""
    chosen = meta(newest)["progress"]["best"]
    return float("inf") if chosen is None else chosen["valid_loss"]


def damage(path: Path) -> str | None:
    """Say what is wrong with a checkpoint; None if it is committed and its hashes agree."""
    try:
        if not (path / COMMIT).is_file():
            return f"no {COMMIT}"
        if (path / COMMIT).read_text(encoding="utf-8") != _sha256(path / MANIFEST):
            return f"{MANIFEST} is not the one that was committed"
        files = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        for name, expected in files.items():
            if (path / name).stat().st_size != expected["bytes"]:
                return f"{name} has {(path / name).stat().st_size} of {expected['bytes']} bytes"
            if _sha256(path / name) != expected["sha256"]:
                return f"{name} has another hash"
    except (OSError, ValueError) as error:
        return str(error)
    return None


def load(path: Path, fingerprint: str | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the meta data of a verified checkpoint; see `meta` for refusals."""
    about = meta(path, fingerprint)
    try:
        return load_file(path / STATE), about
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def meta(path: Path, fingerprint: str | None = None) -> dict[str, Any]:
    """Return the meta data of a checkpoint, whose tensors are not looked at.

    Raises CheckpointError if it is not what was saved, or if `fingerprint` is given and the meta
    data's is another: the settings or the data have changed since.
    """
    try:
        files = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        content = (path / META).read_bytes()
        if hashlib.sha256(content).hexdigest() != files[META]["sha256"]:
            raise CheckpointError(f"{path}: {META} has another hash")
        about = json.loads(content)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if fingerprint is not None and about.get("fingerprint") != fingerprint:
        raise CheckpointError(
            f"{path} was trained with other settings or data: choose another run name, or"
            " delete that checkpoint folder to train the stage again"
        )
    return about


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
