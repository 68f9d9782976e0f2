"""Texts of single tokens, and tokens of two tokenizations at one place."""

from __future__ import annotations

from align.models.built_in import make_tiny_tokenizer
from align.training.token_spans import TokenTexts, align_spans
from tests.support.models.joining_tokenizer import make_joining_tokenizer


def test_spans_cover_text_but_no_half_characters() -> None:
    tokenizer = make_tiny_tokenizer()
    texts = TokenTexts(tokenizer)
    ids = tokenizer("aé b<|im_end|>", add_special_tokens=False)["input_ids"]
    text, spans = texts.spans(ids)
    # The two bytes of the é have no place of their own; the space after it begins at 2.
    assert text == "aé b<|im_end|>"
    assert spans == [(0, 1), None, None, (2, 3), (3, 4), (4, 14)]
    assert [texts.find(texts.text(token)) for token in (ids[0], ids[3], ids[5])] == [ids[0], ids[3], ids[5]]
    assert texts.find(texts.text(ids[1])) is None


def test_tokens_align_only_with_equal_spans() -> None:
    # "return": six tokens of one byte against "ret" and others of a BPE.
    own, other = TokenTexts(make_tiny_tokenizer()), TokenTexts(make_joining_tokenizer())
    text, spans = own.spans(own.tokenizer("return x!", add_special_tokens=False)["input_ids"])
    read_text, read_spans = other.spans(other.tokenizer("return x!", add_special_tokens=False)["input_ids"])
    assert text == read_text
    places = align_spans(spans, read_spans)
    assert places[:6] == [None] * 6
    assert read_spans[0] == (0, 3)
    exclamation = places[-1]
    assert exclamation is not None
    assert read_spans[exclamation] == (8, 9)
