"""Which folders become a store, and which are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from align.store.store import Store
from tests.support.refusals import Refused


def test_a_foreign_folder_is_refused_and_left_alone(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("x")
    refused(Store.open, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("content", ["{", '{"format": 99}', "[]"])
def test_a_store_that_cannot_be_read(refused: Refused, tmp_path: Path, content: str) -> None:
    (tmp_path / "align-store.json").write_text(content)
    refused(Store.open, tmp_path)


def test_a_path_that_is_no_folder(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    refused(Store.open, tmp_path / "file")
    refused(Store.open, tmp_path / "file" / "below")
