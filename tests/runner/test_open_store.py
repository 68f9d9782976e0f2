"""What a store is opened by, from the words of a command line to what another machine is given."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from align import Pipeline
from align.runner.open_store import Opening, open_store
from tests.support import toy

pytest.importorskip("obstore")


def test_opening_opens_the_same_store_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ALIGN_STORE", "mine")
    settings = {"lease": 7, "patience": 3, "remote": "s3://of/the-pipeline"}
    store = open_store(Pipeline({**toy.pipeline(), "runtime": {"store": settings}}), "s3://of/the-command")
    document = json.loads(json.dumps(asdict(Opening.of(store))))
    assert document == {
        "folder": str(tmp_path / "mine"), "lease": 7.0, "patience": 3.0, "remote": "s3://of/the-command",
    }  # fmt: skip
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("ALIGN_STORE", "s3://of/the-node")
    again = Opening(**document).open()
    assert again.root == tmp_path / "mine" and again.remote is not None
    assert (again.lease, again.retry.seconds, again.remote.address) == (store.lease, 3.0, "s3://of/the-command")


def test_opening_of_a_default_store_has_its_settings(tmp_path: Path) -> None:
    store = open_store(None, tmp_path / "store")
    assert Opening.of(store).open().lease == store.lease == type(store)(tmp_path).lease
    assert Opening.of(store).remote is None
