"""Files of rollouts: what a writer leaves after kills and limits, and what readers of Parquet see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from align.store import rollouts
from align.store.rollouts import (
    ROLLOUTS,
    SCHEMA,
    VALIDATIONS,
    RolloutFiles,
    is_kept,
    make_table,
    merge,
    open_rollouts,
    read_settings,
    rollout_files,
    rollout_rows,
)


def make_files(root: Path, max_bytes: int = 10**9) -> tuple[RolloutFiles, list[str]]:
    notes: list[str] = []
    return RolloutFiles(root, max_bytes, {"stage": "ppo"}, notes.append), notes


def update_table(update: int, text: str = "answer") -> Any:
    rows = [
        {"update": update, "index": index, "prompt": [{"role": "user", "content": "q"}], "response": f"{text} {update}",
         "score": index / 4, "scores": {"form": 0.5}, "token_ids": [1, 2], "logprobs": [-0.5, -0.25]}
        for index in range(4)
    ]  # fmt: skip
    return make_table(rows)


def updates_in(folder: Path) -> list[int]:
    return open_rollouts(folder).to_table(columns=["update"])["update"].to_pylist()


def test_small_updates_share_files_and_large_ones_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, _ = make_files(tmp_path)
    for update in (1, 2, 3):
        files.write(update_table(update))
        assert updates_in(tmp_path / ROLLOUTS) == [number for number in range(1, update + 1) for _ in range(4)]
    assert [path.name for path in rollout_files(tmp_path / ROLLOUTS)] == ["000001.parquet"]
    monkeypatch.setattr(rollouts, "FILE_BYTES", 1)
    files.write(update_table(4))
    files.write(update_table(5))
    names = [path.name for path in rollout_files(tmp_path / ROLLOUTS)]
    assert names == ["000001.parquet", "000004.parquet", "000005.parquet"]


@pytest.mark.parametrize("file_bytes", [1, 10**6])
def test_resumed_writer_repeats_and_loses_no_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file_bytes: int
) -> None:
    monkeypatch.setattr(rollouts, "FILE_BYTES", file_bytes)
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


def test_oldest_updates_go_first_beyond_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollouts, "FILE_BYTES", 1)
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


def test_an_open_file_stays_readable_while_the_run_writes(tmp_path: Path) -> None:
    files, _ = make_files(tmp_path)
    files.write(update_table(1))
    with pq.ParquetFile(rollout_files(tmp_path / ROLLOUTS)[0]) as file:
        files.write(update_table(2))
        assert set(file.read(columns=["update"])["update"].to_pylist()) == {1}
    assert set(updates_in(tmp_path / ROLLOUTS)) == {1, 2}


def test_kill_while_writing_leaves_the_former_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, _ = make_files(tmp_path)
    files.write(update_table(1))
    written = rollouts.write_parquet

    def die(table: Any, path: Path) -> None:
        written(table, path)
        path.write_bytes(path.read_bytes()[:100])
        raise KeyboardInterrupt

    monkeypatch.setattr(rollouts, "write_parquet", die)
    with pytest.raises(KeyboardInterrupt):
        files.write(update_table(2))
    assert updates_in(tmp_path / ROLLOUTS) == [1] * 4


def test_merge_keeps_rows_order_and_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollouts, "FILE_BYTES", 1)
    files, _ = make_files(tmp_path)
    for update in range(1, 8):
        files.write(update_table(update))
    before = open_rollouts(tmp_path / ROLLOUTS).to_table()
    group = 2 * rollouts.pq.read_table(rollout_files(tmp_path / ROLLOUTS)[0], schema=SCHEMA).nbytes
    monkeypatch.setattr(rollouts, "GROUP_BYTES", group)
    monkeypatch.setattr(rollouts, "MERGED_BYTES", 2 * group)
    for _ in range(2):  # a stage that was killed at its end merges again
        merge(tmp_path / ROLLOUTS, tmp_path / "output")
        assert open_rollouts(tmp_path / "output").to_table().equals(before)
    names = [path.name for path in rollout_files(tmp_path / "output")]
    assert names == ["000001.parquet", "000005.parquet"]
    assert pq.ParquetFile(tmp_path / "output" / names[0]).num_row_groups == 2
    assert read_settings(tmp_path / "output") == {"stage": "ppo"}


def test_rows_are_read_lazily_with_filters_and_json(tmp_path: Path) -> None:
    files, _ = make_files(tmp_path)
    for update in (1, 2):
        files.write(update_table(update))
    data = open_rollouts(tmp_path / ROLLOUTS)
    rows = list(rollout_rows(data, ["update", "prompt", "scores"], filter=pc.field("score") > 0.5))
    assert [row["update"] for row in rows] == [1, 2]
    assert rows[0]["prompt"] == [{"role": "user", "content": "q"}] and rows[0]["scores"] == {"form": 0.5}
    assert open_rollouts(tmp_path / "none").to_table().num_rows == 0
    assert open_rollouts(tmp_path / "none").schema.equals(SCHEMA)


def test_pandas_reads_a_folder(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    files, _ = make_files(tmp_path)
    files.write(update_table(1))
    frame = pandas.read_parquet(tmp_path / ROLLOUTS)
    assert list(frame.columns) == SCHEMA.names and frame["score"].tolist() == [0.0, 0.25, 0.5, 0.75]


def test_duckdb_reads_a_folder(tmp_path: Path) -> None:
    duckdb = pytest.importorskip("duckdb")
    files, _ = make_files(tmp_path)
    files.write(update_table(1))
    query = f"select scores['form'], logprobs[2] from '{tmp_path / ROLLOUTS}/*.parquet' where score > 0.5"
    assert duckdb.sql(query).fetchall() == [(0.5, -0.25)]


def test_half_characters_are_stored(tmp_path: Path) -> None:
    table = make_table([{"update": 1, "response": "a\ud800b", "prompt": "\ud800", "failure": "\ud83d"}])
    (row,) = rollout_rows(table)
    assert (row["response"], row["prompt"], row["failure"]) == ("a?b", "\ud800", "?")
    with pytest.raises(ValueError, match="reward is no column of rollouts"):
        make_table([{"reward": 1.0}])


def test_share_of_prompts_is_kept_whole() -> None:
    names = [f"p{number}" for number in range(2_000)]
    kept = {name for name in names if is_kept(name, 0.25)}
    assert 430 < len(kept) < 570
    assert kept < {name for name in names if is_kept(name, 0.5)}
    assert all(is_kept(name, 1.0) for name in names) and not any(is_kept(name, 0.0) for name in names)
