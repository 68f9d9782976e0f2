"""A response's tokens as pieces of its text, so that a number can stand over each. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Text of each token, such that together they are the decoded response; a character's last token has it."""
    texts, before = [], ""
    for end in range(1, len(ids) + 1):
        whole = str(tokenizer.decode(list(ids[:end]), skip_special_tokens=False, clean_up_tokenization_spaces=False))
        if whole.endswith("\ufffd") and end < len(ids):  # half a character: it comes with the token that completes it
            texts.append("")
            continue
        texts.append(whole[len(before) :] if whole.startswith(before) else "")
        before = whole
    return texts
