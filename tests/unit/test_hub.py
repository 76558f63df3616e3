"""Models and datasets of the hub, played by a local server, asked by processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import T5Config

from tests.hub_server import HubServer, Repository, commit, hub_server
from tests.models import random_t5

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "tagi_ray" / "demo_backbone"
FETCH = """
import sys
from tagi_ray.hub import model_folder
print(model_folder(sys.argv[1], sys.argv[2] or None))
"""


@pytest.fixture
def server() -> Iterator[HubServer]:
    with hub_server() as running:
        yield running


@pytest.fixture
def model(tmp_path: Path, server: HubServer) -> Repository:
    """The repository owner/t5, with a pickle that nobody may fetch."""
    folder = tmp_path / "t5"
    random_t5().save_pretrained(folder)
    (folder / "pytorch_model.bin").write_bytes(b"never")
    repository = Repository.of(folder)
    server.repositories["models/owner/t5"] = repository
    return repository


def start(
    server: HubServer, tmp_path: Path, script: str, *arguments: str, **environment: str
) -> subprocess.Popen[str]:
    env = {**os.environ, **server.environment, "HF_HOME": str(tmp_path / "home"), **environment}
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def fetch(
    server: HubServer, tmp_path: Path, path: str = "owner/t5", revision: str = "", **env: str
) -> tuple[str, str]:
    """The folder and what was logged, or the sentence of the error."""
    out, err = start(server, tmp_path, FETCH, path, revision, **env).communicate(timeout=120)
    return out.strip(), err.strip().splitlines()[-1] if err.strip() else ""


def test_many_processes_of_a_node_fetch_each_file_once(server, model, tmp_path):
    processes = [start(server, tmp_path, FETCH, "owner/t5", commit(1)) for _ in range(6)]
    results = [process.communicate(timeout=120) for process in processes]
    assert {process.returncode for process in processes} == {0}, results
    (folder,) = {out.strip() for out, _ in results}
    assert sorted(one.name for one in Path(folder).iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors",
    ]  # fmt: skip
    assert [server.fetched(name) for name in ("config.json", "model.safetensors")] == [1, 1]
    assert sum("/api/" in one for one in server.requests) <= 2


def test_a_pinned_commit_in_the_cache_needs_no_network(server, model, tmp_path):
    folder, _ = fetch(server, tmp_path)
    server.requests.clear()
    assert fetch(server, tmp_path, revision=commit(1))[0] == folder
    assert server.requests == []
    assert fetch(server, tmp_path, HF_HUB_OFFLINE="1")[0] == folder
    del server.repositories["models/owner/t5"]
    away = "http://127.0.0.1:9"
    again, said = fetch(server, tmp_path, HF_ENDPOINT=away)
    assert again == folder
    assert "the hub can't be reached; cached: " + commit(1) in said


def test_a_folder_that_lacks_a_shard_is_completed(server, model, tmp_path):
    files = model.files[commit(1)]
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    files["model.safetensors.index.json"] = json.dumps(index).encode()
    files["model-1.safetensors"] = files["model-2.safetensors"] = files.pop("model.safetensors")
    folder, _ = fetch(server, tmp_path)
    (Path(folder) / "model-2.safetensors").unlink()
    for tree in (tmp_path / "home").rglob("trees/*.json"):
        tree.unlink()  # as where another tool began it
    assert "it is not in" in fetch(server, tmp_path, HF_HUB_OFFLINE="1")[1]
    assert fetch(server, tmp_path, revision=commit(1))[0] == folder
    assert (Path(folder) / "model-2.safetensors").exists()


def test_a_busy_hub_is_asked_again(server, model, tmp_path):
    server.busy = 2
    folder, _ = fetch(server, tmp_path)
    assert folder.endswith(commit(1))


def test_a_token_of_the_node_opens_a_gated_model(server, model, tmp_path):
    model.token = "hf_canary"
    assert "accept it at http" in fetch(server, tmp_path)[1]
    folder, said = fetch(server, tmp_path, HF_TOKEN="hf_canary")
    assert folder.endswith(commit(1))
    assert "canary" not in said


def offline(server: HubServer, model: Repository) -> dict[str, str]:
    return {"HF_HUB_OFFLINE": "1"}


def unreachable(server: HubServer, model: Repository) -> dict[str, str]:
    return {"HF_ENDPOINT": "http://127.0.0.1:9"}


def gated(server: HubServer, model: Repository) -> dict[str, str]:
    model.token = "hf_canary"
    return {"HF_TOKEN": "hf_other"}


def too_busy(server: HubServer, model: Repository) -> dict[str, str]:
    server.busy = 1000
    return {}


def only_pickles(server: HubServer, model: Repository) -> dict[str, str]:
    del model.files[commit(1)]["model.safetensors"]
    return {}


def nothing(server: HubServer, model: Repository) -> dict[str, str]:
    return {}


@pytest.mark.parametrize(
    ("change", "path", "revision", "sentence"),
    [
        (offline, "owner/t5", "", "HF_HUB_OFFLINE=1 forbids to fetch it: unset HF_HUB_OFFLINE, or"),
        (unreachable, "owner/t5", "", "backbone.path=owner/t5 can't be fetched from http://127.0"),
        (gated, "owner/t5", "", "is only for those who accepted its licence: accept it at http"),
        (too_busy, "owner/t5", "", "still answers 429 (too many requests) after 6 tries: start"),
        (only_pickles, "owner/t5", "", "owner/t5 has no .safetensors weights at revision main, and"),
        (nothing, "owner/none", "", "owner/none is no repository of the hub that this token can see"),
        (nothing, "owner/t5", "v9", "backbone.revision=v9 is no branch, tag or commit of owner/t5"),
        (nothing, "owner/t5", commit(9), f"backbone.revision={commit(9)} is no branch, tag or"),
        (nothing, "/no/such/folder", "", "/no/such/folder is no folder here, and no id of the hub"),
    ],
)  # fmt: skip
def test_what_the_hub_refuses_is_one_sentence(
    server, model, tmp_path, change, path, revision, sentence
):
    environment = change(server, model)
    out, error = fetch(server, tmp_path, path, revision, **environment)
    assert out == ""
    assert error.startswith("tagi_ray.errors.ConfigError: backbone.")
    assert sentence in error
    assert "canary" not in error
    assert server.fetched("pytorch_model.bin") == 0


OPEN = """
import json, sys
from tagi_ray import recipes
from tagi_ray.errors import RunConflictError
from tagi_ray.pipeline import open_run
from pathlib import Path
from tests.tiny_run import tiny_experiment
experiment = tiny_experiment(Path(sys.argv[1]))
backbone = {
    "path": "owner/t5", "tokenizer": "demo", "revision": sys.argv[2] or None, "architecture": None
}
changed = experiment.backbone.model_copy(update=backbone)
try:
    opened, run = open_run(experiment.model_copy(update={"backbone": changed}))
except RunConflictError as error:
    sys.exit(str(error))
print(json.dumps([opened.backbone.revision, (run / "config.yaml").read_text()]))
"""


def test_a_run_keeps_the_commit_that_it_was_started_with(server, model, tmp_path):
    def opened(revision: str = "") -> tuple[str, str]:
        process = start(server, tmp_path, OPEN, str(tmp_path), revision)
        return process.communicate(timeout=120)

    out, err = opened()
    revision, config = json.loads(out or f'["", {json.dumps(err)}]')
    assert revision == commit(1), config
    assert "revision" not in config or commit(1) not in config
    assert server.fetched("model.safetensors") == 0  # the driver's machine needs no weights

    model.files[commit(2)] = dict(model.files[commit(1)])
    model.refs["main"] = commit(2)
    assert json.loads(opened()[0])[0] == commit(1)
    assert json.loads(opened(commit(1))[0])[0] == commit(1)
    out, err = opened(commit(2))
    assert out == ""
    assert f"was started with other weights in backbone.path=owner/t5 (owner/t5@{commit(1)}" in err
    assert f"or set backbone.revision={commit(1)}" in err


LOAD = """
import sys
import torch
from pathlib import Path
from tagi_ray.families import load_backbone
from tagi_ray.hub import pinned
from tagi_ray.sections import BackboneSettings, LoraSettings
from tagi_ray.vocabulary import prepare_tokenizer
folder = Path(sys.argv[1])
settings = pinned(BackboneSettings(path="owner/demo"))
prepare_tokenizer(settings, folder, folder / "tokenizer")
models = [
    load_backbone(one, LoraSettings(), folder / "tokenizer").model.state_dict()
    for one in (settings, BackboneSettings())
]
assert models[0].keys() == models[1].keys()
assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
"""


def test_a_model_of_the_hub_is_loaded_with_its_tokenizer(server, tmp_path):
    repository = Repository.of(DEMO)
    special = {"pad_token": "<pad>", "eos_token": "</s>"}
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    repository.files[commit(1)]["tokenizer_config.json"] = json.dumps(tokenizer).encode()
    server.repositories["models/owner/demo"] = repository
    process = start(server, tmp_path, LOAD, str(tmp_path))
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    prepared = json.loads((tmp_path / "tokenizer" / "tokenizer.json").read_text())
    assert prepared["model"] == json.loads((DEMO / "tokenizer.json").read_text())["model"]


ROWS = """
import sys
from tagi_ray.errors import DataError, ConfigError
from tagi_ray.sections import DataSettings
from tagi_ray.task_files import read_tasks
fields = dict(one.split("=") for one in sys.argv[1:])
try:
    for source in read_tasks(DataSettings(source="hub", test_tasks=("x",), **fields)):
        print(source.task.name, [one.input for one in source.instances()])
except (DataError, ConfigError) as error:
    sys.exit(str(error))
"""


@pytest.fixture
def dataset(server: HubServer) -> Repository:
    rows = [{"task": "a", "instruction": "Do.", "input": str(i), "output": "x"} for i in range(3)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    card = """---
configs:
- config_name: one
  data_files: [{split: train, path: one.jsonl}, {split: other, path: two.jsonl}]
- config_name: two
  data_files: [{split: train, path: two.jsonl}]
---
"""
    wrong = json.dumps({"question": "?", "answer": "!"}).encode()
    files = {"README.md": card.encode(), "one.jsonl": lines, "two.jsonl": lines[: len(lines) // 3]}
    repository = Repository({commit(1): files, commit(2): {"rows.py": b"raise SystemExit"},
                             commit(3): {"rows.jsonl": wrong}},
                            {"main": commit(1), "script": commit(2), "wrong": commit(3)})  # fmt: skip
    server.repositories["datasets/owner/rows"] = repository
    return repository


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (("subset=one",), "a ['0', '1', '2']"),
        (("subset=one", "hub_split=other"), "a ['0']"),
        (("subset=two", "revision=main"), "a ['0']"),
        ((), "data.subset is not set, and data.path=owner/rows has several"),
        (("subset=three",), "data.subset=three is no subset, and data.path=owner/rows has several"),
        (("subset=one", "hub_split=valid"), "data.hub_split=valid is no split of data.path=owner"),
        (("revision=script",), "set data.revision=refs/convert/parquet"),
        (("revision=wrong",), "has no column 'input' and no column 'instruction' and no column"),
        (("revision=v9",), "data.revision=v9 is no branch, tag or commit of owner/rows"),
    ],
)
def test_datasets_of_the_hub(server, dataset, tmp_path, fields, said):
    process = start(server, tmp_path, ROWS, "path=owner/rows", *fields)
    out, err = process.communicate(timeout=120)
    assert said in (out if process.returncode == 0 else err.splitlines()[-1])


def test_a_dataset_in_the_cache_is_read_offline(server, dataset, tmp_path):
    arguments = ("path=owner/rows", "subset=one")
    first = start(server, tmp_path, ROWS, *arguments).communicate(timeout=120)
    again = start(server, tmp_path, ROWS, *arguments, HF_HUB_OFFLINE="1").communicate(timeout=120)
    assert again[0] == first[0] == "a ['0', '1', '2']\n", again[1]
    arguments = ("path=owner/other",)
    _, err = start(server, tmp_path, ROWS, *arguments, HF_HUB_OFFLINE="1").communicate(timeout=120)
    assert "HF_HUB_OFFLINE=1 forbids to fetch it" in err


def test_code_in_a_repository_is_never_run(server, model, tmp_path):
    config = T5Config().to_dict() | {"auto_map": {"AutoConfig": "code.Config"}, "model_type": "new"}
    canary = tmp_path / "canary"
    model.files[commit(1)] |= {
        "config.json": json.dumps(config).encode(),
        "code.py": f"open({str(canary)!r}, 'w')".encode(),
    }
    out, err = start(server, tmp_path, OPEN, str(tmp_path), "").communicate(timeout=120)
    assert out == ""
    assert "backbone.path=owner/t5 cannot be loaded" in err
    assert not canary.exists()
