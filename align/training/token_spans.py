"""Texts of single tokens, and which tokens of two tokenizations of one text have the same place. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Span = tuple[int, int]
"""Start and end of a token's text, in characters."""
HALF = "\ufffd"
"""Decoded text of bytes that are no whole character."""
MAX_TOKENS_OF_CHARACTER = 8


class TokenTexts:
    """The texts that a tokenizer's tokens have in the middle of a text, with leading spaces."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        # Some tokenizers strip the first token's space, so each token is decoded after another one.
        self._anchor: list[int] = tokenizer.encode("a", add_special_tokens=False)
        self._anchor_length = len(self._decode([]))
        self._texts: dict[int, str] = {}
        self._ids: dict[str, int] = {}

    def _decode(self, ids: list[int]) -> str:
        return str(
            self.tokenizer.decode([*self._anchor, *ids], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        )

    def text(self, token: int) -> str:
        """Return a token's text; it contains ``HALF`` for parts of characters."""
        if token not in self._texts:
            self._texts[token] = self._decode([token])[self._anchor_length :]
        return self._texts[token]

    def find(self, text: str) -> int | None:
        """Return the token with this text; None if there is none."""
        if not self._ids:
            for token in range(len(self.tokenizer)):
                # Two tokens may have one text; tokenizers number the usual one first.
                self._ids.setdefault(self.text(token), token)
        return None if HALF in text or not text else self._ids.get(text)

    def spans(self, ids: Sequence[int]) -> tuple[str, list[Span | None]]:
        """Return the joined text, and each token's span in it. A token with a part of a character has none."""
        joined = ""
        spans: list[Span | None] = []
        group: list[int] = []
        for index, token in enumerate(ids):
            group.append(token)
            text = self.text(token) if len(group) == 1 else self._decode(group)[self._anchor_length :]
            is_last = index == len(ids) - 1
            if HALF in text and len(group) < MAX_TOKENS_OF_CHARACTER and not is_last:
                continue
            # A character of several tokens has a place, its tokens have none.
            is_whole = len(group) == 1 and HALF not in text
            spans += [(len(joined), len(joined) + len(text))] if is_whole else [None] * len(group)
            joined += text
            group = []
        return joined, spans


def align_spans(student: Sequence[Span | None], teacher: Sequence[Span | None]) -> list[int | None]:
    """Return for each of the student's tokens the index of the teacher's token with the same span, or None."""
    places = {span: index for index, span in enumerate(teacher) if span is not None and span[0] < span[1]}
    return [places.get(span) if span is not None else None for span in student]
