"""Check and count the thoughts of the rows that a stage trains on.

A thought is a part of its answer's text, as ``<think>``. The chat template decides what earlier turns keep of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from align.data.final_answers import thought_end
from align.data.rows import answer_side
from align.errors import UserError
from align.models.chat.named_templates import training_templates
from align.models.chat.render import assistant_mask, render_answered, render_prompt, split_answer
from align.models.chat.template_settings import THOUGHT_ROWS, thinking_state
from align.training.rows import SPLIT_UP, Encoded, Row

ANSWERS = ("completion", "chosen", "rejected")
THOUGHT = "Vortex"
ANSWER = "Zephyrus"
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
    """Raise ``UserError`` for rows with thoughts if the chat template drops them, or its thinking is switched off.

    DeepSeek R1's template drops the thoughts of all answers. Then the tokenizer gets a training template until it is
    saved, if its family has one.
    """
    count = sum(map(has_thought, rows))
    if not count:
        return
    have = f"{stage}: {count} of {len(rows)} train rows have thoughts, and"
    if thinking_state(tokenizer) == "off":
        raise UserError(
            f"{have} the chat template's thinking is off. Write `thinking: on` in the model stage, or "
            f"`thoughts: drop` in {stage}."
        )
    if not _writes_thoughts(tokenizer) and not _replace_template(tokenizer):
        raise UserError(
            f"{have} the chat template drops the thoughts of answers. Name a template that writes them in the model "
            f"stage's chat_template, or write `thoughts: drop` in {stage}."
        )


def use_training_template(tokenizer: Any, rows: Sequence[Row]) -> None:
    """Give a tokenizer a training template until it is saved, if its own rewrites turns of the rows' answers.

    Such answers are episodes with thoughts, which were sampled with the training template. Without one they are
    skipped and counted.
    """
    if not any(_is_rewritten(tokenizer, row, side) for row in rows for side in ANSWERS):
        return
    _replace_template(tokenizer)


def _replace_template(tokenizer: Any) -> bool:
    """Return True if a training template writes the same prompt and all thoughts, which then replaces the template."""
    template = tokenizer.chat_template
    prompt = render_prompt(tokenizer, PROBE[:1])
    for name, text in training_templates(str(template), tokenizer.get_vocab().keys()):
        tokenizer.chat_template = text
        if render_prompt(tokenizer, PROBE[:1]) == prompt and _writes_thoughts(tokenizer):
            tokenizer.own_template = template
            tokenizer.training_template = name
            return True
    tokenizer.chat_template = template
    return False


def _writes_thoughts(tokenizer: Any) -> bool:
    row = {"prompt": PROBE[:-1], "completion": PROBE[-1:]}
    return THOUGHT in tokenizer.decode(render_answered(tokenizer, row, "completion"))


def own_template(tokenizer: Any) -> Any:
    """Return the template of the model, also while :func:`use_training_template` has replaced it."""
    return getattr(tokenizer, "own_template", tokenizer.chat_template)


def _is_rewritten(tokenizer: Any, row: Row, side: str) -> bool:
    """Return True if the template changes turns of an answer that has several, with thoughts."""
    turns = [turn for turn in row.get(side) or [] if turn["role"] == "assistant"]
    if len(turns) < 2 or not any(thought_end(turn["content"] or "") for turn in turns):
        return False
    return assistant_mask(tokenizer, row, side, *split_answer(tokenizer, row, side)) is None


def thought_facts(tokenizer: Any, train: Encoded) -> dict[str, Any]:
    """Return the number of trained rows with thoughts, for a model that can think.

    If the template drops thoughts of earlier turns: ``split_conversations`` counts the conversations that became a row
    for each answer, and ``training_template`` is the name of the template that was used instead.
    """
    count = sum(map(has_thought, train.sources))
    if not count and thinking_state(tokenizer) is None:
        return {}
    facts: dict[str, Any] = {THOUGHT_ROWS: count}
    if SPLIT_UP in train.counts:
        facts["split_conversations"] = train.counts[SPLIT_UP]
    if hasattr(tokenizer, "training_template"):
        facts["training_template"] = tokenizer.training_template
    return facts
