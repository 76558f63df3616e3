"""Files of adapters, read with nothing taken on trust.

No pickle is loaded and no link followed, and a tensor is read only where the names and shapes in
the file's header are those that are expected.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tagi_ray.errors import AdapterError

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
MAX_JSON_BYTES = 1 << 20


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refuse_pickles_and_links(folder: Path) -> None:
    """Raise AdapterError for what is no folder of an adapter, or holds what is never loaded."""
    if folder.is_symlink() or not folder.is_dir():
        raise AdapterError(f"{folder} is not a folder: give a PEFT adapter's own, not a link to it")
    for path in sorted(folder.iterdir()):
        if path.is_symlink():
            raise AdapterError(f"{path} is a link, which is not followed: copy the file there")
        if path.suffix in PICKLES:
            raise AdapterError(
                f"{path} is a pickle, which can run code and is never loaded: save the adapter with"
                f" safe_serialization=True as safetensors, and remove it"
            )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises AdapterError for what is none."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise AdapterError(
                f"{path} has more than {MAX_JSON_BYTES} bytes: give a PEFT configuration"
            )
        config = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise AdapterError(f"{path} is missing: give the folder of a PEFT adapter") from None
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path} is not valid JSON ({error}): export it again") from None
    if not isinstance(config, dict):
        raise AdapterError(f"{path} is not a JSON object: export the adapter again")
    return config


def read_header(path: Path) -> dict[str, list[int]]:
    """Tensor names and shapes of a safetensors file; no tensor is read."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise AdapterError(f"{path} is missing: export the adapter again") from None
    except (SafetensorError, OSError, RuntimeError) as error:
        raise AdapterError(f"{path} can't be read ({error}): export the adapter again") from None


def read_tensors(path: Path, expected: Mapping[str, list[int]]) -> dict[str, Tensor]:
    """Read a file's tensors if their names and shapes are exactly the expected ones.

    Raises AdapterError if not, and for values that aren't finite.
    """
    shapes = read_header(path)
    problems = [f"{name} is missing" for name in expected if name not in shapes]
    problems += [f"{name} does not belong there" for name in shapes if name not in expected]
    problems += [
        f"{name} has shape {shapes[name]}, not {shape}"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise AdapterError(
            f"{path}: {'; '.join(problems[:3])}{more}:"
            " use an adapter made for this backbone and these lora settings"
        )
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in expected}
    for name, tensor in tensors.items():
        if tensor.is_complex() or not torch.isfinite(tensor).all():
            raise AdapterError(f"{path}: {name} is not finite: train the adapter again")
    return tensors
