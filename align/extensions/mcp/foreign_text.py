"""Results of tools for an assistant: foreign texts are marked, cut and escaped, secrets are hidden, sizes are limited.

Models, data sets and programs write the texts in a store. An assistant may take such a text for an instruction, so it
gets each of them as an object ``{"foreign_text": …}``, and the server's instructions say what that means.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from align.errors import UserError, printable, redact

FOREIGN = "foreign_text"
EXCERPT, LONG_TEXT = 1_500, 20_000
"""Characters of a text in a list, and of a text that was asked for."""
MAX_RESULT = 120_000
"""Characters of a result."""
MAX_DEPTH = 12
"""Nesting of a foreign value that is kept; deeper values become text."""


def foreign(text: Any, limit: int = EXCERPT) -> dict[str, Any] | None:
    """Return a foreign text as an object; hidden characters are escaped. None for None."""
    if text is None:
        return None
    content = text if isinstance(text, str) else json.dumps(text, ensure_ascii=False, default=str)
    marked: dict[str, Any] = {FOREIGN: redact(printable(content[:limit]))}
    if len(content) > limit:
        marked["omitted_characters"] = len(content) - limit
    return marked


def foreign_tail(text: str, limit: int) -> dict[str, Any]:
    """Return the end of a foreign text, such as a log."""
    marked = foreign(text[-limit:], limit)
    assert marked is not None
    return marked | ({"omitted_characters_before": len(text) - limit} if len(text) > limit else {})


def to_result(value: Any) -> str:
    """Return a result as JSON.

    Raises:
        UserError: The result is larger than ``MAX_RESULT``.
    """
    text = json.dumps(_hide(value, 0), ensure_ascii=False, default=str)
    if len(text) > MAX_RESULT:
        raise UserError(
            f"The result has {len(text):,} characters, more than {MAX_RESULT:,}. Ask for fewer rows, or for one stage."
        )
    return text


def _hide(value: Any, depth: int) -> Any:
    """Return a value with secrets in its texts replaced, hidden characters escaped, and numbers that JSON has."""
    if isinstance(value, str):
        return redact(printable(value))
    if isinstance(value, float) and value - value != 0:  # nan and infinities
        return None
    if depth > MAX_DEPTH and isinstance(value, Mapping | list | tuple):
        return printable(str(value))[:EXCERPT]
    if isinstance(value, Mapping):
        return {printable(str(name)): _hide(item, depth + 1) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_hide(item, depth + 1) for item in value]
    return value
