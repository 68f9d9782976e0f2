"""Conversations without fault, whatever is said in them, raise no alarm in any dialect or stage."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from align.data.rows import assistant, user
from align.lint.across_rows import MARKS, TOKENS
from align.lint.chat_format import MARK
from align.lint.linter import Options
from align.lint.turns import FOREIGN, OVERRIDE, PLACEHOLDER
from tests.support.lint.dialects import SPECS, tokenizer_of
from tests.support.lint.harness import alarms, look

# Letters of any script, marks, signs, emoji, line breaks inside: no controls, no halves of characters.
LETTERS = st.characters(
    exclude_categories=("Cc", "Cs", "Co", "Cn"), exclude_characters="\ufffd", include_characters="\n"
)
WORDS = st.sampled_from(
    ["The answer is 42.", "human:", "f(x) = {x}", "<b>bold</b>", "user", "assistant", "```py\nx = 1\n```"]
)
FAULTS = (MARK, PLACEHOLDER, FOREIGN, OVERRIDE)
SAID = st.one_of(
    st.text(LETTERS, min_size=1, max_size=30), WORDS, st.builds("{} {}".format, WORDS, st.text(LETTERS, max_size=9))
)
TEXT = SAID.map(str.strip).filter(lambda text: bool(text) and not any(fault.search(text) for fault in FAULTS))


@st.composite
def conversations(draw: st.DrawFn) -> dict[str, Any]:
    """A row with up to three exchanges, maybe a system turn, and different answers."""
    turns = [user(draw(TEXT))]
    for _ in range(draw(st.integers(0, 2))):
        turns += [assistant(draw(TEXT)), user(draw(TEXT))]
    if draw(st.booleans()):
        turns = [{"role": "system", "content": draw(TEXT)}, *turns]
    chosen, rejected = draw(TEXT), draw(TEXT)
    assume(_letters(chosen) != _letters(rejected))
    assume(abs(len(chosen.encode()) - len(rejected.encode())) <= TOKENS)  # or the lengths would be a fault
    return {"id": "row", "source": "test", "checks": "", "prompt": turns, "completion": [assistant(chosen)],
            "chosen": [assistant(chosen)], "rejected": [assistant(rejected)]}  # fmt: skip


def _letters(text: str) -> str:
    return "".join(MARKS.sub("", text).split()).casefold()


@pytest.mark.parametrize("stage", ["sft", "dpo", "reward", "prompts"])
@pytest.mark.parametrize("name", SPECS)
@settings(max_examples=15, deadline=None)
@given(row=conversations())
def test_clean_conversations_never_alarm(name: str, stage: Any, row: dict[str, Any]) -> None:
    if not SPECS[name].system:
        row = {**row, "prompt": [turn for turn in row["prompt"] if turn["role"] != "system"]}
    assert not alarms(look(tokenizer_of(name), [row], options=Options(stage)))
