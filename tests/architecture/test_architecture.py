from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = sorted((ROOT / "tagi_ray").rglob("*.py"))
JOBS = sorted((ROOT / "jobs").glob("*.py"))
LIGHT = ["errors", "config", "recipes", "tasks", "prompts", "synthetic", "trials"]
HEAVY = {"torch", "ray", "transformers", "pyarrow", "datasets", "peft", "deepspeed", "tokenizers"}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(tree: ast.AST) -> Iterator[str]:
    """Yield the top-level package of every import, wherever it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.split(".")[0]


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", JOBS, ids=relative)
def test_jobs_are_thin(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 40
    assert HEAVY.isdisjoint(imports(parse(path)))


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_modules_and_functions_stay_small(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400
    long = {
        node.name: node.end_lineno - node.lineno + 1
        for node in ast.walk(parse(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno >= 60
    }
    assert not long


def test_only_zero_imports_deepspeed():
    users = {relative(path) for path in MODULES if "deepspeed" in set(imports(parse(path)))}
    assert users <= {"tagi_ray/zero.py"}


def test_no_class_takes_a_name_of_the_libraries():
    taken = {
        "RunConfig", "ScalingConfig", "CheckpointConfig", "FailureConfig", "Checkpoint", "Result",
        "LoraConfig", "LoraModel", "PeftModel", "TrainingArguments", "Trainer", "Dataset",
    }  # fmt: skip
    names = {
        f"{relative(path)}: {node.name}"
        for path in MODULES
        for node in ast.walk(parse(path))
        if isinstance(node, ast.ClassDef) and node.name in taken
    }
    assert not names


def test_light_modules_import_nothing_heavy():
    script = (
        "import importlib, sys\n"
        f"for name in {LIGHT}: importlib.import_module('tagi_ray.' + name)\n"
        f"found = {HEAVY!r} & set(sys.modules)\n"
        "assert not found, found\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
