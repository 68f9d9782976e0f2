"""Pairs from samples of stages and evaluations, and from files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from align.errors import UserError
from align.extensions.annotation.pairs import names_of, read_artifact_pairs, read_file_pairs

PROMPT = [{"role": "user", "content": "Name a color."}]


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_samples_of_a_stage_keep_their_scores(tmp_path: Path) -> None:
    line = {
        "split": "train",
        "id": "1",
        "prompt": PROMPT,
        "texts": ["red", "red ", "blue"],
        "scores": [1.0, 1.0, None],
        "parts": {"rm": [0.5, 0.5, 2.0]},
    }
    write(tmp_path / "samples.jsonl", [line, {**line, "texts": ["same", "same", "same"]}])
    selection = read_artifact_pairs(tmp_path, per_prompt=5)
    pairs = list(selection.pairs.values())
    assert selection.explain() == [
        "4 pairs of equal answers are skipped: no verdict is possible",
        "1 of 2 prompts have no two different answers, so no pair",
    ]
    assert [(pair.a, pair.b) for pair in pairs] in (
        [("red", "blue"), ("red ", "blue")],
        [("red ", "blue"), ("red", "blue")],
    )
    assert pairs[0].scores == {"rm": (0.5, 2.0)} and pairs[0].systems is None
    selection = read_artifact_pairs(tmp_path)
    assert list(selection.pairs.values()) == pairs[:1]
    assert "1 further pairs are not used, because --per-prompt is 1" in selection.explain()


def test_systems_of_an_evaluation_are_compared(tmp_path: Path) -> None:
    line = {
        "task": "prompts",
        "id": "1",
        "prompt": PROMPT,
        "responses": {
            "sft": [{"text": "red", "reward": 1.0}, {"text": "no"}],
            "ppo": [{"text": "blue", "reward": 2.0}],
            "dpo": [],
        },
    }
    write(tmp_path / "samples.jsonl", [line])
    (pair,) = read_artifact_pairs(tmp_path).pairs.values()
    assert (pair.a, pair.b, pair.systems) == ("red", "blue", ("sft", "ppo"))
    assert pair.scores == {"reward": (1.0, 2.0)}
    assert names_of([pair]) == ["ppo", "sft"]


def test_artifact_without_usable_samples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="pairs come from a `sample`"):
        read_artifact_pairs(tmp_path)
    write(tmp_path / "samples.jsonl", [{"prompt": PROMPT, "texts": ["a", "a"]}])
    with pytest.raises(UserError, match="no prompt has two different answers"):
        read_artifact_pairs(tmp_path)


def test_file_of_pairs_is_read_in_both_spellings(tmp_path: Path) -> None:
    lines = [
        {"prompt": "p", "a": "x", "b": "y", "systems": ["m", "n"], "scores": {"r": [1, 2]}, "gold": "b"},
        {"prompt": PROMPT, "chosen": [{"role": "assistant", "content": "x"}], "rejected": "y"},
    ]
    first, second = read_file_pairs(write(tmp_path / "pairs.jsonl", lines)).pairs.values()
    assert first.prompt == [{"role": "user", "content": "p"}]
    assert (first.systems, first.scores, first.gold) == (("m", "n"), {"r": (1.0, 2.0)}, "b")
    assert (second.a, second.b, second.gold) == ("x", "y", None)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"prompt": "p", "a": "x"}, "1: a pair has prompt, and a and b"),
        ({"prompt": "p", "a": "x", "b": "x "}, "1: both answers are equal"),
        ({"prompt": "p", "a": "x", "b": 3}, "1: b is neither a text nor a list"),
        ({"prompt": [], "a": "x", "b": "y"}, "1: prompt is neither a text nor"),
        ({"prompt": "p", "a": "x", "b": "y", "gold": "left"}, "1: systems is a list .* gold is a, b, tie"),
        ({"prompt": "p", "a": "x", "b": "y", "scores": {"r": [1]}}, "1: systems is a list of two names"),
        ({"prompt": "p", "a": "x", "b": "y", "label": "a"}, "1: the field of the right answer is named gold"),
    ],
)
def test_wrong_lines_are_refused_with_their_place(tmp_path: Path, line: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_file_pairs(write(tmp_path / "pairs.jsonl", [line]))


def test_missing_empty_and_broken_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    with pytest.raises(UserError, match="no such file"):
        read_file_pairs(path)
    path.write_text("")
    with pytest.raises(UserError, match="has no pairs"):
        read_file_pairs(path)
    path.write_text("{\n")
    with pytest.raises(UserError, match="pairs.jsonl:1 is not JSON"):
        read_file_pairs(path)
    path.write_bytes(b"\xff\n")
    with pytest.raises(UserError, match="is not UTF-8 text"):
        read_file_pairs(path)
