"""Texts of the tokens of many responses, from few calls of the tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from align.store.rollouts import to_text

BROKEN = "\ufffd"
"""Character for bytes that are no character."""
LONGEST = 4
"""Most tokens of a character: it has at most four bytes."""


class TokenTexts:
    """Returns the text of each token of a response; joined, they are the decoded response.

    A character of several tokens belongs to the last of them. Each token whose bytes are no character has one
    ``BROKEN``, of which a decoder writes one or several. Texts are decoded once: alone for a first token, else after
    another token, because some tokenizers write a space only between two tokens.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._alone: dict[int, str] = {}
        self._inside: dict[int, str] = {}
        self._runs: dict[tuple[int, ...], list[str]] = {}
        """Texts of consecutive tokens that are no characters alone."""

    def __call__(self, ids: Sequence[int]) -> list[str]:
        """Return the texts of ``ids``."""
        texts: list[str] = []
        place = 0
        while place < len(ids):
            if not self._is_broken(ids[place]):
                texts.append(self._text(ids, place))
                place += 1
                continue
            end = place + 1
            while end < len(ids) and self._is_broken(ids[end]):
                end += 1
            texts += self._texts_of_run(tuple(ids[place:end]))
            place = end
        # Cached texts are right for most tokenizers. If together they differ from the decoded response, the text of a
        # token depends on its neighbors.
        decoded = self._decode(ids)
        if "".join(texts).replace(BROKEN, "") == decoded.replace(BROKEN, ""):
            return texts
        return self._texts_in_context(ids)

    def _decode(self, ids: Sequence[int]) -> str:
        text = self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return to_text(str(text))

    def _text_alone(self, token: int) -> str:
        if token not in self._alone:
            self._alone[token] = self._decode([token])
        return self._alone[token]

    def _is_broken(self, token: int) -> bool:
        return BROKEN in self._text_alone(token)

    def _text(self, ids: Sequence[int], place: int) -> str:
        """Return the text of a token that is a text alone."""
        token = ids[place]
        if place == 0 or self._is_broken(ids[place - 1]):
            return self._text_alone(token)
        if token not in self._inside:
            before = ids[place - 1]
            self._inside[token] = self._decode([before, token])[len(self._text_alone(before)) :]
        return self._inside[token]

    def _texts_of_run(self, run: tuple[int, ...]) -> list[str]:
        if run not in self._runs:
            self._runs[run] = self._split_run(run)
        return self._runs[run]

    def _split_run(self, run: tuple[int, ...]) -> list[str]:
        if not self._decode(run).replace(BROKEN, ""):
            return [BROKEN] * len(run)
        texts: list[str] = []
        while len(texts) < len(run):
            start = len(texts)
            for end in range(start + 2, min(start + LONGEST, len(run)) + 1):
                text = self._decode(run[start:end])
                if BROKEN not in text:
                    texts += [""] * (end - start - 1) + [text]
                    break
            else:
                # No token after it completes a character, so this token's bytes are none.
                texts.append(BROKEN)
        return texts

    def _texts_in_context(self, ids: Sequence[int]) -> list[str]:
        """Return the texts by decoding each token after the few before it."""
        texts: list[str] = []
        begin = 0
        read = 0
        for end in range(1, len(ids) + 1):
            before = self._decode(ids[begin:read])
            text = self._decode(ids[begin:end])
            if text.endswith(BROKEN) and end < len(ids):  # half a character
                texts.append("")
                continue
            texts.append(text[len(before) :])
            begin = read
            read = end
        return texts
