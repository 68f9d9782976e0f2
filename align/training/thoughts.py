"""Check and count the thoughts of the rows that a stage trains on.

A thought is a part of its answer's text, as ``<think>``. The chat template decides what earlier turns keep of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from align.data.final_answers import thought_end
from align.data.rows import answer_side
from align.errors import UserError
from align.models.chat.render import render_conversation
from align.models.chat.template_settings import THOUGHT_ROWS, thinking_state
from align.training.rows import SPLIT_UP, Encoded, Row

THOUGHT, ANSWER = "Vortex", "Zephyrus"
"""Rare words of a probe."""
PROBE = [
    {"role": "user", "content": "Qanat"},
    {"role": "assistant", "content": f"<think>\n{THOUGHT}\n</think>\n\n{ANSWER}"},
]


def has_thought(row: Mapping[str, Any]) -> bool:
    """Return True if a turn of the row's answer begins with a thought."""
    turns = row[answer_side(row)] if "text" not in row else []
    return any(turn["role"] == "assistant" and thought_end(turn["content"] or "") > 0 for turn in turns)


def check_thoughts(stage: str, tokenizer: Any, rows: Sequence[Row]) -> None:
    """Raise ``UserError`` for rows with thoughts if the chat template drops them, or its thinking is switched off."""
    count = sum(map(has_thought, rows))
    if not count:
        return
    have = f"{stage}: {count} of {len(rows)} train rows have thoughts, and"
    if thinking_state(tokenizer) == "off":
        raise UserError(
            f"{have} the chat template's thinking is off. Write `thinking: on` in the model stage, or "
            f"`thoughts: drop` in {stage}."
        )
    text = tokenizer.decode(render_conversation(tokenizer, PROBE))
    if THOUGHT not in text:
        raise UserError(
            f"{have} the chat template drops the thoughts of answers. Name a template that writes them in the model "
            f"stage's chat_template, or write `thoughts: drop` in {stage}."
        )


def thought_facts(tokenizer: Any, train: Encoded) -> dict[str, int]:
    """Return the number of trained rows with thoughts, for a model that can think.

    ``split_conversations`` counts the conversations that became a row for each answer, because the template drops
    thoughts of earlier turns.
    """
    count = sum(map(has_thought, train.sources))
    if not count and thinking_state(tokenizer) is None:
        return {}
    split = train.counts.get(SPLIT_UP, 0)
    return {THOUGHT_ROWS: count, **({"split_conversations": split} if split else {})}
