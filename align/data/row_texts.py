"""The texts of a row: those that a step looks at, a change to all of them, and excerpts for the ledger.

Torch-free.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from align.config.recipe.filter_settings import Sides
from align.data.rows import Message, Row, is_text

_REPLIES = ("completion", "chosen", "rejected")


def reply_texts(row: Row, sides: Sides) -> Iterator[tuple[str, str]]:
    """Yield field and text of the replies that ``sides`` selects.

    ``chosen``: the completion, unless an unpaired row labels it False; the chosen reply; the best of several responses
    (lowest rank, else highest score; none without ranks and scores). ``both``: every reply. A plain text counts as a
    reply in either case.
    """
    if is_text(row):
        yield "text", row["text"]
        return
    for name in _REPLIES:
        if row.get(name) and (sides == "both" or not is_bad_reply(row, name)):
            for message in row[name]:
                yield name, message.get("content") or ""
    responses = row.get("responses") or []
    for response in responses if sides == "both" else _best(responses):
        yield "responses", response["content"]


def is_bad_reply(row: Row, name: str) -> bool:
    """Return True for a field with a reply that is not to be imitated: a rejected reply, or a reply labeled False."""
    return name == "rejected" or (name == "completion" and row.get("label") is False)


def _best(responses: list[dict[str, Any]]) -> list[dict[str, Any]]:
    ranked = [response for response in responses if response.get("rank") is not None]
    if ranked:
        return [min(ranked, key=lambda response: int(response["rank"]))]
    scored = [response for response in responses if response.get("score") is not None]
    return [max(scored, key=lambda response: float(response["score"]))] if scored else []


def prompt_texts(row: Row, *roles: str) -> Iterator[tuple[str, str]]:
    """Yield ``prompt`` and the text of each of its turns; only turns of ``roles``, if some are given."""
    for message in row.get("prompt") or ():
        if not roles or message["role"] in roles:
            yield "prompt", message.get("content") or ""


def change_texts(row: Row, change: Callable[[str], str]) -> Row:
    """Return the row with every text changed: a new row, or the same object if nothing changed."""
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
            new["responses"] = [response | {"content": text} for response, text in zip(responses, texts, strict=True)]
    return row | new if new else row


def has_equal_sides(row: Row) -> bool:
    """Return True for a pair whose answers are the same in every turn, calls of tools included."""
    return bool(row.get("chosen")) and row["chosen"] == row.get("rejected")


def change_messages(messages: list[Message], change: Callable[[str], str]) -> list[Message]:
    """Return messages with changed contents; the same list object if nothing changed."""
    changed: list[Message] = []
    has_changes = False
    for message in messages:
        # Messages with only tool calls have no content.
        content = message.get("content")
        new_content = change(content) if content else content
        if new_content != content:
            message = message | {"content": new_content}
            has_changes = True
        changed.append(message)
    return changed if has_changes else messages


_FENCED = re.compile(r"^ {0,3}(```|~~~).*?(?:^ {0,3}\1[`~]*[ \t]*$|\Z)", re.MULTILINE | re.DOTALL)


def without_code(text: str) -> str:
    """Return a text without fenced code; an open fence reaches to the end."""
    return _FENCED.sub("", text) if "```" in text or "~~~" in text else text


def excerpt(text: str, start: int, end: int, around: int = 40) -> str:
    """Return the text from ``start`` to ``end`` with a little context, on one line of at most 200 characters."""
    end = min(end, start + 120)
    before = max(0, start - around)
    after = min(len(text), end + around)
    quoted = " ".join(text[before:after].split())
    return ("…" if before else "") + quoted + ("…" if after < len(text) else "")
