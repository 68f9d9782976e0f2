"""Solutions with marked steps become unpaired rows that remember their steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from align.data.formats import SourceFormat, convert, detect
from align.data.rows import BadRecord, read_rows, write_rows

RECORD = {"prompt": "1 + 1 + 1?", "completions": ["1 + 1 is 2.", " ", "2 + 1 is 4."], "labels": [True, True, False]}


def test_a_row_has_its_steps_and_is_good_where_all_are(tmp_path: Path) -> None:
    (row,) = convert(RECORD, SourceFormat("stepwise"), "f:1", "unpaired")
    assert row["completion"] == [{"role": "assistant", "content": "1 + 1 is 2.\n\n2 + 1 is 4."}]
    assert row["label"] is False
    assert row["steps"] == [{"content": "1 + 1 is 2.", "label": 1.0}, {"content": "2 + 1 is 4.", "label": 0.0}]
    write_rows(tmp_path / "train.parquet", [{**row, "source": "s"}])
    assert read_rows(tmp_path / "train.parquet")[0]["steps"] == row["steps"]
    (good,) = convert({**RECORD, "labels": [1, 1, 0.5]}, SourceFormat("stepwise"), "f:1", "unpaired")
    assert good["label"] is True
    assert good["steps"][1]["label"] == 0.5


def test_marks_of_minus_one_are_wrong_and_prompts_forget_the_steps() -> None:
    (row,) = convert({**RECORD, "labels": [1, 0, -1]}, SourceFormat("stepwise"), "f:1", "unpaired")
    assert [step["label"] for step in row["steps"]] == [1.0, 0.0]
    (prompt,) = convert(RECORD, SourceFormat("stepwise"), "f:1", "prompts")
    assert "steps" not in prompt


def test_it_is_recognized() -> None:
    assert detect([RECORD], "unpaired").form == "stepwise"
    assert detect([{"prompt": "q", "completions": ["a", "b"], "scores": [1, 2]}], "preferences").form == "scored"


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"labels": [True]}, "3 steps in completions and 1 marks in labels"),
        ({"completions": "one text"}, "completions is no list of texts"),
        ({"labels": [1, 1, 7]}, "a step's mark is 7, expected true, false or a number from 0 to 1"),
    ],
)
def test_what_is_malformed_is_refused(fields: dict[str, object], says: str) -> None:
    with pytest.raises(BadRecord, match=says):
        convert(RECORD | fields, SourceFormat("stepwise"), "f:1", "unpaired")
