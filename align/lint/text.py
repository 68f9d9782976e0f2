"""Checks on the turns as they are written, before they become tokens."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise

from align.data.rows import Message, Row
from align.lint.dialect import Dialect
from align.lint.findings import Findings, Place

ROLES = frozenset({"system", "user", "assistant", "tool"})
PLACEHOLDER = re.compile(r"\{\{ ?[A-Za-z_][\w -]{0,38} ?\}\}")
# What a decoder puts for bytes it cannot read, and halves of characters that were cut apart.
BROKEN = re.compile("[\ufffd\ud800-\udfff]")
ANSWERS = ("completion", "chosen", "rejected")


def turns(row: Row) -> Iterator[tuple[str, list[Message]]]:
    """Each list of turns a row has: ``prompt``, then its answers."""
    for name in ("prompt", *ANSWERS):
        if row.get(name):
            yield name, row[name]


def check_turns(row: Row, place: Place, dialect: Dialect, found: Findings) -> None:
    """Everything about the roles and texts of one row."""
    for name, messages in turns(row):
        for message in messages:
            text, role = message["content"] or "", message["role"]
            if role not in ROLES:
                found.add("unknown-role", place, f"role {role!r}: {text}")
            if not text.strip():
                kind = "empty-answer" if name != "prompt" else "empty-turn"
                # An assistant turn that calls a tool says nothing else.
                if not message.get("tool_calls"):
                    found.add(kind, place, f"{name}: {role} says {text!r}")
            _check_text(text, f"{name}: {role}", place, dialect, found)
    answers = [row[name] for name in ANSWERS if row.get(name)]
    for answer in answers or [[]]:
        _check_order([*row["prompt"], *answer], place, found)


def _check_text(text: str, who: str, place: Place, dialect: Dialect, found: Findings) -> None:
    if dialect.special_pattern and (token := dialect.special_pattern.search(text)):
        found.add("special-token-in-content", place, f"{who} writes {token.group()!r}: {around(text, token)}")
    for mark in dialect.marks:
        at = text.find(mark)
        if at >= 0:
            found.add(
                "turn-marker-in-content", place, f"{who} writes {mark!r}: {text[max(0, at - 40) : at + 60]}"
            )  # fmt: skip
    if broken := BROKEN.search(text):
        found.add("not-utf8", place, f"{who}: {around(text, broken)}")
    if placeholder := PLACEHOLDER.search(text):
        found.add("placeholder", place, f"{who}: {around(text, placeholder)}")


def _check_order(messages: list[Message], place: Place, found: Findings) -> None:
    for one, other in pairwise(messages):
        if one["role"] == other["role"] and one["role"] != "tool":
            found.add("repeated-role", place, f"two {one['role']} turns: {one['content']!r}, {other['content']!r}")


def around(text: str, match: re.Match[str]) -> str:
    """The match with some text on both sides."""
    return text[max(0, match.start() - 40) : match.end() + 40]
