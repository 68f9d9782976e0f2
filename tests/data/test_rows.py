"""Rows survive Parquet, and prompts compare by content."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from align.data.rows import (
    assistant,
    content_digest,
    fit_column,
    iter_rows,
    merged_schema,
    normalized,
    prompt_key,
    read_rows,
    row_id,
    take_rows,
    user,
    write_rows,
)
from tests.support.refusals import Refused


def test_round_trip_with_partial_and_extra_columns(tmp_path: Path) -> None:
    base = {"source": "s", "prompt": [user("hi"), assistant("yes?"), user("é\n")], "checks": ""}
    rows = [{"id": "1", **base, "chosen_score": 1.0, "flipped": True}, {"id": "2", **base, "turns": 3}]
    write_rows(tmp_path / "a.parquet", rows)
    back = read_rows(tmp_path / "a.parquet")
    assert back[0] == rows[0] | {"turns": None}
    assert back[1]["prompt"] == base["prompt"] and back[1]["chosen_score"] is None and back[1]["turns"] == 3


def test_empty_file_keeps_its_columns(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.parquet", [])
    assert read_rows(tmp_path / "a.parquet") == []


def test_errors(refused: Refused, tmp_path: Path) -> None:
    refused(write_rows, tmp_path / "a.parquet", [{"id": "1", "source": "s", "checks": ""}])
    refused(read_rows, tmp_path / "b.parquet")
    (tmp_path / "c.parquet").write_text("not parquet")
    refused(read_rows, tmp_path / "c.parquet")


def test_normalized_keeps_signs_and_drops_punctuation() -> None:
    assert normalized(" What  is “This”?\n") == normalized("what is this")
    assert normalized("3 + 4") != normalized("3 - 4")
    two_turns, second = {"prompt": [user("a"), assistant("b")]}, {"prompt": [user("a b")]}
    assert prompt_key(two_turns) != prompt_key(second)


CALL = '[{"function": {"name": "f"}}]'


def called(name: str) -> dict:
    calling = {"role": "assistant", "content": "", "tool_calls": CALL}
    result = {"role": "tool", "content": "1", "name": "f"}
    return {"id": name, "source": "s", "prompt": [user("a"), calling, result], "checks": "", "tools": "[]"}


def test_only_messages_with_calls_have_tool_calls(tmp_path: Path) -> None:
    plain = {"id": "2", "source": "s", "prompt": [user("a")], "checks": "", "completion": [assistant("b")]}
    write_rows(tmp_path / "both.parquet", [called("1"), plain])
    assert read_rows(tmp_path / "both.parquet") == [called("1") | {"completion": None}, plain | {"tools": None}]
    write_rows(tmp_path / "plain.parquet", [plain])
    # A message with a call that is None counts as one with a call to many a chat template.
    assert "tool_calls" not in str(pq.read_schema(tmp_path / "plain.parquet"))
    assert read_rows(tmp_path / "plain.parquet") == [plain]


def test_files_with_other_columns_fit_one_schema(tmp_path: Path) -> None:
    labeled = {"id": "2", "source": "s", "prompt": [user("a")], "checks": "", "label": False}
    write_rows(tmp_path / "0.parquet", [labeled])
    write_rows(tmp_path / "1.parquet", [called("1")])
    tables = [pq.read_table(tmp_path / f"{number}.parquet") for number in (0, 1)]
    schema = merged_schema(table.schema for table in tables)
    assert schema.names == ["id", "source", "prompt", "checks", "label", "tools"]
    cast = tables[0]["prompt"].cast(schema.field("prompt").type)
    assert cast.to_pylist()[0][0] == user("a") | {"tool_calls": None, "name": None}


def test_responses_keep_scores_ranks_and_what_more_there_is(tmp_path: Path) -> None:
    base = {"source": "s", "prompt": [user("a")], "checks": ""}
    responses = [{"content": "x", "score": 1.5, "rank": None}, {"content": "y", "score": None, "rank": 0, "model": "m"}]
    write_rows(tmp_path / "a.parquet", [{"id": "1", **base, "responses": responses}])
    assert read_rows(tmp_path / "a.parquet")[0]["responses"] == responses


def test_rows_are_read_over_shards_one_by_one(tmp_path: Path) -> None:
    for shard in (0, 1):
        rows = [called(f"{shard}-{number}") for number in range(5)]
        write_rows(tmp_path / f"train-0000{shard}-of-00002.parquet", rows)
    read = iter_rows(tmp_path / "train.parquet", batch_size=2)
    assert [row["id"] for row in read] == [f"{shard}-{number}" for shard in (0, 1) for number in range(5)]


def test_some_rows_by_their_places(tmp_path: Path) -> None:
    plain = {"id": "p", "source": "s", "prompt": [user("a")], "checks": "", "completion": [assistant("b")]}
    write_rows(tmp_path / "a.parquet", [plain, called("1"), plain | {"id": "q"}, called("2")])
    every = read_rows(tmp_path / "a.parquet")
    assert take_rows(tmp_path / "a.parquet", np.array([1, 2])) == every[1:3]
    assert take_rows(tmp_path / "a.parquet", np.array([], dtype=np.int64)) == []


def test_ids_follow_the_content(tmp_path: Path) -> None:
    base = {"prompt": [user("A?")], "completion": [assistant("b")]}
    assert row_id(base) == row_id(base | {"prompt": [user("a")], "source": "s", "tools": "", "label": None})
    others = [
        base,
        base | {"completion": [assistant("B")]},
        base | {"tools": "[]"},
        base | {"label": True},
        base | {"label": False},
        base | {"responses": [{"content": "x"}]},
        called("1"),
        called("1") | {"prompt": [user("a"), assistant(""), {"role": "tool", "content": "1"}]},
    ]
    assert len({row_id(row) for row in others}) == len(others)


def test_content_tells_which_answer_was_cut_off() -> None:
    pair = {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]}
    cut_off = [pair, pair | {"chosen_finished": False}, pair | {"rejected_finished": False}]
    assert len({content_digest(row) for row in cut_off}) == 3
    ended = pair | {"chosen_finished": True, "rejected_finished": None}  # as files without the mark are read
    assert content_digest(ended) == content_digest(pair)


@pytest.mark.parametrize("numbers", [[2**60 + 1, 1.5], [2**70, 1.5], [2**53, 1.5], [7, 1.5]])
def test_large_integers_beside_fractions_stay_exact(tmp_path: Path, numbers: list[float]) -> None:
    rows = [called(str(number)) | {"count": number} for number in numbers]
    write_rows(tmp_path / "a.parquet", rows)
    assert [row["count"] for row in read_rows(tmp_path / "a.parquet")] == numbers


def test_integer_too_large_for_float_column_is_refused(refused: Refused, tmp_path: Path) -> None:
    for name, number in (("a", 2**60 + 1), ("b", 1.5)):
        write_rows(tmp_path / f"{name}.parquet", [called(name) | {"count": number}])
    tables = [pq.read_table(tmp_path / f"{name}.parquet") for name in "ab"]
    target = merged_schema([table.schema for table in tables]).field("count")
    refused(lambda: fit_column(tables[0]["count"], tables[0].schema.field("count"), target))
