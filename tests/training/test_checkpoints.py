"""Only checkpoints that were written to their end, and are as they were written, count."""

from pathlib import Path

import pytest

from align.training.checkpoints import MARKER, is_complete, last_complete, link, mark_complete
from tests.support.training.damage import DAMAGES, flip_bit


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


def test_an_unmarked_one_is_left_alone_where_none_is_cut_short(tmp_path: Path) -> None:
    foreign, full = checkpoint(tmp_path, 9, marked=False), checkpoint(tmp_path, 4)
    assert last_complete(tmp_path, unmarked="leave") == full
    assert foreign.is_dir()


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["model.safetensors", "adapter/weights", MARKER])
def test_damage_after_marking_is_seen(tmp_path: Path, name: str, damage: str) -> None:
    folder = checkpoint(tmp_path, 4)
    assert is_complete(folder)
    DAMAGES[damage](folder / name)
    assert not is_complete(folder)
    messages: list[str] = []
    assert last_complete(tmp_path, messages.append) is None
    assert not folder.exists()
    if (name, damage) == (MARKER, "deleted"):  # as after a kill
        assert messages == []
    else:
        assert name in messages[0]
        assert (tmp_path / "damaged" / "checkpoint-4" / "adapter").is_dir()


@pytest.mark.parametrize("content", ["[]", "{}", "null", '{"sha256": []}', '{"sha256": {}}', '{"sha256": {"x": 1}}'])
def test_a_marker_with_other_content_marks_nothing(tmp_path: Path, content: str) -> None:
    folder = checkpoint(tmp_path, 4)
    (folder / MARKER).write_text(content, encoding="utf-8")
    assert not is_complete(folder)


def test_the_older_one_is_taken_and_each_damaged_one_is_named(tmp_path: Path) -> None:
    folders = [checkpoint(tmp_path, step) for step in (2, 4, 6, 8)]
    for folder in folders[2:]:
        flip_bit(folder / "model.safetensors")
    messages: list[str] = []
    assert last_complete(tmp_path, messages.append) == folders[1]
    assert ["checkpoint-8" in messages[0], "checkpoint-6" in messages[1]] == [True, True]
    assert all("resumes from checkpoint-4" in message for message in messages)
    assert folders[0].is_dir()


def test_the_newest_is_damaged_a_second_time(tmp_path: Path) -> None:
    for _ in range(2):
        flip_bit(checkpoint(tmp_path, 4) / "model.safetensors")
        assert last_complete(tmp_path) is None
    assert [path.name for path in (tmp_path / "damaged").iterdir()] == ["checkpoint-4"]


def test_a_second_name_outlives_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a file system has no hard links."""
    file, target = tmp_path / "best", tmp_path / "kept"
    for content, links in ((b"one", True), (b"two", False)):
        file.write_bytes(content)
        if not links:
            monkeypatch.setattr(Path, "hardlink_to", lambda self, link: (_ for _ in ()).throw(OSError()))
        link(file, target)
        link(file, target)
        file.unlink()
        assert target.read_bytes() == content
        assert [path.name for path in tmp_path.iterdir()] == ["kept"]
