"""Only checkpoints that were written to their end count."""

from pathlib import Path

import pytest

from align.training.checkpoints import MARKER, is_complete, last_complete, mark_complete


def checkpoint(root: Path, step: int, marked: bool = True) -> Path:
    folder = root / f"checkpoint-{step}"
    (folder / "adapter").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"x" * 100)
    (folder / "adapter" / "weights").write_bytes(b"y" * 10)
    if marked:
        mark_complete(folder)
    return folder


def test_newest_complete_one_is_found_by_number(tmp_path: Path) -> None:
    for step in (9, 10):
        checkpoint(tmp_path, step)
    assert last_complete(tmp_path) == tmp_path / "checkpoint-10"
    assert last_complete(tmp_path / "nothing") is None


def test_unmarked_one_is_deleted(tmp_path: Path) -> None:
    checkpoint(tmp_path, 4)
    half = checkpoint(tmp_path, 8, marked=False)
    assert last_complete(tmp_path) == tmp_path / "checkpoint-4"
    assert not half.exists()


@pytest.mark.parametrize("damage", ["shorter", "missing", "marker"])
def test_damage_after_marking_is_seen(tmp_path: Path, damage: str) -> None:
    folder = checkpoint(tmp_path, 4)
    assert is_complete(folder)
    if damage == "shorter":
        (folder / "model.safetensors").write_bytes(b"x" * 99)
    elif damage == "missing":
        (folder / "adapter" / "weights").unlink()
    else:
        (folder / MARKER).write_text("{", encoding="utf-8")
    assert not is_complete(folder)
    assert last_complete(tmp_path) is None
