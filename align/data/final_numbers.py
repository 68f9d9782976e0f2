r"""The final number of a worked solution, by one rule for rewards and evaluation. Torch-free.

``final_number`` is the rule: the number after the first ``####`` (GSM8K's mark, arXiv 2110.14168), else in the last
``\boxed{}`` (MATH's), else the last number of the text. Its parts serve measures that other harnesses have too.
"""

from __future__ import annotations

import re
from collections import deque
from decimal import Decimal

NUMBER = re.compile(
    r"(?P<outer>(?<![\w)])[-−])?"  # a minus sign, unless it stands between two operands
    r"(?:[$€£](?P<inner>[-−])?)?"
    r"(?:(?P<whole>\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?P<part>\.\d+)?|(?<!\d)(?P<only>\.\d+))"
)
"""A number as people write it: 1,234.50, $-5, -$5, .5; commas only between groups of three digits."""
_MARKED = re.compile(r"####[^\S\n]*" + NUMBER.pattern)
_BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")


def final_number(text: str) -> Decimal | None:
    r"""Return the number after the first ``####``, else in the last ``\boxed{}``, else the text's last number."""
    for read in (marked_number, boxed_number, last_number):
        number = read(text)
        if number is not None:
            return number
    return None


def marked_number(text: str) -> Decimal | None:
    """Return the number after the first ``####`` that has one on its line."""
    match = _MARKED.search(text)
    return None if match is None else _value(match)


def boxed_number(text: str) -> Decimal | None:
    r"""Return the last number in the last ``\boxed{}`` that has any; LaTeX's ``1{,}080`` and ``\$`` are plain there."""
    for content in reversed(_BOXED.findall(text)):
        number = last_number(content.replace("{,}", ",").replace("\\$", "$"))
        if number is not None:
            return number
    return None


def last_number(text: str) -> Decimal | None:
    """Return the last number of a text, if there is one."""
    last = deque(NUMBER.finditer(text), maxlen=1)
    return _value(last[0]) if last else None


def _value(match: re.Match[str]) -> Decimal:
    digits = match["only"] or match["whole"].replace(",", "") + (match["part"] or "")
    value = Decimal(digits)
    return -value if (match["outer"] or match["inner"]) else value
