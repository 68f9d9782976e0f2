"""The teachers of a distill stage: what a block may say, and how it enters the key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from align.pipeline.pipeline import Pipeline
from tests.support.refusals import Refused

SERVER = {"url": "http://127.0.0.1:8000/v1", "model": "big"}
TWO = [{"match": "a", "stage": "x"}, {"match": "b", "endpoint": SERVER}]


def key_of(teacher: Any, **fields: Any) -> str:
    stages = {
        "model": {"source": "tiny"},
        "x": {"stage": "model", "source": "tiny", "dtype": "bfloat16"},
        "data": {"dataset": "rows.jsonl"},
        "distill": {"model": "model", "data": "data", "teacher": teacher, "learning_rate": 1e-3, "max_length": 64},
    }
    stages["distill"] |= fields
    return Pipeline({"name": "p", "stages": stages}).nodes["distill"].key


@pytest.fixture(autouse=True)
def in_folder_of_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "p", "completion": "c"}\n' * 20)


def test_block_of_teacher_enters_key() -> None:
    plain = key_of("x")
    server = key_of({"endpoint": SERVER})
    assert len({plain, server, key_of({"self": True, "system": "s"}), key_of({"self": True, "system": "t"})}) == 4
    assert key_of({"endpoint": {**SERVER, "concurrency": 3, "retries": 1}}) == server
    assert key_of({"endpoint": {**SERVER, "model": "other"}}) != server
    both = key_of(TWO, teacher_column="source")
    assert both != key_of([TWO[0], {**TWO[1], "match": "c"}], teacher_column="source")


def test_inputs_of_teachers_in_list(refused: Refused) -> None:
    refused(key_of, [{"match": "a", "stage": "x"}, {"match": "b", "stage": "y"}], teacher_column="source")
