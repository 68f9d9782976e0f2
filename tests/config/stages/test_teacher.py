"""The teachers of a distill stage: what a block may say, and how it enters the key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from align.config.stages.sft import DistillConfig
from align.config.validation import validate
from align.errors import UserError
from align.pipeline.pipeline import Pipeline

SERVER = {"url": "http://127.0.0.1:8000/v1", "model": "big"}
TWO = [{"match": "a", "stage": "x"}, {"match": "b", "endpoint": SERVER}]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"teacher": {"self": True}}, r"teacher: self without system is the student itself"),
        ({"teacher": {}}, r"teacher: has none of stage, endpoint and self"),
        ({"teacher": {"stage": "x", "endpoint": SERVER}}, r"teacher: has stage and endpoint; a teacher is exactly one"),
        ({"teacher": {"stage": "model"}}, r"the student itself; .* `teacher: \{self: true, system: \.\.\.\}`"),
        ({"teacher": {"stage": "x", "api": "completions"}}, r"api is for an endpoint; remove it"),
        ({"teacher": {"endpoint": SERVER, "tokens": "aligned"}}, r"set `api: completions`, which sends text"),
        ({"teacher": {"endpoint": SERVER, "api": "completions"}}, r"top_k 64 .* write top_k: 20\."),
        ({"teacher": {"endpoint": SERVER}, "temperature": 2.0}, r"temperature 2 needs logits; .* temperature: 1\.0"),
        ({"teacher": {"endpoint": SERVER}, "top_k": None}, r"top_k null .* needs `teacher: STAGE`; set top_k"),
        ({"teacher": TWO}, r"several teachers need teacher_column"),
        ({"teacher": [TWO[0], TWO[0]], "teacher_column": "source"}, r"each teacher needs its own `match`"),
        ({"teacher": {**TWO[0]}}, r"match is for several teachers"),
        ({"teacher": "x", "teacher_column": "source"}, r"teacher_column chooses among a list of teachers"),
        ({"teacher": {"stage": "x", "sytem": "s"}}, r"stages.distill.teacher: unknown key 'sytem'. Did you mean 'syst"),
    ],
)
def test_bad_teacher_is_refused(fields: dict[str, Any], message: str) -> None:
    block = {"model": "model", "data": "d", "learning_rate": 1e-3, "max_length": 64, **fields}
    with pytest.raises(UserError, match=message):
        validate(DistillConfig, block, "p.yaml: stages.distill")


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


def test_inputs_of_teachers_in_list() -> None:
    with pytest.raises(UserError, match=r"stages.distill.teacher.stage: there is no stage 'y'"):
        key_of([{"match": "a", "stage": "x"}, {"match": "b", "stage": "y"}], teacher_column="source")
