"""Pairs from samples of stages and evaluations, and from files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from align.extensions.annotation.pairs import names_of, read_artifact_pairs, read_file_pairs
from tests.support.refusals import Refused

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


def test_artifact_without_usable_samples_is_refused(refused: Refused, tmp_path: Path) -> None:
    refused(read_artifact_pairs, tmp_path)
    write(tmp_path / "samples.jsonl", [{"prompt": PROMPT, "texts": ["a", "a"]}])
    refused(read_artifact_pairs, tmp_path)


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
    "line",
    [
        {"prompt": "p", "a": "x"},
        {"prompt": "p", "a": "x", "b": "x "},
        {"prompt": "p", "a": "x", "b": 3},
        {"prompt": [], "a": "x", "b": "y"},
        {"prompt": "p", "a": "x", "b": "y", "gold": "left"},
        {"prompt": "p", "a": "x", "b": "y", "scores": {"r": [1]}},
        {"prompt": "p", "a": "x", "b": "y", "label": "a"},
    ],
)
def test_wrong_lines_are_refused_with_their_place(refused: Refused, tmp_path: Path, line: dict[str, Any]) -> None:
    refused(lambda: read_file_pairs(write(tmp_path / "pairs.jsonl", [line])))


def test_missing_empty_and_broken_files_are_refused(refused: Refused, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    refused(read_file_pairs, path)
    path.write_text("")
    refused(read_file_pairs, path)
    path.write_text("{\n")
    refused(read_file_pairs, path)
    path.write_bytes(b"\xff\n")
    refused(read_file_pairs, path)
