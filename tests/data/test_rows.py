"""Rows survive Parquet, and prompts compare by content."""

from __future__ import annotations

from pathlib import Path

import pytest

from align.data.rows import assistant, normalised, prompt_key, read_rows, user, write_rows
from align.errors import UserError


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


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="row 0 has no prompt"):
        write_rows(tmp_path / "a.parquet", [{"id": "1", "source": "s", "checks": ""}])
    with pytest.raises(UserError, match="no such file"):
        read_rows(tmp_path / "b.parquet")
    (tmp_path / "c.parquet").write_text("not parquet")
    with pytest.raises(UserError, match="not a readable Parquet file"):
        read_rows(tmp_path / "c.parquet")


def test_normalised_keeps_signs_and_drops_punctuation() -> None:
    assert normalised(" What  is “This”?\n") == normalised("what is this")
    assert normalised("3 + 4") != normalised("3 - 4")
    one, two = {"prompt": [user("a"), assistant("b")]}, {"prompt": [user("a b")]}
    assert prompt_key(one) != prompt_key(two)
