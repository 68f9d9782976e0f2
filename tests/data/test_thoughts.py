"""Thoughts in the text of a turn: which characters belong to them."""

from __future__ import annotations

import pytest

from align.data.thoughts import EMPTY, hide_thoughts


@pytest.mark.parametrize(
    ("text", "thought"),
    [
        ("Yes.", ""),
        ("<think>a</think>Yes.", "<think>a</think>"),
        ("\n<thought>a</thought> <think>b</think>Yes.", "\n<thought>a</thought> <think>b</think>"),
        ("<reasoning>a</think>Yes.", "<reasoning>a</think>Yes."),  # another tag closes nothing
        ("a</thinking> Yes.", "a</thinking>"),
        ("[THINK]a[/THINK]Yes.", "[THINK]a[/THINK]"),
        ("a[/THINK] Yes.", "a[/THINK]"),
        ("<|channel|>analysis<|message|>a<|end|>Yes.", "<|channel|>analysis<|message|>a<|end|>"),
        ("<|channel|>commentary to=f<|message|>{}", ""),
        ("Yes <think>a</think>", ""),  # only what a turn begins with
        ('{"x": "</think>"}', ""),  # text of a call
    ],
)
def test_leading_thoughts_become_spaces(text: str, thought: str) -> None:
    assert hide_thoughts(text) == " " * len(thought) + text.removeprefix(thought)


def test_empty_thoughts_are_recognized() -> None:
    texts = ("<think></think>", "</reasoning>", "[THINK][/THINK]", "<think>a</think>", "<think>")
    assert [bool(EMPTY.fullmatch(text)) for text in texts] == [True, True, True, False, False]
