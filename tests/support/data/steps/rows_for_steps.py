"""Rows, and a way to run a row step, for the tests of row steps."""

from pathlib import Path
from typing import Any

from align.config.recipe.filter_settings import FilterStep
from align.data.rows import Dropped, Row, assistant, user
from align.data.steps.step import StepContext, start_step
from align.stages.data import StepModels

CONTEXT = StepContext("instructions", 0, Path(), Path(), models=StepModels())


def instruction(question: str = "What is rain?", answer: str = "Water that falls from clouds.", **more: Any) -> Row:
    """A row with one turn and one reply."""
    row = {"id": "a1", "source": "s", "checks": "", "prompt": [user(question)], "completion": [assistant(answer)]}
    return row | {"_where": "file.jsonl:7"} | more


def pair(chosen: str, rejected: str, question: str = "What is rain?") -> Row:
    """A preference row."""
    row = instruction(question)
    del row["completion"]
    return row | {"chosen": [assistant(chosen)], "rejected": [assistant(rejected)]}


def run(rows: list[Row], **settings: Any) -> list[Any]:
    """Return the results of a filter step with these settings."""
    return list(start_step(FilterStep(type="filter", **settings), CONTEXT).apply(rows))


def reason(row: Row, **settings: Any) -> str | None:
    """Return the reason why the row is dropped, or None where it passes as the same object."""
    (result,) = run([row], **settings)
    if isinstance(result, Dropped):
        return result.reason
    assert result is row
    return None
