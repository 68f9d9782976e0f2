"""Builds small enough to compare by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from align.data.builds import diff
from align.data.builds.diff import compare
from align.data.rows import Row
from tests.support.data.sample_build import pair, row, write_build


def group(result: dict, split: str, source: str) -> dict:
    return next(line for line in result["groups"] if (line["split"], line["source"]) == (split, source))


def build(folder: Path, train: list[Row], test: list[Row], **more: object) -> Path:
    return write_build(folder, train, test, **more)  # type: ignore[arg-type]


def test_a_build_and_itself_are_identical(tmp_path: Path) -> None:
    rows = [row(f"q{n}", f"a{n}") for n in range(5)]
    folder = build(tmp_path / "one", rows[:4], rows[4:])
    second = build(tmp_path / "two", rows[:4], rows[4:], files=2)  # other files, the same rows
    comparison = compare(folder, second)
    assert comparison["identical"] and comparison["same rows"]
    assert group(comparison, "train", "first")["unchanged"] == 4
    assert comparison["examples"] == {}
    assert comparison["moved"] == {"train to test": 0, "test to train": 0, "to another source": 0}


def test_every_fate_by_hand(tmp_path: Path) -> None:
    same, moves, stays = row("same", "a"), row("moves", "a"), row("held out", "a")
    goes, comes = row("goes", "a"), row("comes", "a", "second")
    before, after = row("scored", "a", score=0.25), row("scored", "a", score=0.75)
    old, new = row("asked", "old answer"), row("asked", "new answer")
    assert before["id"] == after["id"] and old["id"] != new["id"]
    folder = build(tmp_path / "one", [same, moves, goes, before, old], [stays])
    second = build(tmp_path / "two", [same, after, new, comes], [stays, moves])
    comparison = compare(folder, second)
    assert not comparison["identical"] and not comparison["same rows"]
    assert group(comparison, "train", "first") == {
        "split": "train", "source": "first", "a": 5, "b": 3,
        "unchanged": 1, "changed": 1, "new answer": 1, "moved out": 1, "removed": 1, "moved in": 0, "added": 0,
    }  # fmt: skip
    assert group(comparison, "test", "first") == {
        "split": "test", "source": "first", "a": 1, "b": 2,
        "unchanged": 1, "changed": 0, "new answer": 0, "moved out": 0, "removed": 0, "moved in": 1, "added": 0,
    }  # fmt: skip
    assert group(comparison, "train", "second")["added"] == 1
    assert comparison["moved"] == {"train to test": 1, "test to train": 0, "to another source": 0}
    assert comparison["trained_then_tested"] == 1
    examples = comparison["examples"]
    assert [folder["text"] for folder in examples["removed"]] == ["goes"]
    assert [folder["text"] for folder in examples["added"]] == ["comes"]
    assert examples["changed"][0]["fields"] == {"score": ["0.25", "0.75"]}
    assert examples["new answer"][0]["fields"] == {"completion": ["old answer", "new answer"]}
    assert examples["moved"][0]["was"]["split"] == "train" and examples["moved"][0]["split"] == "test"


def test_the_lines_of_a_group_add_up(tmp_path: Path) -> None:
    generator = np.random.default_rng(3)

    def some(seed: int) -> list[Row]:
        draw = np.random.default_rng(seed)
        return [
            row(f"q{draw.integers(12)}", f"a{draw.integers(3)}", ("x", "y")[draw.integers(2)]) for _ in range(30)
        ]  # ids repeat, prompts too

    for attempt in range(8):
        folders = [
            build(tmp_path / f"{attempt}{side}", some(int(generator.integers(1000))), some(attempt)[:7])
            for side in "ab"
        ]
        comparison = compare(*folders)
        for line in comparison["groups"]:
            kept_rows = line["unchanged"] + line["changed"] + line["new answer"]
            assert line["a"] == kept_rows + line["moved out"] + line["removed"]
            assert line["b"] == kept_rows + line["moved in"] + line["added"]
        assert sum(line["moved out"] for line in comparison["groups"]) == sum(comparison["moved"].values())
        assert sum(line["moved in"] for line in comparison["groups"]) == sum(comparison["moved"].values())


def test_moved_prompt_with_new_answer_counts_as_leak(tmp_path: Path) -> None:
    folder = build(tmp_path / "one", [row("Leaks?", "a"), row("b", "b")], [row("c", "c")])
    second = build(tmp_path / "two", [row("b", "b")], [row("leaks", "other"), row("c", "c")])
    comparison = compare(folder, second)
    assert comparison["trained_then_tested"] == 1
    assert comparison["moved"]["train to test"] == 0
    assert group(comparison, "test", "first")["added"] == 1 and group(comparison, "train", "first")["removed"] == 1


def test_a_renamed_source_moves_its_rows(tmp_path: Path) -> None:
    folder = build(tmp_path / "one", [row("a", "b", "old")], [row("c", "d")])
    second = build(tmp_path / "two", [row("a", "b", "new")], [row("c", "d")])
    comparison = compare(folder, second)
    assert comparison["moved"] == {"train to test": 0, "test to train": 0, "to another source": 1}
    assert group(comparison, "train", "old")["moved out"] == 1 and group(comparison, "train", "new")["moved in"] == 1


def test_copies_of_a_row_are_counted(tmp_path: Path) -> None:
    once, second = row("a", "b"), row("c", "d")
    first = build(tmp_path / "one", [once], [second])
    two = build(tmp_path / "two", [once, once, once], [second])
    line = group(compare(first, two), "train", "first")
    assert (line["unchanged"], line["added"], line["removed"]) == (1, 2, 0)


def test_preferences_are_compared_by_both_answers(tmp_path: Path) -> None:
    folder = build(tmp_path / "one", [pair("q", "good", "bad")], [pair("t", "x", "y")])
    second = build(tmp_path / "two", [pair("q", "good", "worse")], [pair("t", "x", "y")])
    comparison = compare(folder, second)
    assert comparison["examples"]["new answer"][0]["fields"] == {"rejected": ["bad", "worse"]}


def test_the_same_rows_in_another_order_are_not_identical(tmp_path: Path) -> None:
    rows = [row("a", "1"), row("b", "2")]
    folder, second = (
        build(tmp_path / "one", rows, [row("t", "t")]),
        build(tmp_path / "two", rows[::-1], [row("t", "t")]),
    )
    ledger = json.loads((second / "ledger.json").read_text())
    ledger["digests"]["train"] = "3" * 64
    (second / "ledger.json").write_text(json.dumps(ledger))
    comparison = compare(folder, second)
    assert comparison["same rows"] and not comparison["identical"]


def test_ledgers_stand_side_by_side(tmp_path: Path) -> None:
    kept_rows = [row("a", "1"), row("b", "2")]
    folder = build(tmp_path / "one", kept_rows, [row("t", "t")], dropped=[(row("a!", "1"), "duplicate", {})])
    second = build(tmp_path / "two", kept_rows, [row("t", "t")])
    ledger = json.loads((second / "ledger.json").read_text())
    ledger["steps"].insert(1, {**ledger["steps"][0], "step": "1 normalize"})
    ledger["steps"][2]["step"] = "2 dedup"
    (second / "ledger.json").write_text(json.dumps(ledger))
    steps = compare(folder, second)["steps"]
    assert [line["step"] for line in steps] == ["read", "normalize", "dedup"]
    assert steps[1]["a"] is None and steps[1]["b"]["rows_in"] == 3
    assert steps[2]["a"]["dropped"] == {"duplicate": 1} and steps[2]["b"]["dropped"] == {}


def test_examples_are_few_and_short(tmp_path: Path) -> None:
    folder = build(tmp_path / "one", [row("kept", "a")], [row("t", "t")])
    second = build(
        tmp_path / "two", [row("kept", "a"), *(row(f"{n} " + "x" * 500, "a") for n in range(9))], [row("t", "t")]
    )
    added = compare(folder, second, examples=2)["examples"]["added"]
    assert len(added) == 2 and all(len(example["text"]) == diff.EXCERPT + 1 for example in added)


def test_data_without_a_ledger_is_compared_by_rows_alone(tmp_path: Path) -> None:
    first, second = build(tmp_path / "one", [row("a", "1")], []), build(tmp_path / "two", [row("a", "1")], [])
    (second / "ledger.json").unlink()
    comparison = compare(first, second)
    assert comparison["same rows"] and comparison["steps"] == []


@pytest.mark.parametrize("count", [0, 1, 5])
def test_nth_tells_repeats_apart_alike(count: int) -> None:
    keys = np.array([7] * count + [9], dtype=np.uint64)
    unique = diff._make_unique(keys)
    assert len(np.unique(unique)) == count + 1
    assert set(diff._make_unique(keys[::-1])) == set(unique)
