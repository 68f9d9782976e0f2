"""Markdown for cards that quote foreign text: tables, escaped text, code blocks that no text can close. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from align.errors import printable


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], numbers: Iterable[int] = ()) -> list[str]:
    """Return the lines of a Markdown table with escaped cells; columns in ``numbers`` are aligned to the right."""
    right = set(numbers)
    rule = ["---:" if index in right else "---" for index in range(len(head))]
    lines = [f"| {' | '.join(head)} |", f"| {' | '.join(rule)} |"]
    lines += [f"| {' | '.join(_cell(str(cell)) for cell in row)} |" for row in rows]
    return lines


def _cell(text: str) -> str:
    is_markup = text == "**not known**" or re.fullmatch(r"`[0-9a-f–]+`", text)
    return text if is_markup else plain(text)


def plain(text: str) -> str:
    """Return a text escaped for Markdown: one line, no markup, no HTML, no links."""
    return re.sub(r"([\\`*_{}\[\]()<>#|!~&])", r"\\\1", " ".join(printable(text).split()))


def fenced(text: str, language: str) -> list[str]:
    """Return the lines of a code block whose fence is longer than any in the text."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"{fence}{language}", text.rstrip("\n"), fence]
