"""Checkpoints: what is kept, what counts as torn, what is refused."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tagi_ray import checkpoint
from tagi_ray.errors import CheckpointError


def write(folder: Path, step: int, best: int | None = None, fingerprint: str = "f") -> Path:
    tensors = {"model.w": torch.full((3, 4), float(step)), "step": torch.tensor(step)}
    chosen = None if best is None else {"step": best, "valid_loss": 0.5}
    meta = {"fingerprint": fingerprint, "position": 8 * step, "progress": {"best": chosen}}
    return checkpoint.save(folder, step, tensors, meta, best=best)


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


DAMAGES: dict[str, Callable[[Path], None]] = {
    "flipped": lambda path: flip_a_byte(path / "state.safetensors"),
    "cut": lambda path: cut(path / "state.safetensors"),
    "without its state": lambda path: (path / "state.json").unlink(),
    "uncommitted": lambda path: (path / "COMMIT").unlink(),
    "manifest rewritten": lambda path: (path / "MANIFEST.json").write_text("{}"),
}


def test_what_is_loaded_is_what_was_saved(tmp_path: Path) -> None:
    path = write(tmp_path, 5)
    assert checkpoint.latest(tmp_path) == path
    tensors, meta = checkpoint.load(path, "f")
    assert (meta["step"], meta["position"], meta["fingerprint"]) == (5, 40, "f")
    assert torch.equal(tensors["model.w"], torch.full((3, 4), 5.0))
    assert tensors["step"].dtype == torch.int64


def test_newest_two_and_the_best_are_kept(tmp_path: Path) -> None:
    for step in range(1, 7):
        write(tmp_path, step * 100, best=200 if step >= 2 else None)
    assert checkpoint.steps(tmp_path) == [200, 500, 600]


@pytest.mark.parametrize("name", DAMAGES)
def test_torn_checkpoint_is_set_aside_for_the_one_before(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    older, newer = write(tmp_path, 1), write(tmp_path, 2)
    DAMAGES[name](newer)
    with caplog.at_level(logging.WARNING):
        assert checkpoint.latest(tmp_path) == older
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "step_00000002" in caplog.text
    assert (tmp_path / "torn_step_00000002").is_dir()
    assert checkpoint.steps(tmp_path) == [1]
    caplog.clear()
    assert checkpoint.latest(tmp_path) == older
    assert not caplog.records


def test_best_in_validation_is_chosen_else_the_newest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    newest = write(tmp_path, 1)
    assert checkpoint.best(newest) == newest
    assert checkpoint.best_loss(newest) == float("inf")
    write(tmp_path, 2)
    write(tmp_path, 3, best=2)
    newest = write(tmp_path, 4, best=2)
    assert checkpoint.best(newest) == tmp_path / "step_00000002"
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "load_file", None)
        assert checkpoint.best_loss(newest) == 0.5
    flip_a_byte(tmp_path / "step_00000002" / "state.safetensors")
    with pytest.raises(CheckpointError, match="best in validation, is damaged"):
        checkpoint.best(newest)


def test_no_way_on_when_all_are_torn(tmp_path: Path) -> None:
    for step in (1, 2):
        flip_a_byte(write(tmp_path, step) / "state.safetensors")
    for _ in range(2):  # asking again must not turn into a fresh start
        with pytest.raises(CheckpointError, match="every checkpoint is damaged"):
            checkpoint.latest(tmp_path)


def test_nothing_written_is_no_checkpoint(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path / "absent") is None
    assert checkpoint.latest(tmp_path) is None


def test_a_crash_while_writing_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = write(tmp_path, 1)
    for name in ("MANIFEST.json", "COMMIT"):

        def crash(path: Path, wanted: str = name) -> None:
            if path.name == wanted:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "_flush", crash)
            with pytest.raises(KeyboardInterrupt):
                write(tmp_path, 2)
        assert checkpoint.latest(tmp_path) == older
    assert checkpoint.latest(tmp_path) == older
    newer = write(tmp_path, 2)
    assert checkpoint.latest(tmp_path) == newer
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000001", "step_00000002"]


def test_other_settings_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, 1, fingerprint="old")
    with pytest.raises(CheckpointError, match="other settings or data"):
        checkpoint.load(path, "new")
    assert json.loads((path / "state.json").read_text())["fingerprint"] == "old"


def test_meta_data_are_verified_and_leave_the_tensors_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, 7)
    monkeypatch.setattr(checkpoint, "load_file", None)
    assert checkpoint.meta(path, "f")["position"] == 56
    with pytest.raises(CheckpointError, match="other settings or data"):
        checkpoint.meta(path, "new")
    flip_a_byte(path / "state.json")
    with pytest.raises(CheckpointError, match=r"state\.json has another hash"):
        checkpoint.meta(path)
    (path / "state.json").unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.meta(path)
