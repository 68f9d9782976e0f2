"""From plain texts to token ids: documents with an end, in windows, every token of them learned once.

A document is its tokens between a token that begins it and one that ends it. One longer than ``max_length`` is read in
windows that follow one another with one token in common, so that each token is predicted once, from what stands before
it in its window. Left out: windows that overlap further.
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
    """The tokens around a document."""

    begin: int
    end: int


def document_ends(tokenizer: Any, end: str | None, place: str) -> Ends:
    """The tokens before and behind every document.

    Behind it ``end``, by default the tokenizer's EOS. Before it the BOS of a tokenizer that begins texts with one, else
    ``end`` again, which is what stands before a document in an endless text.

    Raises ``UserError`` for an ``end`` that is no single token.
    """
    token = tokenizer.eos_token if end is None else end
    ids = tokenizer.encode(token, add_special_tokens=False)
    if len(ids) != 1:
        raise UserError(
            f"{place}: {token!r} is {len(ids)} tokens, and a document must end with one. Name one that the tokenizer "
            f"has, such as {tokenizer.eos_token!r}."
        )
    begins = tokenizer.encode("") == [tokenizer.bos_token_id] or tokenizer.encode("a")[:1] == [tokenizer.bos_token_id]
    return Ends(int(tokenizer.bos_token_id) if begins else int(ids[0]), int(ids[0]))


def encode_texts(tokenizer: Any, rows: Sequence[Row], max_length: int, ends: Ends, learn_end: bool = True) -> Encoded:
    """``input_ids`` and ``labels`` of every window; the first token of each has no label.

    Without ``learn_end`` the end has none either, so that labels are the text's own tokens: what a loss per byte is of.
    A text that was cut off has no end in any case.
    """
    out = Encoded()
    for row in rows:
        tokens = [int(token) for token in tokenizer.encode(row["text"], add_special_tokens=False)]
        if not tokens:
            out.count(NO_TOKENS)
            continue
        whole = [ends.begin, *tokens, *([ends.end] if learn_end and is_finished(row, "text") else [])]
        for start in range(0, len(whole) - 1, max_length - 1):
            ids = whole[start : start + max_length]
            out.add({"input_ids": ids, "labels": [MASKED, *ids[1:]]}, len(ids), row)
    return out
