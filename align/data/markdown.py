"""Markdown of cards that hold other people's text: tables, plain text, code blocks that no text leaves. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from align.errors import printable


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], numbers: Iterable[int] = ()) -> list[str]:
    """A Markdown table; cells are plain text, whatever they contain."""
    right = set(numbers)
    rule = ["---:" if index in right else "---" for index in range(len(head))]
    lines = [f"| {' | '.join(head)} |", f"| {' | '.join(rule)} |"]
    lines += [f"| {' | '.join(_cell(str(cell)) for cell in row)} |" for row in rows]
    return lines


def _cell(text: str) -> str:
    known = text == "**not known**" or re.fullmatch(r"`[0-9a-f–]+`", text)
    return text if known else plain(text)


def plain(text: str) -> str:
    """Text that Markdown reads as text: on one line, no markup, no HTML, no links."""
    return re.sub(r"([\\`*_{}\[\]()<>#|!~&])", r"\\\1", " ".join(printable(text).split()))


def fenced(text: str, language: str) -> list[str]:
    """A code block whose fence is longer than any in the text."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"{fence}{language}", text.rstrip("\n"), fence]
