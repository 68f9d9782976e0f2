"""Texts as the tokens that likelihoods are asked of: context and answer, windows over a document. Torch-free.

Splits text as lm-eval's ``hf`` backend does, so that numbers compare. Left out: chat templates (``models/render.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from align.data.rows import Message
from align.errors import UserError
from align.models.render import render_conversation, render_prompt

Ids = list[int]


def encode(tokenizer: Any, text: str) -> Ids:
    """Ids of a text with the special tokens that the tokenizer puts around one; no second BOS before its own."""
    begins = text.startswith(tokenizer.decode([prefix_token(tokenizer)]))
    ids = tokenizer.encode(text, add_special_tokens=False) if begins else tokenizer.encode(text)
    return [int(token) for token in ids]


def encode_choices(tokenizer: Any, context: str, choices: Sequence[str]) -> list[tuple[Ids, Ids]]:
    """For each choice, ids of the context and of the choice behind it (``choices`` begin with their own space).

    Context and choice are encoded as one text and cut where the context alone ends; space at the context's end goes to
    the choice, where tokenizers with spaces in front of words expect it. Raises ``UserError`` for a choice of which
    nothing is left.
    """
    kept = context.rstrip()
    space = context[len(kept) :]
    before = encode(tokenizer, kept)
    found = []
    for choice in choices:
        answer = encode(tokenizer, kept + space + choice)[len(before) :]
        if not answer:
            raise UserError(
                f"the tokenizer gives the answer {choice!r} no token of its own after {kept[-40:]!r}, so it has no "
                "likelihood. Leave the question out, or name another checkpoint."
            )
        found.append((before, answer))
    return found


def answer_ids(tokenizer: Any, prompt: list[Message], answer: str, finished: bool) -> tuple[Ids, bool]:
    """Ids of an assistant's answer as the chat template writes it, and whether they were cut from the conversation.

    ``finished`` adds the end of the turn. A template that writes the prompt of an answered conversation otherwise than
    one that waits for its answer (some do so for thoughts) leaves no place to cut: then the answer is encoded by itself
    and the end-of-turn token put behind it, which is what a policy samples.
    """
    before = render_prompt(tokenizer, prompt)
    whole = render_conversation(tokenizer, [*prompt, {"role": "assistant", "content": answer}], finished)
    if len(whole) > len(before) and whole[: len(before)] == before:
        return whole[len(before) :], True
    alone = [int(token) for token in tokenizer.encode(answer, add_special_tokens=False)]
    return [*alone, int(tokenizer.eos_token_id)] if finished else alone, False


def fit(context: Ids, answer: Ids, longest: int) -> tuple[Ids, Ids, bool]:
    """The pair within a model's ``longest`` input, and whether something was cut.

    The answer's last token is never an input, so there is room for one more. The context loses its beginning, as in
    lm-eval; an answer that does not fit by itself loses its end and keeps one token of context.
    """
    room = longest + 1 - len(answer)
    if room >= len(context):
        return context, answer, False
    if room >= 1:
        return context[-room:], answer, True
    return context[-1:], answer[:longest], True


def prefix_token(tokenizer: Any) -> int:
    """The token before a document's first: BOS, or end of text for a tokenizer without one.

    Raises ``UserError`` for a tokenizer that has neither.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise UserError("the tokenizer has neither a BOS nor an EOS token, so a text's first token has no context.")


def rolling_windows(tokens: Ids, prefix: int, longest: int) -> list[tuple[Ids, Ids]]:
    """A document in windows: pairs of context and tokens asked for, every token asked for exactly once.

    Each window asks for ``longest`` tokens behind one token of context (``prefix`` for the first window), and the last
    one, which is shorter, has as much context as its input still holds. Raises ``ValueError`` for ``longest`` below 1.
    """
    if longest < 1:
        raise ValueError(f"longest is {longest}; a window asks for one token at least")
    found = []
    for start in range(0, len(tokens), longest):
        asked = tokens[start : start + longest]
        context = tokens[start + len(asked) - longest - 1 : start] if start else [prefix]
        found.append((context, asked))
    return found
