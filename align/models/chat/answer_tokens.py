"""Token ids of a row's answers, split by turns, and which of them the assistant wrote.

Stages that train and those that measure read rows by these functions, so both count the same tokens. Leaves out
batches and lengths.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from align.data.rows import Row, answer_side, is_finished
from align.errors import UserError
from align.models.chat.render import render_answer, render_conversation, render_prompt


class PromptRewritten(UserError):
    """The chat template renders a prompt differently once an answer follows it."""


def split_turn(
    tokenizer: Any, prompt: list[Row], answer: list[Row], finished: bool = True, tools: str | None = ""
) -> tuple[list[int], list[int]]:
    """Return the ids of the prompt as it is rendered for sampling, and of the answer including its end-of-turn token.

    Where the tokenizer would merge the prompt's last characters with the answer's first, they are tokenized separately,
    as in sampling. ``finished=False`` omits the end of turn, for an answer that was cut off. ``tools`` is the row's.

    Raises ``PromptRewritten`` when the chat template renders the prompt differently once an answer follows it: training
    and sampling would then see different contexts.
    """
    prompt_ids = render_prompt(tokenizer, prompt, tools)
    conversation = render_conversation(tokenizer, [*prompt, *answer], finished, tools)
    # The usual case: the conversation's ids continue the prompt's ids, so the rest is the answer. Where they do not,
    # the boundary may be inside a token; then the answer is tokenized separately.
    if conversation[: len(prompt_ids)] != prompt_ids:
        answer_ids = render_answer(tokenizer, prompt, answer, finished, tools)
        if answer_ids is not None:
            return prompt_ids, answer_ids
        pairs = enumerate(zip(prompt_ids, conversation, strict=False))
        shared = next((index for index, (before, after) in pairs if before != after), 0)
        sampled = tokenizer.decode(prompt_ids[shared:])
        trained = tokenizer.decode(conversation[shared:])[:60]
        raise PromptRewritten(
            "the chat template renders a prompt differently once an answer follows it: sampling would see "
            f"{sampled!r} where training sees {trained!r}. "
            "Give the model a chat template whose generation prompt is the beginning of an assistant turn."
        )
    return prompt_ids, conversation[len(prompt_ids) :]


def split_answer(tokenizer: Any, row: Mapping[str, Any], side: str | None = None) -> tuple[list[int], list[int]]:
    """Return ``split_turn`` of a row's prompt and one of its answers; every stage tokenizes its rows by it.

    ``side`` is the answer's field, by default the answer that is trained on. An answer that was cut off has no end of
    turn.
    """
    side = side or answer_side(row)
    return split_turn(tokenizer, row["prompt"], row[side], is_finished(row, side), row.get("tools"))


def answer_turns(messages: Sequence[Row], first: int = 0) -> list[int]:
    """Return the places of the assistant's turns from ``first`` on, without those that are excluded from training."""
    places = range(first, len(messages))
    return [
        place
        for place in places
        if messages[place]["role"] == "assistant" and messages[place].get("train") is not False
    ]


def split_turns(
    tokenizer: Any, row: Mapping[str, Any], side: str, places: Sequence[int]
) -> list[tuple[list[int], list[int]]]:
    """Return ``split_turn`` of the turns at ``places`` in a row's prompt and answer, each after all before it."""
    messages, finished = [*row["prompt"], *row[side]], is_finished(row, side)
    # Only the last turn can be cut off.
    return [
        split_turn(
            tokenizer,
            messages[:place],
            [messages[place]],
            finished or place < len(messages) - 1,
            row.get("tools"),
        )
        for place in places
    ]


def are_parts(conversation: Sequence[int], parts: Sequence[tuple[list[int], list[int]]]) -> bool:
    """Return True where each turn with all before it is a beginning of the conversation."""
    return all(list(conversation[: len(before) + len(turn)]) == before + turn for before, turn in parts)


def assistant_mask(
    tokenizer: Any, row: Mapping[str, Any], side: str, prompt_ids: list[int], answer_ids: list[int]
) -> list[int] | None:
    """Return 1 for each token of an answer that the assistant writes, 0 for tokens between its turns.

    ``prompt_ids`` and ``answer_ids`` come from ``split_answer``. Turns with ``train: False`` have 0. None if the
    template rewrites earlier turns, so no rendering contains each turn as it is sampled.
    """
    if len(row[side]) == 1:
        return [int(row[side][0].get("train") is not False)] * len(answer_ids)
    start = len(prompt_ids)
    places = answer_turns([*row["prompt"], *row[side]], len(row["prompt"]))
    parts = split_turns(tokenizer, row, side, places)
    if not are_parts([*prompt_ids, *answer_ids], parts):
        return None
    mask = [0] * len(answer_ids)
    for before, turn in parts:
        mask[len(before) - start : len(before) + len(turn) - start] = [1] * len(turn)
    return mask
