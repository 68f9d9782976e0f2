""""""

from __future__ import annotations

from pathlib import Path

import pytest

from align.data.builds import build_files
from align.data.builds.build_files import count_rows, is_build, message_text, read_ledger, rows, rows_by_number, shards
from tests.support.data.sample_build import row, write_build, write_split
from tests.support.refusals import Refused


def test_rows_come_in_order_from_all_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_files, "BATCH", 2)
    inputs = [row(f"q{n}", f"a{n}", score=None if n % 2 else n / 2) for n in range(7)]
    folder = write_build(tmp_path / "build", inputs, [row("t", "u")], files=3)
    actual = list(rows(folder, "train"))
    assert [entry["id"] for entry in actual] == [entry["id"] for entry in inputs]
    assert "score" in actual[0] and "score" not in actual[1]
    assert count_rows(folder, "train") == 7 and len(shards(folder, "train")) == 3
    index = rows_by_number(folder, "train", [6, 0, 3])
    assert {place: entry["id"] for place, entry in index.items()} == {n: inputs[n]["id"] for n in (0, 3, 6)}


def test_messages_lose_fields_that_only_others_have(tmp_path: Path) -> None:
    called = {"role": "assistant", "content": None, "tool_calls": '[{"name": "clock"}]'}
    inputs = [row("q", "a"), {**row("r", "a"), "completion": [called]}]
    write_split(tmp_path, "train", inputs)
    plain, with_call = rows(tmp_path, "train")
    assert plain["completion"] == [{"role": "assistant", "content": "a"}]
    assert with_call["completion"] == [called]
    assert message_text(with_call["completion"][0]) == 'tool_calls: [{"name": "clock"}]'
    assert message_text(plain["completion"][0]) == "a"


def test_one_file_is_a_split_too_and_an_empty_folder_no_build(tmp_path: Path) -> None:
    assert not is_build(tmp_path)
    write_split(tmp_path, "train", [row("q", "a")])
    (tmp_path / "train-00000-of-00001.parquet").rename(tmp_path / "train.parquet")
    assert is_build(tmp_path) and count_rows(tmp_path, "train") == 1 and shards(tmp_path, "test") == []


@pytest.mark.parametrize("text", ["{", "[]", '{"splits": {}}'])
def test_a_damaged_ledger_is_said(refused: Refused, tmp_path: Path, text: str) -> None:
    refused(read_ledger, tmp_path)
    (tmp_path / "ledger.json").write_text(text)
    refused(read_ledger, tmp_path)


def test_a_damaged_file_is_named(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "train.parquet").write_bytes(b"PAR1 no")
    refused(lambda: list(rows(tmp_path, "train")))
