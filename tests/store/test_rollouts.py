"""Stored rollouts: the values that are written, and what readers of Parquet see of a folder."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pyarrow.compute as pc
import pytest

from align.errors import UserError
from align.store.rollout_writer import RolloutFiles
from align.store.rollouts import (
    ROLLOUTS,
    SCHEMA,
    checked_files,
    is_kept,
    make_table,
    open_rollouts,
    read_located,
    read_manifest,
    read_settings,
    rollout_files,
    rollout_rows,
)
from tests.support.refusals import Refused
from tests.support.stored_rollouts import update_table


@pytest.fixture
def files(tmp_path: Path) -> RolloutFiles:
    return RolloutFiles(tmp_path, 10**9, {"stage": "ppo"}, print)


def test_rows_are_read_lazily_with_filters_and_json(tmp_path: Path, files: RolloutFiles) -> None:
    for update in (1, 2):
        files.write(update_table(update))
    data = open_rollouts(tmp_path / ROLLOUTS)
    rows = list(rollout_rows(data, ["update", "prompt", "scores"], filter=pc.field("score") > 0.5))
    assert [row["update"] for row in rows] == [1, 2]
    assert rows[0]["prompt"] == [{"role": "user", "content": "q"}] and rows[0]["scores"] == {"form": 0.5}
    assert open_rollouts(tmp_path / "none").to_table().num_rows == 0
    assert open_rollouts(tmp_path / "none").schema.equals(SCHEMA)


def test_pandas_reads_a_folder(tmp_path: Path, files: RolloutFiles) -> None:
    pandas = pytest.importorskip("pandas")
    files.write(update_table(1))
    frame = pandas.read_parquet(tmp_path / ROLLOUTS)
    assert list(frame.columns) == SCHEMA.names and frame["score"].tolist() == [0.0, 0.25, 0.5, 0.75]


def test_duckdb_reads_a_folder(tmp_path: Path, files: RolloutFiles) -> None:
    duckdb = pytest.importorskip("duckdb")
    files.write(update_table(1))
    query = f"select scores['form'], logprobs[2] from '{tmp_path / ROLLOUTS}/*.parquet' where score > 0.5"
    assert duckdb.sql(query).fetchall() == [(0.5, -0.25)]


def test_half_characters_are_stored(refused: Refused, tmp_path: Path) -> None:
    table = make_table([{"update": 1, "response": "a\ud800b", "prompt": "\ud800", "failure": "\ud83d"}])
    (row,) = rollout_rows(table)
    assert (row["response"], row["prompt"], row["failure"]) == ("a?b", "\ud800", "?")
    refused(make_table, [{"reward": 1.0}])


def test_share_of_prompts_is_kept_whole() -> None:
    names = [f"p{number}" for number in range(2_000)]
    kept = {name for name in names if is_kept(name, 0.25)}
    assert 430 < len(kept) < 570
    assert kept < {name for name in names if is_kept(name, 0.5)}
    assert all(is_kept(name, 1.0) for name in names) and not any(is_kept(name, 0.0) for name in names)


def test_duckdb_reads_what_a_manifest_lists(tmp_path: Path, files: RolloutFiles) -> None:
    """The statement of docs/rollouts.md: merged rows are in the folder twice and in the manifest once."""
    duckdb = pytest.importorskip("duckdb")
    for update in range(1, 10):
        files.write(update_table(update))
    folder = tmp_path / ROLLOUTS
    assert len(list(folder.glob("*.parquet"))) == 10
    documented = (Path(__file__).parents[2] / "docs" / "rollouts.md").read_text(encoding="utf-8")
    statement = documented.split("```sql\n")[2].split("```")[0]
    place = "store/ppo/0123456789ab.partial/checkpoints/rollouts"
    assert place in statement
    rows = duckdb.sql(statement.replace(place, str(folder))).fetchall()
    assert rows == [(update, 0.375) for update in range(1, 10)]


# ---- files that are not what a manifest lists


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    path.unlink()
    if how == "pipe":
        os.mkfifo(path)
    elif how == "folder":
        path.mkdir()
    elif how == "link":
        path.with_suffix(".copy").write_bytes(content)
        path.symlink_to(path.with_suffix(".copy"))
    elif how == "shorter":
        path.write_bytes(content[:-1])
    elif how == "flipped bit":
        path.write_bytes(bytes([*content[:50], content[50] ^ 1, *content[51:]]))


@pytest.mark.parametrize("how", ["pipe", "folder", "link", "shorter", "flipped bit", "missing"])
@pytest.mark.parametrize("place", ["file", "manifest"])
def test_other_file_than_listed_is_an_error(
    refused: Refused, tmp_path: Path, files: RolloutFiles, how: str, place: str
) -> None:
    files.write(update_table(1))
    (path,) = checked_files(tmp_path / ROLLOUTS)
    damaged = path if place == "file" else tmp_path / "rollouts.json"
    damage(damaged, how)
    started = time.monotonic()
    if place == "manifest" and how == "missing":
        assert checked_files(tmp_path / ROLLOUTS) == [path]  # as in a folder that was copied
        return
    refused(checked_files, tmp_path / ROLLOUTS)
    assert time.monotonic() - started < 5


def test_manifest_names_no_file_elsewhere(refused: Refused, tmp_path: Path, files: RolloutFiles) -> None:
    from align.store.json_files import write_sealed

    files.write(update_table(1))
    content = json.loads((tmp_path / "rollouts.json").read_text())
    del content["seal"]
    content["files"][0]["name"] = "../secret.parquet"
    write_sealed(tmp_path / "rollouts.json", content)
    refused(rollout_files, tmp_path / ROLLOUTS)


def test_unlisted_file_is_not_read_from_a_running_stage(tmp_path: Path, files: RolloutFiles) -> None:
    files.write(update_table(1))
    other = RolloutFiles(tmp_path / "other", 10**9, {}, print)
    other.write(update_table(2))
    (stray,) = rollout_files(tmp_path / "other" / ROLLOUTS)
    stray.rename(tmp_path / ROLLOUTS / stray.name)
    assert set(open_rollouts(tmp_path / ROLLOUTS).to_table()["update"].to_pylist()) == {1}
    assert len(checked_files(tmp_path / ROLLOUTS)) == 1


def test_damaged_settings_are_an_error(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and something else")
    refused(read_settings, tmp_path)
    assert read_settings(tmp_path / "none") == {} and read_manifest(tmp_path / "none") is None


def test_folder_of_a_finished_stage_is_read_once_more(refused: Refused, tmp_path: Path) -> None:
    seen: list[Path] = []
    places = iter([tmp_path / "running", tmp_path / "finished", tmp_path / "finished"])

    def read(folder: Path) -> int:
        seen.append(folder)
        if folder.name == "running":
            raise UserError("a file is missing")
        return 5

    assert read_located(lambda: next(places), read) == 5
    assert [folder.name for folder in seen] == ["running", "finished"]
    refused(read_located, lambda: tmp_path / "running", read)
    assert len(seen) == 3
