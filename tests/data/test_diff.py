"""Builds small enough to compare by hand."""

import json
from pathlib import Path

import numpy as np
import pytest

from align.data import diff
from align.data.diff import compare
from align.data.rows import Row
from tests.support.data.sample_build import pair, row, write_build


def group(found: dict, split: str, source: str) -> dict:
    return next(line for line in found["groups"] if (line["split"], line["source"]) == (split, source))


def build(folder: Path, train: list[Row], test: list[Row], **more: object) -> Path:
    return write_build(folder, train, test, **more)  # type: ignore[arg-type]


def test_a_build_and_itself_are_identical(tmp_path: Path) -> None:
    rows = [row(f"q{n}", f"a{n}") for n in range(5)]
    one = build(tmp_path / "one", rows[:4], rows[4:])
    two = build(tmp_path / "two", rows[:4], rows[4:], files=2)  # other files, the same rows
    found = compare(one, two)
    assert found["identical"] and found["same rows"]
    assert group(found, "train", "first")["unchanged"] == 4
    assert found["examples"] == {}
    assert found["moved"] == {"train to test": 0, "test to train": 0, "to another source": 0}


def test_every_fate_by_hand(tmp_path: Path) -> None:
    same, moves, stays = row("same", "a"), row("moves", "a"), row("held out", "a")
    goes, comes = row("goes", "a"), row("comes", "a", "second")
    before, after = row("scored", "a", score=0.25), row("scored", "a", score=0.75)
    old, new = row("asked", "old answer"), row("asked", "new answer")
    assert before["id"] == after["id"] and old["id"] != new["id"]
    one = build(tmp_path / "one", [same, moves, goes, before, old], [stays])
    two = build(tmp_path / "two", [same, after, new, comes], [stays, moves])
    found = compare(one, two)
    assert not found["identical"] and not found["same rows"]
    assert group(found, "train", "first") == {
        "split": "train", "source": "first", "a": 5, "b": 3,
        "unchanged": 1, "changed": 1, "new answer": 1, "moved out": 1, "removed": 1, "moved in": 0, "added": 0,
    }  # fmt: skip
    assert group(found, "test", "first") == {
        "split": "test", "source": "first", "a": 1, "b": 2,
        "unchanged": 1, "changed": 0, "new answer": 0, "moved out": 0, "removed": 0, "moved in": 1, "added": 0,
    }  # fmt: skip
    assert group(found, "train", "second")["added"] == 1
    assert found["moved"] == {"train to test": 1, "test to train": 0, "to another source": 0}
    assert found["trained_then_tested"] == 1
    examples = found["examples"]
    assert [one["text"] for one in examples["removed"]] == ["goes"]
    assert [one["text"] for one in examples["added"]] == ["comes"]
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
        found = compare(*folders)
        for line in found["groups"]:
            kept = line["unchanged"] + line["changed"] + line["new answer"]
            assert line["a"] == kept + line["moved out"] + line["removed"]
            assert line["b"] == kept + line["moved in"] + line["added"]
        assert sum(line["moved out"] for line in found["groups"]) == sum(found["moved"].values())
        assert sum(line["moved in"] for line in found["groups"]) == sum(found["moved"].values())


def test_a_prompt_that_moved_with_another_answer_is_counted_as_leaking(tmp_path: Path) -> None:
    one = build(tmp_path / "one", [row("Leaks?", "a"), row("b", "b")], [row("c", "c")])
    two = build(tmp_path / "two", [row("b", "b")], [row("leaks", "other"), row("c", "c")])
    found = compare(one, two)
    assert found["trained_then_tested"] == 1
    assert found["moved"]["train to test"] == 0
    assert group(found, "test", "first")["added"] == 1 and group(found, "train", "first")["removed"] == 1


def test_a_renamed_source_moves_its_rows(tmp_path: Path) -> None:
    one = build(tmp_path / "one", [row("a", "b", "old")], [row("c", "d")])
    two = build(tmp_path / "two", [row("a", "b", "new")], [row("c", "d")])
    found = compare(one, two)
    assert found["moved"] == {"train to test": 0, "test to train": 0, "to another source": 1}
    assert group(found, "train", "old")["moved out"] == 1 and group(found, "train", "new")["moved in"] == 1


def test_copies_of_a_row_are_counted(tmp_path: Path) -> None:
    once, other = row("a", "b"), row("c", "d")
    one = build(tmp_path / "one", [once], [other])
    two = build(tmp_path / "two", [once, once, once], [other])
    line = group(compare(one, two), "train", "first")
    assert (line["unchanged"], line["added"], line["removed"]) == (1, 2, 0)


def test_preferences_are_compared_by_both_answers(tmp_path: Path) -> None:
    one = build(tmp_path / "one", [pair("q", "good", "bad")], [pair("t", "x", "y")])
    two = build(tmp_path / "two", [pair("q", "good", "worse")], [pair("t", "x", "y")])
    found = compare(one, two)
    assert found["examples"]["new answer"][0]["fields"] == {"rejected": ["bad", "worse"]}


def test_the_same_rows_in_another_order_are_not_identical(tmp_path: Path) -> None:
    rows = [row("a", "1"), row("b", "2")]
    one, two = build(tmp_path / "one", rows, [row("t", "t")]), build(tmp_path / "two", rows[::-1], [row("t", "t")])
    ledger = json.loads((two / "ledger.json").read_text())
    ledger["digests"]["train"] = "3" * 64
    (two / "ledger.json").write_text(json.dumps(ledger))
    found = compare(one, two)
    assert found["same rows"] and not found["identical"]


def test_ledgers_stand_side_by_side(tmp_path: Path) -> None:
    kept = [row("a", "1"), row("b", "2")]
    one = build(tmp_path / "one", kept, [row("t", "t")], dropped=[(row("a!", "1"), "duplicate", {})])
    two = build(tmp_path / "two", kept, [row("t", "t")])
    ledger = json.loads((two / "ledger.json").read_text())
    ledger["steps"].insert(1, {**ledger["steps"][0], "step": "1 normalize"})
    ledger["steps"][2]["step"] = "2 dedup"
    (two / "ledger.json").write_text(json.dumps(ledger))
    steps = compare(one, two)["steps"]
    assert [line["step"] for line in steps] == ["read", "normalize", "dedup"]
    assert steps[1]["a"] is None and steps[1]["b"]["rows_in"] == 3
    assert steps[2]["a"]["dropped"] == {"duplicate": 1} and steps[2]["b"]["dropped"] == {}


def test_examples_are_few_and_short(tmp_path: Path) -> None:
    one = build(tmp_path / "one", [row("kept", "a")], [row("t", "t")])
    two = build(
        tmp_path / "two", [row("kept", "a"), *(row(f"{n} " + "x" * 500, "a") for n in range(9))], [row("t", "t")]
    )
    added = compare(one, two, examples=2)["examples"]["added"]
    assert len(added) == 2 and all(len(example["text"]) == diff.EXCERPT + 1 for example in added)


def test_data_without_a_ledger_is_compared_by_rows_alone(tmp_path: Path) -> None:
    one, two = build(tmp_path / "one", [row("a", "1")], []), build(tmp_path / "two", [row("a", "1")], [])
    (two / "ledger.json").unlink()
    found = compare(one, two)
    assert found["same rows"] and found["steps"] == []


@pytest.mark.parametrize("count", [0, 1, 5])
def test_nth_tells_repeats_apart_alike(count: int) -> None:
    keys = np.array([7] * count + [9], dtype=np.uint64)
    made = diff._make_unique(keys)
    assert len(np.unique(made)) == count + 1
    assert set(diff._make_unique(keys[::-1])) == set(made)
