"""From messages to token ids: the one place where a chat template is applied, for training, sampling and scoring alike.

Torch-free. Left out: truncation, which is the caller's decision.
"""

from __future__ import annotations

from typing import Any

from align.errors import UserError

Message = dict[str, str]


def require_chat_template(tokenizer: Any, where: str) -> None:
    """Raise ``UserError`` for a tokenizer without a chat template: a base model, which has no notion of turns."""
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"{where} has no chat template, so conversations cannot be rendered for it; it is probably a base model. "
            "Name a Jinja file in the model stage's chat_template field."
        )


def render_prompt(tokenizer: Any, messages: list[Message]) -> list[int]:
    """Token ids of a conversation that ends with a user turn, up to where the assistant's answer begins."""
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    return [int(token) for token in ids]


def render_conversation(tokenizer: Any, messages: list[Message], finished: bool = True) -> list[int]:
    """Token ids of a conversation that ends with an assistant turn, as a reward model reads it.

    It ends with the end-of-turn token: what a template writes after it (ChatML's line break) is cut, because a policy
    stops there and nothing may be scored at a token it never samples. ``finished=False`` is for an answer that was
    cut off at its length limit: the end-of-turn token is left out too, since the policy did not write it.
    """
    ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    tokens = [int(token) for token in ids]
    end = last_turn_end(tokens, tokenizer.eos_token_id)
    if end is None:  # a template that does not close the turn: the policy's end token is added
        return [*tokens, tokenizer.eos_token_id] if finished else tokens
    return tokens[: end + 1] if finished else tokens[:end]


MAX_TRAILING = 4
"""Tokens a template may write after the end of the last turn."""


def last_turn_end(tokens: list[int], eos: int) -> int | None:
    """Index of the end-of-turn token that closes the conversation, or None when the template writes none."""
    for index in range(len(tokens) - 1, max(-1, len(tokens) - 2 - MAX_TRAILING), -1):
        if tokens[index] == eos:
            return index
    return None
