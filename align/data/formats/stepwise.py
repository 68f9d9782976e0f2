"""Solutions with a label per step, for process rewards; trl's fields are ``prompt``, ``completions``, ``labels``.

The row's ``completion`` is its steps with an empty line between them; its ``label`` is True where all are right. Not
supported: several solutions to a prompt in one record.
"""

from __future__ import annotations

from typing import Any

from align.config.recipe.format_options import ReadingOptions
from align.data.formats.fields import PROMPTS, STEP_LABELS, STEPS, Malformed, first
from align.data.formats.instructions import question
from align.data.formats.messages import tools
from align.data.formats.preferences import parse_label
from align.data.rows import Dropped, Row, assistant

SEPARATOR = "\n\n"


def from_stepwise(record: dict[str, Any], options: ReadingOptions, kind: str) -> list[Row | Dropped]:
    """Convert a record to one row; steps of white space alone are dropped with their labels."""
    prompt_name, steps_name, labels_name = first(record, PROMPTS), first(record, STEPS), first(record, STEP_LABELS)
    assert prompt_name is not None and steps_name is not None and labels_name is not None
    texts, labels = record[steps_name], record[labels_name]
    if not isinstance(texts, list) or not all(isinstance(step, str) for step in texts):
        raise Malformed(f"{steps_name} is no list of texts")
    if not isinstance(labels, list) or len(labels) != len(texts):
        count = len(labels) if isinstance(labels, list) else "no list of"
        raise Malformed(f"{len(texts)} steps in {steps_name} and {count} marks in {labels_name}")
    steps = [
        {"content": step, "label": _step_label(label)}
        for step, label in zip(texts, labels, strict=True)
        if step.strip()
    ]
    if not steps:
        return [Dropped("no step")]
    return [
        {
            "prompt": question(record, prompt_name, options),
            "completion": [assistant(SEPARATOR.join(str(step["content"]) for step in steps))],
            "label": all(float(step["label"]) >= 0.5 for step in steps),
            "steps": steps,
            "tools": tools(record),
        }
    ]


def _step_label(label: Any) -> float:
    """Return a label as a number from 0 to 1: soft labels (Math-Shepherd) unchanged, PRM800K's -1 as 0."""
    if isinstance(label, (int, float)) and not isinstance(label, bool):
        if not -1 <= label <= 1:
            raise Malformed(f"a step's mark is {label!r}, expected true, false or a number from 0 to 1")
        return max(0.0, float(label))
    return float(parse_label(label))
