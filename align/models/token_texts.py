"""Split a response's text by its tokens, for pages that show a number over each. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Return each token's text; joined, they are the decoded response.

    A character of several tokens belongs to the last of them.
    """
    texts: list[str] = []
    previous = ""
    for end in range(1, len(ids) + 1):
        decoded = str(tokenizer.decode(list(ids[:end]), skip_special_tokens=False, clean_up_tokenization_spaces=False))
        if decoded.endswith("\ufffd") and end < len(ids):  # half a character
            texts.append("")
            continue
        texts.append(decoded[len(previous) :] if decoded.startswith(previous) else "")
        previous = decoded
    return texts
