"""Equal rows: the first stays and is named, whatever the shards; what is not equal stays."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from align.config.recipe.step_settings import ExactDuplicatesStep
from align.data.rows import assistant, user
from align.data.steps.step_kinds import start_step
from align.errors import UserError
from tests.support.data.steps.tables import context, decide, kept, row


def step(**settings: Any) -> ExactDuplicatesStep:
    return ExactDuplicatesStep(type="exact_duplicates", **settings)


def test_the_first_stays_and_stands_for_the_others() -> None:
    rows = [row("What is it?", "a"), row("Other", "a"), row(" what IS it", "A!"), row("What is it?", "b")]
    verdict = decide(step(), rows)
    assert kept(verdict) == [0, 1, 3]
    assert verdict.instead is not None and verdict.instead.tolist() == [-1, -1, 0, -1]
    assert verdict.reasons[verdict.code[2]] == "duplicate of an earlier row"
    assert kept(decide(step(of="prompt"), rows)) == [0, 1]
    assert kept(decide(step(of="reply"), rows)) == [0, 3]


def test_rows_dropped_before_stand_for_none() -> None:
    rows = [row("x"), row("x"), row("x")]
    verdict = decide(step(), rows, alive=[False, True, True])
    assert verdict.code.tolist() == [-1, -1, 0]
    assert verdict.instead is not None and verdict.instead[2] == 1


def test_every_turn_and_the_side_of_a_reply_count() -> None:
    def pair(chosen: str, rejected: str) -> dict[str, Any]:
        return row("p", None, chosen=[assistant(chosen)], rejected=[assistant(rejected)])

    assert kept(decide(step(), [pair("a", "b"), pair("b", "a"), pair("a", "b")], kind="preferences")) == [0, 1]
    labeled = [row("p", "c", label=True), row("p", "c", label=False), row("p", "c", label=False)]
    assert kept(decide(step(), labeled, kind="unpaired")) == [0, 1]
    ranked = [row("p", None, responses=[{"content": text, "score": 1.0, "rank": 0}]) for text in ("a", "b", "a")]
    assert kept(decide(step(), ranked, kind="preferences")) == [0, 1]
    grown = [{**row("p"), "prompt": [user("p"), assistant(text), user("go on")]} for text in ("x", "y", "x")]
    assert kept(decide(step(of="prompt"), grown)) == [0, 1]
    system = [{**row("p"), "prompt": [{"role": "system", "content": text}, user("p")]} for text in ("x", "y")]
    assert kept(decide(step(of="prompt"), system)) == [0, 1]


@settings(deadline=None)
@given(st.lists(st.sampled_from(["a", "A.", "b", "c d", "c  D", ""]), max_size=12), st.integers(1, 12))
def test_shards_change_nothing(prompts: list[str], cut: int) -> None:
    rows = [row(prompt) for prompt in prompts]
    full, parted = decide(step(), rows), decide(step(), rows, cut=cut)
    assert full.code.tolist() == parted.code.tolist()
    observations: dict[str, int] = {}
    for number, result_row in enumerate(rows):
        first = observations.setdefault(result_row["id"], number)  # an id is equal for equal prompts and replies
        assert (full.code[number] == 0) == (first != number)


def test_settings_that_make_no_sense() -> None:
    with pytest.raises(ValidationError, match="Input should be"):
        step(of="answer")
    with pytest.raises(UserError, match="no reply; write 'of: prompt'"):
        start_step(step(of="reply"), context(kind="prompts"))
