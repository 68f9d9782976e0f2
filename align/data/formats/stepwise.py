"""Solutions whose steps are marked, as trl spells them: ``prompt``, ``completions``, ``labels``. For process rewards.

The row's ``completion`` is its steps with an empty line between them, its ``label`` whether all are right. Left out:
several solutions to a prompt in one record.
"""

from __future__ import annotations

from typing import Any

from align.data.formats.fields import PROMPTS, STEP_LABELS, STEPS, Malformed, first
from align.data.formats.instructions import question
from align.data.formats.messages import tools
from align.data.formats.options import FormatOptions
from align.data.formats.pairs import truth
from align.data.rows import Dropped, Row, assistant

BETWEEN = "\n\n"


def from_stepwise(record: dict[str, Any], options: FormatOptions, kind: str) -> list[Row | Dropped]:
    """One row; steps that are white space alone are left out with their marks."""
    ask, texts, marks = first(record, PROMPTS), first(record, STEPS), first(record, STEP_LABELS)
    assert ask is not None and texts is not None and marks is not None
    given, labels = record[texts], record[marks]
    if not isinstance(given, list) or not all(isinstance(step, str) for step in given):
        raise Malformed(f"{texts} is no list of texts")
    if not isinstance(labels, list) or len(labels) != len(given):
        count = len(labels) if isinstance(labels, list) else "no list of"
        raise Malformed(f"{len(given)} steps in {texts} and {count} marks in {marks}")
    steps = [
        {"content": step, "label": _mark(label)} for step, label in zip(given, labels, strict=True) if step.strip()
    ]
    if not steps:
        return [Dropped("no step")]
    return [
        {
            "prompt": question(record, ask, options),
            "completion": [assistant(BETWEEN.join(str(step["content"]) for step in steps))],
            "label": all(float(step["label"]) >= 0.5 for step in steps),
            "steps": steps,
            "tools": tools(record),
        }
    ]


def _mark(label: Any) -> float:
    """A share from 0 to 1 as it is (Math-Shepherd's soft marks), else true or false; PRM800K's -1 is wrong."""
    if isinstance(label, (int, float)) and not isinstance(label, bool):
        if not -1 <= label <= 1:
            raise Malformed(f"a step's mark is {label!r}, expected true, false or a number from 0 to 1")
        return max(0.0, float(label))
    return float(truth(label))
