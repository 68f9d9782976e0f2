"""Files of rollouts: what a writer leaves after merges, kills and limits."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from align.store import rollout_writer
from align.store.rollout_writer import RolloutFiles, merge
from align.store.rollouts import (
    ROLLOUTS,
    SCHEMA,
    VALIDATIONS,
    checked_files,
    open_rollouts,
    read_manifest,
    read_settings,
    rollout_files,
    rollout_rows,
    updates_of,
)
from tests.support.stored_rollouts import update_table


def make_files(root: Path, max_bytes: int = 10**9) -> tuple[RolloutFiles, list[str]]:
    notes: list[str] = []
    return RolloutFiles(root, max_bytes, {"stage": "ppo"}, notes.append), notes


def updates_in(folder: Path) -> list[int]:
    return open_rollouts(folder).to_table(columns=["update"])["update"].to_pylist()


def ranges_in(folder: Path) -> list[tuple[int, int] | None]:
    return [updates_of(path.name) for path in rollout_files(folder)]


def test_eight_files_of_a_level_are_merged_into_a_new_file(tmp_path: Path) -> None:
    files, _ = make_files(tmp_path)
    folder = tmp_path / ROLLOUTS
    contents: dict[str, bytes] = {}
    for update in range(1, 66):
        files.write(update_table(update))
        assert updates_in(folder) == [number for number in range(1, update + 1) for _ in range(4)]
        now = {path.name: path.read_bytes() for path in folder.glob("*.parquet")}
        assert now.items() >= contents.items()  # no file is written twice
        contents = now
    assert ranges_in(folder) == [(1, 64), (65, 65)]
    assert [file.level for file in read_manifest(folder) or []] == [2, 0]
    assert len(contents) == 65 + 8 + 1
    assert checked_files(folder) == rollout_files(folder)


def test_large_files_are_not_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout_writer, "MERGED_BYTES", 1)
    files, _ = make_files(tmp_path)
    for update in range(1, 11):
        files.write(update_table(update))
    assert ranges_in(tmp_path / ROLLOUTS) == [(update, update) for update in range(1, 11)]


def test_merged_files_stay_until_readers_are_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(rollout_writer.time, "monotonic", lambda: now[0])
    files, _ = make_files(tmp_path)
    folder = tmp_path / ROLLOUTS
    for update in range(1, 8):
        files.write(update_table(update))
    earlier = open_rollouts(folder)
    files.write(update_table(8))
    now[0] = rollout_writer.GRACE_SECONDS - 1
    files.write(update_table(9))
    assert set(earlier.to_table()["update"].to_pylist()) == set(range(1, 8))
    now[0] += 1
    files.write(update_table(10))
    assert sorted(folder.glob("*.parquet")) == rollout_files(folder)


@pytest.mark.parametrize("merged_files", [2, 8])
def test_resumed_writer_repeats_and_loses_no_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, merged_files: int
) -> None:
    monkeypatch.setattr(rollout_writer, "MERGED_FILES", merged_files)
    killed, _ = make_files(tmp_path)
    for update in range(1, 6):
        killed.write(update_table(update, "lost"))
        killed.write(update_table(update), VALIDATIONS)
    resumed, _ = make_files(tmp_path)
    resumed.rewind(3)
    assert updates_in(tmp_path / ROLLOUTS) == [1] * 4 + [2] * 4 + [3] * 4
    assert updates_in(tmp_path / VALIDATIONS) == [1] * 4 + [2] * 4  # that of update 3 is repeated
    for update in (4, 5):
        resumed.write(update_table(update, "kept"))
    rows = list(rollout_rows(open_rollouts(tmp_path / ROLLOUTS)))
    assert [row["response"] for row in rows[::4]] == ["lost 1", "lost 2", "lost 3", "kept 4", "kept 5"]
    resumed.rewind(0)
    assert not rollout_files(tmp_path / ROLLOUTS) and not rollout_files(tmp_path / VALIDATIONS)


@pytest.mark.parametrize("step", ["file", "merged file", "manifest"])
def test_kill_while_writing_loses_only_the_last_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    files, _ = make_files(tmp_path)
    for update in range(1, 8):
        files.write(update_table(update))
    # The eighth update writes its file, the merged file and the manifest.
    remaining = {"file": 0, "merged file": 1, "manifest": 2}[step]
    replace = os.replace

    def die(*places: Any) -> None:
        nonlocal remaining
        if not remaining:
            raise KeyboardInterrupt
        remaining -= 1
        replace(*places)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", die)
        files.write(update_table(8))
    assert updates_in(tmp_path / ROLLOUTS) == [update for update in range(1, 8) for _ in range(4)]
    resumed, notes = make_files(tmp_path)
    resumed.rewind(5)
    for update in range(6, 10):
        resumed.write(update_table(update, "kept"))
    texts = [row["response"] for row in rollout_rows(open_rollouts(tmp_path / ROLLOUTS))][::4]
    assert texts == [f"{'answer' if update < 6 else 'kept'} {update}" for update in range(1, 10)]
    assert checked_files(tmp_path / ROLLOUTS) and not notes


def test_resumed_stage_deletes_files_that_no_manifest_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout_writer, "GRACE_SECONDS", 0.0)
    files, _ = make_files(tmp_path)
    files.write(update_table(1))
    stray = tmp_path / ROLLOUTS / "000001.parquet"
    stray.write_bytes(b"of an earlier version of align")
    resumed, _ = make_files(tmp_path)
    resumed.rewind(1)
    resumed.write(update_table(2))
    assert not stray.exists() and sorted(set(updates_in(tmp_path / ROLLOUTS))) == [1, 2]


@pytest.mark.parametrize("how", ["missing", "flipped bit", "manifest", "no manifest"])
def test_damaged_rollouts_are_dropped_with_a_warning(tmp_path: Path, how: str) -> None:
    files, _ = make_files(tmp_path)
    for update in (1, 2):
        files.write(update_table(update))
    path = rollout_files(tmp_path / ROLLOUTS)[0]
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "manifest":
        (tmp_path / "rollouts.json").write_text("{}")
    elif how == "no manifest":  # as after a run of an earlier version
        (tmp_path / "rollouts.json").unlink()
    else:
        path.write_bytes(bytes([*content[:50], content[50] ^ 1, *content[51:]]))
    resumed, notes = make_files(tmp_path)
    resumed.rewind(2)
    resumed.write(update_table(3))
    assert sorted(set(updates_in(tmp_path / ROLLOUTS))) == ([3] if "manifest" in how else [2, 3])
    assert len(notes) == 1 and ("rollouts.json" if "manifest" in how else path.name) in notes[0]
    assert checked_files(tmp_path / ROLLOUTS)


@pytest.mark.parametrize("how", ["missing", "flipped bit"])
def test_damage_does_not_end_a_running_stage(tmp_path: Path, how: str) -> None:
    files, notes = make_files(tmp_path)
    files.write(update_table(1))
    path = rollout_files(tmp_path / ROLLOUTS)[0]
    content = path.read_bytes()
    path.unlink()
    if how == "flipped bit":
        path.write_bytes(bytes([*content[:50], content[50] ^ 1, *content[51:]]))
    for update in range(2, 9):
        files.write(update_table(update))
    merge(tmp_path / ROLLOUTS, tmp_path / "output", notes.append)
    for folder in (tmp_path / ROLLOUTS, tmp_path / "output"):
        assert sorted(set(updates_in(folder))) == list(range(2, 9))
    assert len(notes) == 1 and path.name in notes[0]


def test_oldest_updates_go_first_beyond_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout_writer, "MERGED_BYTES", 1)
    files, notes = make_files(tmp_path)
    files.write(update_table(1))
    size = rollout_files(tmp_path / ROLLOUTS)[0].stat().st_size
    files, notes = make_files(tmp_path, max_bytes=int(size * 3.5))
    files.rewind(1)
    for update in range(2, 8):
        files.write(update_table(update))
        assert sum(path.stat().st_size for path in rollout_files(tmp_path / ROLLOUTS)) <= size * 3.5
    assert sorted(set(updates_in(tmp_path / ROLLOUTS))) == [5, 6, 7]
    assert len(notes) == 1 and "rollouts.max_gb" in notes[0]


def test_limit_counts_merged_files_and_validations(tmp_path: Path) -> None:
    files, _ = make_files(tmp_path, max_bytes=300_000)
    for update in range(1, 120):
        files.write(update_table(update))
        files.write(update_table(update), VALIDATIONS)
        listed = [*rollout_files(tmp_path / ROLLOUTS), *rollout_files(tmp_path / VALIDATIONS)]
        assert sum(path.stat().st_size for path in listed) <= 300_000
    for folder in (tmp_path / ROLLOUTS, tmp_path / VALIDATIONS):
        kept = sorted(set(updates_in(folder)))
        assert kept == list(range(kept[0], 120)) and 1 < kept[0] < 110


def test_merge_keeps_rows_order_and_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout_writer, "MERGED_FILES", 3)
    files, _ = make_files(tmp_path)
    for update in range(1, 8):
        files.write(update_table(update))
    before = open_rollouts(tmp_path / ROLLOUTS).to_table()
    merged = rollout_files(tmp_path / ROLLOUTS)[0]
    group = pq.read_table(merged, schema=SCHEMA).nbytes
    monkeypatch.setattr(rollout_writer, "GROUP_BYTES", group)
    monkeypatch.setattr(rollout_writer, "FINISHED_BYTES", merged.stat().st_size + 1)
    for _ in range(2):  # a stage that was killed at its end merges again
        merge(tmp_path / ROLLOUTS, tmp_path / "output", print)
        assert open_rollouts(tmp_path / "output").to_table().equals(before)
    assert ranges_in(tmp_path / "output") == [(1, 6), (7, 7)]
    assert pq.ParquetFile(rollout_files(tmp_path / "output")[0]).num_row_groups == 2
    assert read_settings(tmp_path / "output") == {"stage": "ppo"}
