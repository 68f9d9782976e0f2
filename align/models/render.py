"""From messages to token ids: the one place where a chat template is applied, for training, sampling and scoring alike.

Torch-free. Left out: truncation, which is the caller's decision.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from align.data.rows import answer_side, is_finished
from align.errors import UserError

Message = dict[str, str]


def require_chat_template(tokenizer: Any, where: str) -> None:
    """Raise ``UserError`` for a tokenizer without a chat template: a base model, which has no notion of turns."""
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"{where} has no chat template, so conversations cannot be rendered for it; it is probably a base model. "
            "Name a Jinja file in the model stage's chat_template field."
        )


def render_prompt(tokenizer: Any, messages: list[Message], tools: str | None = "") -> list[int]:
    """Token ids of a conversation that ends with a user turn, up to where the assistant's answer begins.

    ``tools`` is the row's, JSON text as a message's ``tool_calls`` is. Raises ``UserError`` for a template without a
    place for tools or calls, which would leave them out without a word.
    """
    ids: list[int] = _apply(tokenizer, messages, tools, add_generation_prompt=True)
    return ids


def render_conversation(
    tokenizer: Any, messages: list[Message], finished: bool = True, tools: str | None = ""
) -> list[int]:
    """Token ids of a conversation that ends with an assistant turn, as a reward model reads it.

    It ends with the end-of-turn token: what a template writes after it (ChatML's line break) is cut, because a policy
    stops there and nothing may be scored at a token it never samples. ``finished=False`` is for an answer that was
    cut off at its length limit: the end-of-turn token is left out too, since the policy did not write it. ``tools`` as
    for :func:`render_prompt`.
    """
    return _until_turn_end(tokenizer, _apply(tokenizer, messages, tools), finished)


def _until_turn_end(tokenizer: Any, tokens: list[int], finished: bool) -> list[int]:
    """Ids up to and with the end-of-turn token, or without it."""
    end = last_turn_end(tokens, tokenizer.eos_token_id)
    if end is None:  # a template that does not close the turn: the policy's end token is added
        return [*tokens, tokenizer.eos_token_id] if finished else tokens
    return tokens[: end + 1] if finished else tokens[:end]


def render_answer(
    tokenizer: Any, prompt: list[Message], answer: list[Message], finished: bool = True, tools: str | None = ""
) -> list[int] | None:
    """Token ids of the text that the template writes behind a prompt, encoded alone, up to the end of the turn.

    For an answer whose first characters would share a token with the prompt's last ones, as a line break and the
    indentation behind it do: a policy continues the prompt's ids, so it never samples that token. None where the
    prompt's text is not how the conversation's begins.
    """
    start = _apply(tokenizer, prompt, tools, tokenize=False, add_generation_prompt=True)
    whole = _apply(tokenizer, [*prompt, *answer], tools, tokenize=False)
    if not whole.startswith(start):
        return None
    ids = [int(token) for token in tokenizer(whole[len(start) :], add_special_tokens=False)["input_ids"]]
    return _until_turn_end(tokenizer, ids, finished)


def render_answered(tokenizer: Any, row: Mapping[str, Any], side: str | None = None) -> list[int]:
    """Token ids of a row's prompt and one of its answers, with an end of turn only where the answer came to its end.

    ``side`` is the answer's field, by default the one that is learned from.
    """
    side = side or answer_side(row)
    return render_conversation(tokenizer, [*row["prompt"], *row[side]], is_finished(row, side), row.get("tools"))


def _apply(tokenizer: Any, messages: list[Message], tools: str | None, tokenize: bool = True, **options: Any) -> Any:
    """Ids of a conversation, or its text.

    Raises ``UserError`` where the template itself raises, for roles that it does not take, and out of bounds.
    """
    from jinja2 import TemplateError

    if tools:
        _require(tokenizer, "tools", "a row offers tools")
        options["tools"] = json.loads(tools)
    called = [_with_calls(tokenizer, message) for message in messages]
    try:
        rendered = tokenizer.apply_chat_template(called, tokenize=tokenize, return_dict=False, **options)
    except TemplateError as error:
        raise explain_refusal(tokenizer, messages, error) from None
    return [int(token) for token in rendered] if tokenize else str(rendered)


def explain_refusal(tokenizer: Any, messages: Sequence[Mapping[str, Any]], error: Exception) -> UserError:
    """The user's error for a template that raised ``error`` at a conversation."""
    from align.models.template_budget import TemplateOutOfBounds

    place = getattr(tokenizer, "name_or_path", "")
    template = f"the chat template of {place}" if place else "the chat template"
    if isinstance(error, TemplateOutOfBounds):
        return UserError(
            f"{template} {error}, which no conversation needs. It is broken or hostile: name another template in the "
            "model stage's chat_template field."
        )
    roles = ", ".join(str(message["role"]) for message in messages)
    return UserError(
        f"{template} refuses a conversation of the roles {roles}: {str(error).rstrip('.')}. Change its rows, or name "
        "another template in the model stage's chat_template field."
    )


def _require(tokenizer: Any, name: str, what: str) -> None:
    if name not in str(tokenizer.chat_template):  # text, or a mapping of several by name
        raise UserError(
            f"{what}, and the chat template has no place for {name}: it would leave them out without a word. Name a "
            "template that takes them in the model stage's chat_template field, or leave such rows out."
        )


def _with_calls(tokenizer: Any, message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as templates know it: its calls as objects, no field that it lacks, and no mark of training."""
    hidden = ("tool_calls", "train")
    plain = {name: value for name, value in message.items() if value is not None and name not in hidden}
    if not message.get("tool_calls"):
        return plain
    _require(tokenizer, "tool_calls", "a message calls a tool")
    return plain | {"tool_calls": json.loads(message["tool_calls"])}


MAX_TRAILING = 4
"""Tokens a template may write after the end of the last turn."""


def last_turn_end(tokens: list[int], eos: int) -> int | None:
    """Index of the end-of-turn token that closes the conversation, or None when the template writes none."""
    for index in range(len(tokens) - 1, max(-1, len(tokens) - 2 - MAX_TRAILING), -1):
        if tokens[index] == eos:
            return index
    return None
