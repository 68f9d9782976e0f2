"""Texts of tokens: with spaces between tokens, characters of several tokens, and bytes that are no character."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from align.models.chat.render import token_texts
from align.models.chat.token_texts import BROKEN, TokenTexts
from align.models.loading import load_tokenizer


class Words:
    """Decodes words with spaces between them, as sentencepiece does, and an e with accent from two tokens."""

    words = ("a", "bc", "d")

    def __init__(self) -> None:
        self.calls = 0

    def decode(self, ids: Sequence[int], **options: Any) -> str:
        self.calls += 1
        words: list[str] = []
        halves = 0
        for token in ids:
            halves = halves + 1 if token == 3 else 0
            if token < 3:
                words.append(self.words[token])
            elif halves == 2:
                words.append("é")
                halves = 0
        return " ".join(words) + BROKEN * halves


@pytest.mark.parametrize(
    ("ids", "texts"),
    [
        ([1], ["bc"]),
        ([0, 1, 2], ["a", " bc", " d"]),
        ([3, 3], ["", "é"]),
        ([0, 3], ["a", BROKEN]),
        ([2, 3, 3, 1], ["d", "", " é", " bc"]),
    ],
)
def test_texts_are_together_the_decoded_response(ids: list[int], texts: list[str]) -> None:
    assert TokenTexts(Words())(ids) == texts


def test_equal_tokens_are_decoded_once() -> None:
    tokenizer = Words()
    texts = TokenTexts(tokenizer)
    texts([0, 1, 2, 0, 1])
    before = tokenizer.calls
    for _ in range(10):
        assert texts([1, 2, 0, 1]) == ["bc", " d", " a", " bc"]
    assert tokenizer.calls == before + 10


@pytest.mark.parametrize("text", ["plain words", "naïve Ω 漢字 😀", "", "a\nb\tc"])
def test_byte_tokens_have_the_texts_of_a_full_decode(text: str, tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert TokenTexts(tokenizer)(ids) == token_texts(tokenizer, ids)


def test_bytes_that_are_no_character_have_a_mark_each(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    letters = tokenizer("ab漢", add_special_tokens=False)["input_ids"]
    half = letters[2:4]
    assert TokenTexts(tokenizer)([*half, letters[0], *letters[2:], half[0]]) == [
        BROKEN, BROKEN, "a", "", "", "漢", BROKEN,
    ]  # fmt: skip
