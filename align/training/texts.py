"""Tokenize plain texts: documents with an end token, in windows that predict every token once.

A document is its tokens between a begin and an end token. A document longer than ``max_length`` is cut into consecutive
windows that overlap by one token. Each token is predicted once from the tokens before it in its window. A larger
overlap is not supported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from align.data.rows import is_finished
from align.errors import UserError
from align.training.rows import MASKED, Encoded, Row

NO_TOKENS = "left out, without a token"


@dataclass(frozen=True)
class Ends:
    """Tokens before and after a document."""

    begin: int
    end: int


def document_ends(tokenizer: Any, end: str | None, place: str) -> Ends:
    """Return the tokens before and after every document.

    After it ``end``, by default the tokenizer's EOS. Before it the tokenizer's BOS if it starts texts with one, else
    ``end``, which precedes a document in an endless text.

    Raises ``UserError`` for an ``end`` that is not a single token.
    """
    token = tokenizer.eos_token if end is None else end
    ids = tokenizer.encode(token, add_special_tokens=False)
    if len(ids) != 1:
        raise UserError(
            f"{place}: {token!r} is {len(ids)} tokens, and a document must end with one. Name one that the tokenizer "
            f"has, such as {tokenizer.eos_token!r}."
        )
    # Some tokenizers add BOS to an empty text, others only to a text with content.
    begins = tokenizer.encode("") == [tokenizer.bos_token_id] or tokenizer.encode("a")[:1] == [tokenizer.bos_token_id]
    return Ends(int(tokenizer.bos_token_id) if begins else int(ids[0]), int(ids[0]))


def encode_texts(tokenizer: Any, rows: Sequence[Row], max_length: int, ends: Ends, learn_end: bool = True) -> Encoded:
    """Encode ``input_ids`` and ``labels`` of every window; the first token of each has no label.

    Without ``learn_end`` there is no end token, and labels are the text's own tokens, as for a loss per byte. A text
    that was cut off never has an end token.
    """
    out = Encoded()
    for row in rows:
        tokens = [int(token) for token in tokenizer.encode(row["text"], add_special_tokens=False)]
        if not tokens:
            out.count(NO_TOKENS)
            continue
        document = [ends.begin, *tokens, *([ends.end] if learn_end and is_finished(row, "text") else [])]
        # A step of max_length - 1 repeats one token: the last of a window is the first of the next, without a label.
        for start in range(0, len(document) - 1, max_length - 1):
            ids = document[start : start + max_length]
            out.add({"input_ids": ids, "labels": [MASKED, *ids[1:]]}, len(ids), row)
    return out
