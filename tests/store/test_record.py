"""Which folders become a store, and which are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from align.errors import UserError
from align.store.store import Store


def test_a_foreign_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="not empty and not an align store"):
        Store.open(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("content", "expected"), [("{", "damaged"), ('{"format": 99}', "format 99"), ("[]", "damaged")]
)
def test_a_store_that_cannot_be_read(tmp_path: Path, content: str, expected: str) -> None:
    (tmp_path / "align-store.json").write_text(content)
    with pytest.raises(UserError, match=expected):
        Store.open(tmp_path)


def test_a_path_that_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="--store"):
        Store.open(tmp_path / "file")
    with pytest.raises(UserError, match="--store"):
        Store.open(tmp_path / "file" / "below")
