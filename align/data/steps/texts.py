"""The texts of a row: which ones a step looks at, how it changes them all, and how it quotes one.

Torch-free. Leaves out what is looked for: that stands with each filter.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, Literal

from align.data.rows import Message, Row, is_text

Sides = Literal["chosen", "both"]

_REPLIES = ("completion", "chosen", "rejected")


def reply_texts(row: Row, sides: Sides) -> Iterator[tuple[str, str]]:
    """Field and text of the replies that ``sides`` means.

    ``chosen``: the completion, unless it is an unpaired row's whose label is False; the chosen reply; the best of
    several responses (lowest rank, else highest score; none where nothing ranks them). ``both``: every reply. A plain
    text is one either way.
    """
    if is_text(row):
        yield "text", row["text"]
        return
    for name in _REPLIES:
        if row.get(name) and (sides == "both" or not _is_bad(row, name)):
            for message in row[name]:
                yield name, message.get("content") or ""
    responses = row.get("responses") or []
    for response in responses if sides == "both" else _best(responses):
        yield "responses", response["content"]


def _is_bad(row: Row, name: str) -> bool:
    return name == "rejected" or (name == "completion" and row.get("label") is False)


def _best(responses: list[dict[str, Any]]) -> list[dict[str, Any]]:
    ranked = [response for response in responses if response.get("rank") is not None]
    if ranked:
        return [min(ranked, key=lambda response: int(response["rank"]))]
    scored = [response for response in responses if response.get("score") is not None]
    return [max(scored, key=lambda response: float(response["score"]))] if scored else []


def prompt_texts(row: Row, *roles: str) -> Iterator[tuple[str, str]]:
    """``prompt`` and the text of each of its turns; those of ``roles`` only, where some are named."""
    for message in row.get("prompt") or ():
        if not roles or message["role"] in roles:
            yield "prompt", message.get("content") or ""


def change_texts(row: Row, change: Callable[[str], str]) -> Row:
    """The row with ``change`` made to every text of it: a new row, or the very same one where nothing changed."""
    new: Row = {}
    if is_text(row):
        text = change(row["text"])
        return row if text == row["text"] else row | {"text": text}
    for name in ("prompt", *_REPLIES):
        if row.get(name):
            messages = change_messages(row[name], change)
            if messages is not row[name]:
                new[name] = messages
    responses = row.get("responses")
    if responses:
        texts = [change(response["content"]) for response in responses]
        if any(text != response["content"] for text, response in zip(texts, responses, strict=True)):
            new["responses"] = [r | {"content": text} for r, text in zip(responses, texts, strict=True)]
    return row | new if new else row


def change_messages(messages: list[Message], change: Callable[[str], str]) -> list[Message]:
    """Messages with changed contents; the very same list where nothing changed."""
    new = [
        message if not old or (text := change(old)) == old else message | {"content": text}
        for message in messages
        for old in (message.get("content"),)
    ]
    return new if any(one is not other for one, other in zip(new, messages, strict=True)) else messages


_FENCED = re.compile(r"^ {0,3}(```|~~~).*?(?:^ {0,3}\1[`~]*[ \t]*$|\Z)", re.MULTILINE | re.DOTALL)


def without_code(text: str) -> str:
    """Text without fenced code; an open fence reaches to the end."""
    return _FENCED.sub("", text) if "```" in text or "~~~" in text else text


def excerpt(text: str, start: int, end: int, around: int = 40) -> str:
    """What stands at ``start`` to ``end`` with a little of what is around it, on one line of at most 200 characters."""
    end = min(end, start + 120)
    before, after = max(0, start - around), min(len(text), end + around)
    quoted = " ".join(text[before:after].split())
    return ("…" if before else "") + quoted + ("…" if after < len(text) else "")
