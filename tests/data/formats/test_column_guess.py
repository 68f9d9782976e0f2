"""The mapping that is printed for a file, from names and values of its columns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from align.data.formats.column_guess import report_columns


def guess(folder: Path, records: list[dict[str, Any]]) -> tuple[str, dict[str, Any]] | None:
    """Return the kind and the settings that the guess adds to the file's path."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    report = report_columns({"paths": ["rows.jsonl"]}, folder)
    if report.guess is None:
        return None
    assert report.guess.rows >= len(records)
    return report.guess.kind, {k: v for k, v in report.guess.source.items() if k not in ("type", "paths")}


SIDES = {"model_a": "A cat purrs when it is content.", "model_b": "Cats are animals that purr at times."}


@pytest.mark.parametrize(
    ("record", "kind", "settings"),
    [
        ({"ask": "Why?", "reply": "So."}, "instructions", {"columns": {"prompt": "ask", "completion": "reply"}}),
        ({"ask": "Why?"}, "prompts", {"columns": {"prompt": "ask"}}),
        ({"ask": "Why?", "mood": 3}, "prompts", {"columns": {"prompt": "ask"}, "keep": ["mood"]}),
        # A prompt under its own name needs no mapping, any other name does.
        (
            {"prompt": "Why?", **SIDES, "winner": "model_a"},
            "preferences",
            {"better": {"label": "winner", "a": "model_a", "b": "model_b"}},
        ),
        (
            {"ask": "Why?", **SIDES, "winner": "model_a"},
            "preferences",
            {"columns": {"prompt": "ask"}, "better": {"label": "winner", "a": "model_a", "b": "model_b"}},
        ),
        (
            {"ask": "Why?", "preferred": "So it is.", "refused": "No."},
            "preferences",
            {"columns": {"prompt": "ask", "chosen": "preferred", "rejected": "refused"}},
        ),
        ({"turns": ["Why?", "And then?"]}, "prompts", {"columns": {"prompt": "{turns[0]}"}}),
        ({"text": "Once upon a time."}, "texts", {}),
    ],
)
def test_names_of_columns_say_what_they_mean(
    record: dict[str, Any], kind: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    assert guess(tmp_path, [record]) == (kind, settings)


@pytest.mark.parametrize(("keys", "first"), [((1, 2, 3), 1), ((0, 2, 1), 0)])
def test_first_choice_follows_the_lowest_key(keys: tuple[int, ...], first: int, tmp_path: Path) -> None:
    options = {"opt1": "Rome", "opt2": "Paris", "opt3": "Bern"}
    records = [{"ask": f"Capital {number}?", **options, "gold": key} for number, key in enumerate(keys)]
    result = guess(tmp_path, records)
    assert result is not None
    kind, settings = result
    assert (kind, settings["format"]) == ("prompts", "multiple_choice")
    assert settings["columns"] == {"question": "ask", "choices": ["opt1", "opt2", "opt3"], "answer": "gold"}
    assert settings.get("options", {"first_choice": 0}) == {"first_choice": first}
