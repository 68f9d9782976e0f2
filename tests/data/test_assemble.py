"""Whole datasets: the ledger adds up, and every dropped record has its reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from align.data.assemble import Dataset, assemble, summary_lines
from align.data.checkers import gsm8k_answer
from align.data.recipe import Recipe
from align.data.rows import prompt_key
from align.data.splits import group
from align.errors import UserError


def build(base: Path, sources: list[dict[str, Any]], kind: str = "instructions", **options: Any) -> Dataset:
    return assemble(Recipe.model_validate({"kind": kind, "sources": sources, **options}), base)


def write(path: Path, records: list[dict[str, Any]]) -> dict[str, Any]:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return {"type": "files", "paths": [path.name], "format": "prompt_completion"}


def check(dataset: Dataset) -> None:
    ledger = dataset.ledger
    assert ledger["rows_in"] == ledger["rows_out"] + sum(ledger["dropped"].values())
    assert ledger["splits"] == {"train": len(dataset.train), "test": len(dataset.test)}
    assert not {group(row) for row in dataset.train} & {group(row) for row in dataset.test}
    rows = dataset.train + dataset.test
    assert len({row["id"] for row in rows}) == len(rows)


def test_embedded_recipe() -> None:
    dataset = build(Path(), [{"type": "embedded", "size": 600}], seed=17)
    check(dataset)
    assert len(dataset.train) + len(dataset.test) == 600 and 35 < len(dataset.test) < 90
    prompts = build(Path(), [{"type": "embedded", "size": 600}], "prompts", seed=17)
    assert [row["id"] for row in prompts.test] == [row["id"] for row in dataset.test]
    assert "completion" not in prompts.train[0] and prompts.train[0]["checks"]


def test_filters_duplicates_and_limit_are_counted(tmp_path: Path) -> None:
    records = [{"prompt": f"question {i}", "completion": "yes"} for i in range(20)]
    records += [records[0], {"prompt": "Question 0?", "completion": "yes"}, {"prompt": "q", "completion": ""}]
    records += [{"prompt": "long", "completion": "x" * 99}]
    dataset = build(tmp_path, [write(tmp_path / "a.jsonl", records)], filters={"max_chars": 50}, max_rows=15)
    check(dataset)
    assert dataset.ledger["dropped"] == {
        "duplicate": 2, "empty reply": 1, "filtered by length or turns": 1, "over max_rows": 5
    }  # fmt: skip
    assert "a.jsonl: 24 rows read, 15 kept" in list(summary_lines(dataset.ledger))


def test_a_test_source_keeps_its_questions_out_of_training(tmp_path: Path) -> None:
    train = write(tmp_path / "a.jsonl", [{"prompt": f"q{i}", "completion": "a"} for i in range(10)])
    test = write(tmp_path / "b.jsonl", [{"prompt": "Q3!", "completion": "other"}, {"prompt": "new", "completion": "a"}])
    dataset = build(tmp_path, [train | {"part": "train"}, test | {"part": "test"}])
    check(dataset)
    assert (len(dataset.train), len(dataset.test)) == (9, 2)
    assert dataset.ledger["sources"][0]["dropped"] == {"its question is in the test split": 1}
    # The same with a source that is divided, whatever side its row was on.
    check(build(tmp_path, [train, test | {"part": "test"}], test_size=0.5))


def test_empty_after_filtering(tmp_path: Path) -> None:
    sources = [write(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": ""}])]
    message = r"train split is empty: 2 rows read, 0 left \(1 empty reply, 1 filtered by length or turns\)"
    with pytest.raises(UserError, match=message):
        build(tmp_path, sources, filters={"max_chars": 1})


def test_hh_transcripts_become_pairs_and_single_replies(shared_data: Path) -> None:
    source = {"type": "files", "paths": ["hh-rlhf/*.jsonl.gz"], "format": "hh_rlhf"}
    dataset = build(shared_data, [source], "preferences")
    check(dataset)
    assert dataset.ledger["rows_in"] == 4666
    assert dataset.ledger["dropped"] == {
        "chosen equals rejected": 2, "empty prompt turn": 1, "empty reply": 7, "prompts differ": 14,
        "roles do not alternate": 10,
    }  # fmt: skip
    for row in dataset.train:
        assert row["prompt"][-1]["role"] == "user"
        assert row["chosen"][0]["content"].strip() != row["rejected"][0]["content"].strip()
        assert "\n\nHuman:" not in prompt_key(row)
    assert len(build(shared_data, [source], "instructions").train) > 3500


def test_gsm8k_rows_check_their_own_answers(shared_data: Path) -> None:
    source = {"type": "files", "paths": ["gsm8k/train.jsonl"], "format": "gsm8k"}
    dataset = build(shared_data, [source])
    check(dataset)
    assert dataset.ledger["rows_in"] == dataset.ledger["rows_out"] + sum(dataset.ledger["dropped"].values()) == 7473
    replies = [row["completion"][0]["content"] for row in dataset.train]
    assert gsm8k_answer(dataset.train, replies) == [1.0] * len(dataset.train)
    assert not any("<<" in reply for reply in replies)


@pytest.mark.parametrize(
    ("path", "form", "kind"),
    [
        ("llamafactory-demo/alpaca_en_demo.json", "alpaca", "instructions"),
        ("llamafactory-demo/dpo_en_demo.json", "preferences", "preferences"),
        ("llms-from-scratch/instruction-data.json", "alpaca", "instructions"),
    ],
)
def test_real_files_in_the_fields_formats(shared_data: Path, path: str, form: str, kind: str) -> None:
    source = {"type": "files", "paths": [path], "format": form}
    dataset = build(shared_data, [source], kind)
    check(dataset)
    assert dataset.ledger["rows_out"] > 0.8 * dataset.ledger["rows_in"]


def test_unfilled_placeholders_are_dropped(shared_data: Path) -> None:
    source = {"type": "files", "paths": ["llamafactory-demo/identity.json"], "format": "alpaca"}
    assert build(shared_data, [source]).ledger["dropped"] == {"unfilled {{placeholder}}": 85}
