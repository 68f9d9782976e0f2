"""Token ids for log-likelihoods: contexts with their answers, and windows over a document. Torch-free.

Splits text as lm-eval's ``hf`` backend does, so numbers compare. Chat templates are in ``models/render.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from align.data.rows import Message
from align.errors import UserError
from align.evaluation.tasks.base import Reader
from align.models.chat.render import render_conversation, render_prompt

Ids = list[int]


def encode(tokenizer: Any, text: str) -> Ids:
    """Return a text's ids with the tokenizer's special tokens; a text that begins with BOS gets no second one."""
    has_prefix = text.startswith(tokenizer.decode([prefix_token(tokenizer)]))
    ids = tokenizer.encode(text, add_special_tokens=False) if has_prefix else tokenizer.encode(text)
    return [int(token) for token in ids]


def encode_choices(tokenizer: Any, context: str, choices: Sequence[str]) -> list[tuple[Ids, Ids]]:
    """Return for each choice the ids of the context and of the choice; ``choices`` begin with their own space.

    Context and choice are encoded as one text and cut at the end of the context. Space at the context's end goes to
    the choice, where tokenizers with spaces in front of words expect it. Raises ``UserError`` for a choice without
    a separate token.
    """
    stripped = context.rstrip()
    # Most tokenizers join a space with the word after it, so it is encoded with the choice.
    space = context[len(stripped) :]
    context_ids = encode(tokenizer, stripped)
    pairs = []
    for choice in choices:
        answer = encode(tokenizer, stripped + space + choice)[len(context_ids) :]
        if not answer:
            raise UserError(
                f"the tokenizer gives the answer {choice!r} no token of its own after {stripped[-40:]!r}, so it has no "
                "likelihood. Leave the question out, or name another checkpoint."
            )
        pairs.append((context_ids, answer))
    return pairs


def answer_ids(tokenizer: Any, prompt: list[Message], answer: str, is_finished: bool) -> tuple[Ids, bool]:
    """Return the ids of an assistant's answer, and True if they were cut from the rendered conversation.

    ``is_finished`` adds the end of the turn. Some templates render the prompt of an answered conversation differently
    from an open conversation (for the sake of thoughts), which leaves no place to cut. Then the answer is
    encoded by itself, with the end-of-turn token after it, which is what a policy samples.
    """
    prompt_ids = render_prompt(tokenizer, prompt)
    ids = render_conversation(tokenizer, [*prompt, {"role": "assistant", "content": answer}], is_finished)
    if len(ids) > len(prompt_ids) and ids[: len(prompt_ids)] == prompt_ids:
        return ids[len(prompt_ids) :], True
    alone = [int(token) for token in tokenizer.encode(answer, add_special_tokens=False)]
    return [*alone, int(tokenizer.eos_token_id)] if is_finished else alone, False


def fit_context(context: Ids, answer: Ids, max_length: int) -> tuple[Ids, Ids, bool]:
    """Shorten the pair to a model's ``max_length`` input tokens; the flag is True if something was cut.

    The answer's last token is never an input, so there is room for one more. The context loses its beginning, as in
    lm-eval; an answer that does not fit by itself loses its end and keeps one token of context.
    """
    # The answer's last token is never an input, hence one more. The context is cut from its beginning.
    room = max_length + 1 - len(answer)
    if room >= len(context):
        return context, answer, False
    if room >= 1:
        return context[-room:], answer, True
    return context[-1:], answer[:max_length], True


def prefix_token(tokenizer: Any) -> int:
    """Return the token before a document's first: BOS, or end of text for a tokenizer without one.

    Raises ``UserError`` for a tokenizer that has neither.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise UserError("the tokenizer has neither a BOS nor an EOS token, so a text's first token has no context.")


def rolling_windows(tokens: Ids, prefix: int, length: int) -> list[tuple[Ids, Ids]]:
    """Divide a document into windows: pairs of context and targets, every token a target exactly once.

    Each window has ``length`` targets after one token of context (``prefix`` for the first window). The last window,
    which has fewer targets, fills its input with more context. Raises ``ValueError`` for ``length`` below 1.
    """
    if length < 1:
        raise ValueError(f"length is {length}; a window has at least one target")
    windows = []
    for start in range(0, len(tokens), length):
        targets = tokens[start : start + length]
        # Inputs are context plus targets without the last one: `length` tokens in all, also in the last window.
        context = tokens[start + len(targets) - length - 1 : start] if start else [prefix]
        windows.append((context, targets))
    return windows


def sum_logprobs(reader: Reader, pairs: Sequence[tuple[Ids, Ids]], task: str) -> tuple[list[float], list[int], int]:
    """Return each answer's log-likelihood after its context, its number of tokens, and the number of cut pairs.

    Both are cut to the model's length. Raises ``RuntimeError`` if a log-likelihood is NaN.
    """
    fitted = [fit_context(context, answer, reader.max_length) for context, answer in pairs]
    logprobs = reader.logprobs([context for context, _, _ in fitted], [answer for _, answer, _ in fitted])
    sums = [math.fsum(values) for values in logprobs]
    require_numbers(sums, task, reader.info.name)
    return sums, [len(answer) for _, answer, _ in fitted], sum(is_cut for _, _, is_cut in fitted)


def require_numbers(values: Sequence[float], task: str, system: str) -> None:
    """Raise ``RuntimeError`` if a log-likelihood is NaN."""
    if any(map(math.isnan, values)):
        raise RuntimeError(f"{task}: '{system}' gives probabilities that are not numbers (NaN)")
