"""Rows that a deciding step reads back from the shards of a pass, one by one or many at once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from align.data.builds.build import _RowReader
from align.data.rows import Row, write_rows
from align.data.steps.step import Table
from tests.support.data.steps.tables import row


@pytest.fixture()
def shards(tmp_path: Path) -> tuple[Path, list[Row]]:
    """Three shards, the second of which is empty."""
    rows = [row(f"prompt {number}", f"reply {number}") for number in range(7)]
    for shard, some in enumerate((rows[:3], [], rows[3:])):
        write_rows(tmp_path / f"{shard:05d}.parquet", some)
    return tmp_path, rows


@pytest.mark.parametrize("places", [[], [0], [2, 3], [1, 2, 5, 6], list(range(7))])
def test_many_at_once_are_the_same_rows_as_one_by_one(shards: tuple[Path, list[Row]], places: list[int]) -> None:
    folder, rows = shards
    read = _RowReader(folder, [3, 0, 4])
    numbers = np.array(places, dtype=np.int64)
    assert [actual["id"] for actual in read.many(numbers)] == [rows[place]["id"] for place in places]
    for many in (read.many, None):
        table = Table({}, np.ones(7, dtype=bool), np.zeros(7, dtype=np.int32), ["s"], read, many)
        assert [actual["completion"] for actual in table.rows(numbers)] == [
            rows[place]["completion"] for place in places
        ]
