"""Records of a task: where they are, which are taken, and what a user reads who got it wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import pytest

from align.config.stages.evaluation.task_fields import RecordFields, TaskConfig
from align.evaluation.tasks.records import (
    TaskRecord,
    describe_records,
    file_identities,
    item_ids,
    load_records,
    record_source,
)
from tests.support.refusals import Refused

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Gsm8kLike(RecordFields, TaskConfig):
    task: Literal["gsm8k"] = "gsm8k"


class Homemade(RecordFields, TaskConfig):
    task: Literal["homemade"] = "homemade"


def write(folder: Path, count: int = 10, name: str = "a.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps({"question": f"q{i}", "n": i}) + "\n" for i in range(count)))
    return path


def test_all_records_come_in_order_with_their_places(tmp_path: Path) -> None:
    write(tmp_path, 2, "a.jsonl")
    (tmp_path / "b.csv").write_text("question,n\nq2,2\n")
    records = load_records(Homemade(files=["*.jsonl", "b.csv"]), tmp_path, seed=0)
    assert [record["question"] for record in records] == ["q0", "q1", "q2"]
    assert [record.where for record in records] == [
        f"{tmp_path}/a.jsonl:1",
        f"{tmp_path}/a.jsonl:2",
        f"{tmp_path}/b.csv:2",
    ]


def test_max_items_draws_by_seed_and_keeps_the_order(tmp_path: Path) -> None:
    write(tmp_path, 100)
    config = Homemade(files=["a.jsonl"], max_items=10)
    draws = [[record["n"] for record in load_records(config, tmp_path, seed)] for seed in (0, 0, 1)]
    assert draws[0] == draws[1] == sorted(draws[0])
    assert len(set(draws[0])) == 10
    assert draws[0] != draws[2]
    assert draws[0] != list(range(10)), "the first ten would be a sample of whatever the file begins with"
    assert len(load_records(Homemade(files=["a.jsonl"], max_items=200), tmp_path, 0)) == 100


def test_files_are_identified_by_content_not_by_folder(tmp_path: Path) -> None:
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        write(tmp_path / name)
    x, y = (Homemade(files=[f"{name}/a.jsonl"]) for name in ("x", "y"))
    assert file_identities(x, tmp_path) == file_identities(y, tmp_path)
    assert next(iter(file_identities(x, tmp_path).values())).startswith("sha256:")
    before = file_identities(x, tmp_path)
    write(tmp_path / "x", 9)
    assert file_identities(x, tmp_path) != before
    assert "files" in Homemade.identified, "or the key would hold the folder as well"
    assert describe_records(x, tmp_path) == {"files": file_identities(x, tmp_path)}
    assert describe_records(Homemade(files=["x/a.jsonl"], max_items=3), tmp_path)["max_items"] == 3


def test_a_known_benchmark_needs_only_a_commit_of_the_hub(tmp_path: Path) -> None:
    config = Gsm8kLike(revision=COMMIT)
    source = record_source(config)
    assert source.type == "hub"
    assert (source.dataset, source.config, source.split) == ("openai/gsm8k", "main", "test")
    assert file_identities(config, tmp_path) == {}
    assert describe_records(config, tmp_path) == {
        "dataset": "openai/gsm8k",
        "config": "main",
        "split": "test",
        "revision": COMMIT,
    }
    named = record_source(Gsm8kLike(dataset="openai/gsm8k", revision=COMMIT, split="train"))
    assert named.type == "hub"
    assert (named.config, named.split) == ("main", "train")
    other_source = record_source(Gsm8kLike(dataset="some/one", revision=COMMIT))
    assert other_source.type == "hub"
    assert (other_source.dataset, other_source.config, other_source.split) == ("some/one", None, "test")


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (Homemade, {}),
        (Gsm8kLike, {}),
        (Homemade, {"dataset": "a/b"}),
        (Homemade, {"files": ["a.jsonl"], "dataset": "a/b", "revision": COMMIT}),
        (Gsm8kLike, {"files": ["a.jsonl"], "revision": COMMIT}),
        (Homemade, {"files": ["a.jsonl"], "split": "test"}),
        (Gsm8kLike, {"revision": "main"}),
        (Homemade, {"files": []}),
        (Homemade, {"files": ["a.jsonl"], "max_items": 0}),
    ],
)
def test_settings_that_name_no_one_place_are_refused(
    refused: Refused, kind: type[RecordFields], settings: dict[str, object]
) -> None:
    refused(kind.model_validate, settings)


def test_files_that_hold_nothing_usable_are_named(refused: Refused, tmp_path: Path) -> None:
    write(tmp_path, 1, "questions.jsonl")
    missing = Homemade(files=["question.jsonl"])
    for attempt in (lambda: load_records(missing, tmp_path, 0), lambda: file_identities(missing, tmp_path)):
        refused(attempt)
    (tmp_path / "empty.jsonl").write_text("\n")
    refused(lambda: load_records(Homemade(files=["empty.jsonl"]), tmp_path, 0))
    (tmp_path / "broken.jsonl").write_text('{"question": "q"}\n{"question": \n')
    refused(lambda: load_records(Homemade(files=["broken.jsonl"], max_items=1), tmp_path, 0))


def test_missing_or_wrong_field_error_names_line(refused: Refused) -> None:
    record = TaskRecord("a.jsonl:7", {"question": "q", "answers": [], "n": 3, "blank": " ", "list": ["a", None]})
    assert record["n"] == 3
    assert record.get("gone") is None
    assert record.text("question") == "q"
    assert TaskRecord("x", {"list": ["a"]}).texts("list") == ["a"]
    refused(lambda: record["questions"])
    assert (record.text("n"), TaskRecord("x", {"list": ["a", 1.5]}).texts("list")) == ("3", ["a", "1.5"])
    refused(record.text, "list")
    refused(record.text, "blank")
    refused(record.texts, "answers")
    refused(record.texts, "list")


def test_item_ids_are_distinct_fields_or_file_and_line(tmp_path: Path) -> None:
    records = [
        TaskRecord("/x/a.jsonl:1", {"id": 5}),
        TaskRecord("/y/a.jsonl:1", {"id": 5}),
        TaskRecord("b:2", {"id": ""}),
    ]
    assert item_ids(records) == ["a.jsonl:1", "a.jsonl:1 (2)", "b:2"]
    assert item_ids(records, "id") == ["5", "5 (2)", "b:2"]
    write(tmp_path, 50)
    draws = load_records(Homemade(files=["a.jsonl"], max_items=5), tmp_path, 3)
    assert item_ids(draws) == [f"a.jsonl:{record['n'] + 1}" for record in draws], "a draw renames nothing"
