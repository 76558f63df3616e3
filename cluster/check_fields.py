"""What `check.py` asks of a field wherever it stands: images, labels, sizes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PYTHON = "py311"
"""Of the constraints, so of every image."""
LOOPBACK = {"127.0.0.1", "localhost", "::1"}
_UNITS = {"": 1, "b": 1, "k": 2**10, "m": 2**20, "g": 2**30, "ki": 2**10, "mi": 2**20, "gi": 2**30}

Document = dict[str, Any]


def ray_version() -> str:
    """Return the Ray that the constraints pin."""
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    return re.findall(r"^ray==(\S+)$", text, re.MULTILINE)[0]


def image_problem(field: str, image: str | None, gpu: bool) -> Iterator[str]:
    """Yield what is wrong with an image for a node with or without a GPU."""
    tag = (image or "").rpartition(":")[2]
    want = f"{ray_version()}-{PYTHON}-{'gpu' if gpu else 'cpu'}"
    if not re.fullmatch(rf"{re.escape(ray_version())}-{PYTHON}-(cpu|gpu|cu\d+)\S*", tag):
        yield f"{field}={image}: its tag has to name the Ray and Python of constraints.txt: {want}"
    elif gpu and "-cpu" in tag:
        yield f"{field}={image}: a node with a GPU needs an image with CUDA: {want}"


def label_problems(field: str, labels: Document) -> Iterator[str]:
    """Yield the labels that Ray refuses to take from us."""
    for key in labels:
        if key.startswith("ray.io/"):
            yield f"{field}.{key}: Ray keeps this prefix for itself: use another, such as tagi-pool"


def size(text: str | int) -> int:
    """Return the bytes of `5g`, `5Gi` or a number."""
    number, unit = re.fullmatch(r"(\d+)\s*([a-zA-Z]*)", str(text).strip()).groups()  # type: ignore[union-attr]
    return int(number) * _UNITS[unit.lower()]
