"""Where an evaluation set is, which of its fields are questions, and what is said when it makes no sense."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from align.config.recipe.evaluation_set import EvaluationSet
from align.config.recipe.source_settings import HubSource
from align.data.evaluation_sets import read_items, set_identities
from align.errors import UserError

REVISION = "0" * 40


def write(folder: Path, *records: Any) -> EvaluationSet:
    path = folder / "set.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return EvaluationSet(name="mine", files=["set.jsonl"])


def texts(folder: Path, *records: Any, fields: list[str] | None = None) -> list[tuple[str, ...]]:
    settings = write(folder, *records).model_copy(update={"fields": fields})
    return [item.texts for item in read_items(settings, folder)]


def test_questions_are_found_by_the_usual_names(tmp_path: Path) -> None:
    records = [
        {"id": 1, "prompt": "a b"},
        {"Question": "c", "Best Answer": "d"},
        {"turns": ["e", "f"]},
        {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "g"}]},
    ]
    assert texts(tmp_path, *records) == [("a b",), ("c",), ("e", "f"), ("g",)]


def test_fields_may_be_named_nested_and_joined(tmp_path: Path) -> None:
    record = {"question": {"stem": "a", "choices": ["x", "y"]}, "more": "b"}
    assert texts(tmp_path, record, fields=["question.stem"]) == [("a",)]
    assert texts(tmp_path, record, fields=["question.stem", "more"]) == [("a\nb",)]
    assert texts(tmp_path, record, fields=["question.choices"]) == [("x", "y")]


def test_items_are_named_by_file_and_line(tmp_path: Path) -> None:
    places = [item.place for item in read_items(write(tmp_path, {"prompt": "a"}, {"prompt": "b"}), tmp_path)]
    assert places == ["set.jsonl:1", "set.jsonl:2"]


@pytest.mark.parametrize(
    "record, fields, message",
    [
        (
            {"stem": "a"},
            None,
            r"set.jsonl:1: no field looks like a question; there are stem. Name it: fields: \[stem\]",
        ),
        ({"prompt": "a"}, ["promt"], "there is no field 'promt'; there are prompt. Did you mean 'prompt'"),
        ({"prompt": 3}, None, "field 'prompt' holds int; expected text"),
        ({"prompt": []}, None, "field 'prompt' holds an empty list"),
        ({"prompt": "  "}, None, "set.jsonl:1: the question is empty"),
    ],
)
def test_what_cannot_be_a_question_is_named(
    record: Any, fields: list[str] | None, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        texts(tmp_path, record, fields=fields)


def test_unreadable_and_empty_sets(tmp_path: Path) -> None:
    settings = write(tmp_path)
    with pytest.raises(UserError, match="'mine' has no records"):
        read_items(settings, tmp_path)
    (tmp_path / "set.jsonl").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="set.jsonl:1"):
        read_items(settings, tmp_path)
    with pytest.raises(UserError, match="no file matches"):
        read_items(EvaluationSet(name="mine", files=["nope.jsonl"]), tmp_path)


def test_known_names_need_a_commit_only() -> None:
    source = EvaluationSet(name="gsm8k", revision=REVISION).source()
    assert isinstance(source, HubSource)
    assert (source.dataset, source.config, source.split) == ("openai/gsm8k", "main", "test")
    other_source = EvaluationSet(name="gsm8k", dataset="me/own", split="dev", revision=REVISION).source()
    assert isinstance(other_source, HubSource)
    assert (other_source.dataset, other_source.config, other_source.split) == ("me/own", None, "dev")


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"name": "ifval"}, "known by name are .*Did you mean 'ifeval'"),
        ({"name": "ifeval"}, "needs `revision`, the commit of google/IFEval"),
        ({"name": "mine", "dataset": "o/n"}, "needs `revision`, the commit of o/n"),
        ({"name": "ifeval", "files": ["a.json"], "revision": REVISION}, "has files, so 'revision' means nothing"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        EvaluationSet(**settings)


def test_identity_is_the_content_of_the_files_not_their_folder(tmp_path: Path) -> None:
    actual = []
    for name, text in (("a", "x"), ("b", "x"), ("c", "y")):
        (tmp_path / name).mkdir()
        actual.append(set_identities(write(tmp_path / name, {"prompt": text}), tmp_path / name))
    assert actual[0] == actual[1] != actual[2]
    assert list(actual[0]) == ["mine: set.jsonl"]
    assert set_identities(EvaluationSet(name="gsm8k", revision=REVISION), tmp_path) == {}


@pytest.mark.parametrize(
    "name, file, count",
    [
        ("ifeval", "ifeval/input_data.jsonl", 541),
        ("mt_bench", "mt-bench/question.jsonl", 80),
        ("truthfulqa", "truthfulqa/TruthfulQA.csv", 817),
        ("xstest", "xstest/xstest_prompts.csv", 450),
        ("arc_easy", "arc/ARC-Easy.test.json", 2376),
        ("gsm8k", "gsm8k/train.jsonl", 7473),
    ],
)
def test_real_sets_are_read_whole(name: str, file: str, count: int, shared_data: Path) -> None:
    items = read_items(EvaluationSet(name=name, files=[file]), shared_data)
    assert abs(len(items) - count) <= 30, len(items)
