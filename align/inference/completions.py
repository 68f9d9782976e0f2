"""Readers of chat completions, the replies of OpenAI-compatible servers."""

from __future__ import annotations

import json
from typing import Any

from align.inference.requests import Answer

MAX_TOKENS = 2**40
"""Token counts above are treated as nonsense: they would overflow a cost."""


def read_completion(completion: Any) -> Answer:
    """Return the answer in a chat completion. Raises ``ValueError`` for anything else."""
    try:
        choice = completion["choices"][0]
        content = choice["message"].get("content")
        if isinstance(content, list):  # some servers send parts
            content = "".join(part["text"] for part in content if part.get("type") == "text")
        if not isinstance(content, (str, type(None))):
            raise TypeError("content is no text")
        tool_calls = [_read_call(call) for call in choice["message"].get("tool_calls") or ()]
        is_refused = bool(choice["message"].get("refusal"))
        usage = completion.get("usage") or {}
        prompt_tokens = _token_count(usage.get("prompt_tokens"))
        completion_tokens = _token_count(usage.get("completion_tokens"))
        reason = choice.get("finish_reason")
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None
    return Answer(
        text=_clean_text(content or ""),
        finished=reason != "length",
        refused=is_refused or reason == "content_filter",
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        tool_calls=tool_calls,
    )


def _read_call(call: Any) -> dict[str, Any]:
    """Return a call of a tool. Raises ``TypeError`` if name or arguments are missing."""
    function = call["function"]
    name = function["name"]
    arguments = function.get("arguments")
    if isinstance(arguments, dict):  # some servers send the object itself
        arguments = json.dumps(arguments)
    if not isinstance(name, str) or not isinstance(arguments, str | None):
        raise TypeError("a tool call has no name or arguments")
    return {"id": str(call.get("id") or ""), "name": _clean_text(name), "arguments": _clean_text(arguments or "{}")}


def _clean_text(text: str) -> str:
    """Return a text without halves of surrogates, which fit no Parquet file."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _token_count(value: Any) -> int | None:
    """Return a number of tokens, or None for anything else."""
    is_count = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MAX_TOKENS
    return value if is_count else None
