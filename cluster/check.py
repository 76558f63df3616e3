"""Look over a cluster file before it costs anything: `python cluster/check.py cluster.yaml ...`.

Takes files for `ray up` and Kubernetes manifests (RayCluster, RayJob, PersistentVolumeClaim). Prints
one sentence for each mistake, with its cure, and ends with 2 where there is one. It needs the
project's own environment, no cloud account and no network.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import yaml
from check_launcher import launcher_problems
from check_manifests import manifest_problems

PLACEHOLDER = "REPLACE_ME"


def problems(path: Path, definitions: Path | None = None) -> list[str]:
    """Return the mistakes of a file, each as file, field, value and cure.

    `definitions` is a folder with KubeRay's definitions (`ray.io_*.yaml.gz`); without it a manifest
    is held against our rules and Ray's own reading only. Placeholders are not mistakes.
    """
    try:
        documents = [one for one in yaml.safe_load_all(path.read_text(encoding="utf-8")) if one]
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        return [f"{path}: {' '.join(str(error).split())}: it has to be a YAML file"]
    if not documents:
        return [f"{path}: it is empty: see cluster/README.md for the files that ship"]
    found: list[str] = []
    for document in documents:
        try:
            if "provider" in document:
                found += launcher_problems(document)
            else:
                found += manifest_problems(document, definitions)
        except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
            found.append(
                f"a field has another shape than it should ({error!r}): see the shipped file"
            )
    return [f"{path}: {each}" for each in dict.fromkeys(found)]


def placeholders(path: Path) -> list[str]:
    """Return the lines that still hold a placeholder."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [
        f"{path}: line {number}: {line.strip()}: put your own in place of {PLACEHOLDER}"
        for number, line in enumerate(lines, 1)
        if PLACEHOLDER in line.partition("# ")[0]
    ]


def main(arguments: list[str] | None = None) -> int:
    """Print the mistakes of the files; return 2 where there is one."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("file", nargs="+", type=Path)
    parser.add_argument("--definitions", type=Path, help="folder of KubeRay's ray.io_*.yaml.gz")
    given = parser.parse_args(arguments)
    found: list[str] = []
    for path in given.file:
        mistakes = problems(path, given.definitions)
        found += mistakes + (placeholders(path) if path.exists() else [])
    print("\n".join(found) or "No mistake found.")
    return 2 if found else 0


if __name__ == "__main__":
    sys.exit(main())
