"""Contexts, answers and windows as tokens."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align.data.rows import user
from align.evaluation.tasks.likelihood import (
    answer_ids,
    encode,
    encode_choices,
    fit_context,
    prefix_token,
    rolling_windows,
)
from align.models.built_in import make_tiny_tokenizer
from align.models.chat.render import render_conversation, render_prompt
from tests.support.refusals import Refused

BOS = "<|im_start|>"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tiny_tokenizer()


@pytest.fixture(scope="module")
def with_bos() -> Any:
    """A tokenizer that puts its BOS before every text, as Llama's do."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tiny_tokenizer()
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.bos_token_id)]
    )
    return tokenizer


def test_space_at_the_context_s_end_goes_to_the_choice(tokenizer: Any) -> None:
    [(context, answer)] = encode_choices(tokenizer, "Question: a? ", ["b"])
    assert tokenizer.decode(context) == "Question: a?"
    assert tokenizer.decode(answer) == " b"


def test_choices_share_the_context_s_tokens(tokenizer: Any) -> None:
    (context, first), (two, second) = encode_choices(tokenizer, "Q:", [" yes", " no"])
    assert context == two == tokenizer.encode("Q:")
    assert [tokenizer.decode(ids) for ids in (first, second)] == [" yes", " no"]


def test_bos_stands_once_in_front(with_bos: Any) -> None:
    bos = with_bos.bos_token_id
    [(context, answer)] = encode_choices(with_bos, "Q:", [" yes"])
    assert context[0] == bos
    assert bos not in [*context[1:], *answer]
    assert with_bos.decode(answer) == " yes"
    assert encode(with_bos, f"{BOS}user").count(bos) == 1


def test_a_choice_without_tokens_is_an_error(refused: Refused, tokenizer: Any) -> None:
    swallowing = SimpleNamespace(
        bos_token_id=1, eos_token_id=2, decode=tokenizer.decode, encode=lambda text, **_: [5, 6]
    )  # a tokenizer whose text ends where its normalizer says
    refused(encode_choices, swallowing, "Q: a", [" b"])


def test_an_answer_is_what_the_template_writes(tokenizer: Any) -> None:
    prompt = [user("hello")]
    for finished in (True, False):
        ids, cut = answer_ids(tokenizer, prompt, "Hi you", finished)
        assert cut
        assert tokenizer.decode(ids) == "Hi you" + ("<|im_end|>" if finished else "")
        conversation = render_conversation(tokenizer, [*prompt, {"role": "assistant", "content": "Hi you"}], finished)
        assert [*render_prompt(tokenizer, prompt), *ids] == conversation


def test_an_answer_under_a_template_without_a_place_to_cut(tokenizer: Any) -> None:
    thinking = make_tiny_tokenizer()
    thinking.chat_template = thinking.chat_template.replace(
        "{{ '\\n<|im_start|>assistant\\n' }}", "{{ '\\n<|im_start|>assistant\\n<think>\\n' }}"
    )
    for answer in ("Hi", "An answer that is longer than the thought"):
        ids, cut = answer_ids(thinking, [user("hello")], answer, is_finished=True)
        assert not cut
        assert ids == [*tokenizer.encode(answer), tokenizer.eos_token_id]
        assert answer_ids(thinking, [user("hello")], answer, is_finished=False)[0] == tokenizer.encode(answer)


@pytest.mark.parametrize(
    ("context", "answer", "max_length", "expected"),
    [
        ([1, 2, 3], [4, 5], 4, ([1, 2, 3], [4, 5], False)),  # inputs 1 2 3 4: the last token is only predicted
        ([1, 2, 3], [4, 5], 3, ([2, 3], [4, 5], True)),
        ([1, 2, 3], [4, 5], 2, ([3], [4, 5], True)),
        ([1, 2, 3], [4, 5], 1, ([3], [4], True)),
    ],
)
def test_fitting_by_hand(context: list[int], answer: list[int], max_length: int, expected: Any) -> None:
    assert fit_context(context, answer, max_length) == expected


def test_the_token_before_a_text(refused: Refused) -> None:
    assert prefix_token(SimpleNamespace(bos_token_id=7, eos_token_id=9)) == 7
    assert prefix_token(SimpleNamespace(bos_token_id=None, eos_token_id=9)) == 9
    assert prefix_token(SimpleNamespace(bos_token_id=0, eos_token_id=9)) == 0
    refused(lambda: prefix_token(SimpleNamespace(bos_token_id=None, eos_token_id=None)))


def test_windows_by_hand(refused: Refused) -> None:
    # Three tokens a window; the last window has one token to ask for, and as much before it as its input holds.
    assert rolling_windows([1, 2, 3, 4, 5, 6, 7], 0, 3) == [([0], [1, 2, 3]), ([3], [4, 5, 6]), ([4, 5, 6], [7])]
    assert rolling_windows([1, 2], 0, 3) == [([0], [1, 2])]
    assert rolling_windows([], 0, 3) == []
    refused(rolling_windows, [1], 0, 0)


@settings(deadline=None)
@given(st.integers(0, 200), st.integers(1, 40))
def test_windows_ask_for_every_token_once_behind_its_own_context(count: int, max_length: int) -> None:
    tokens = list(range(1, count + 1))
    windows = rolling_windows(tokens, 0, max_length)
    assert [token for _, window in windows for token in window] == tokens
    with_prefix = [0, *tokens]
    for context, window in windows:
        assert context
        assert len(context) + len(window) - 1 <= max_length  # the last token is no input
        assert context == with_prefix[window[0] - len(context) : window[0]]  # what stands right before it in the text


def test_windows_are_those_of_lm_eval() -> None:
    utils = pytest.importorskip("lm_eval.utils")
    for count in range(40):
        tokens = list(range(1, count + 1))
        for max_length in range(1, 15):
            theirs = utils.get_rolling_token_windows(tokens, prefix_token=0, max_seq_len=max_length, context_len=1)
            assert rolling_windows(tokens, 0, max_length) == [utils.make_disjoint_window(window) for window in theirs]
