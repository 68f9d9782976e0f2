"""Estimate the size of a call's result in a chat template before the call: characters, and items by their memory.

Filters and string methods can turn little input into much output: a width, a replacement, a join. Left out: text that a
template writes piece by piece, which is counted as it comes (``chat_template.py``). Torch-free.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from align.models.template_budget import TemplateOutOfBounds

ITEM, PART = 16, 64
"""Size of a list item, which refers to a value, and of a part of a split text, which is a new value."""
LARGEST_NUMBER = 1_000_000
"""Limit of a width or count that is passed to a function of the template language."""
WIDENING = frozenset(
    {
        *("batch", "center", "expandtabs", "indent", "ljust", "rjust", "round", "slice"),
        *("to_bytes", "truncate", "wordwrap", "zfill"),
    }
)
"""Filters and methods whose result can be as long as a number among their arguments."""
PERCENT = re.compile(r"%(?:\([^)]*\))?[#0\- +]*(?:\*|\d{7,}|\d*\.(?:\*|\d{7,}))")
BRACES = re.compile(r"\{[^{}]*:[^{}]*(?:\d{7,}|\{)")
"""Format specifiers whose width or precision has over six digits or comes from the arguments."""
Text = str | bytes


def growth(name: str, values: Sequence[Any], keywords: Mapping[str, Any], *, is_method: bool) -> int:
    """Estimate the size of the result of the filter or method ``name`` on ``values``; the first is its subject.

    0 where a result is no larger than the input. Raises ``TemplateOutOfBounds`` for a huge width.
    """
    subject, arguments = values[0], [*values[1:], *keywords.values()]
    numbers = [value for value in arguments if isinstance(value, int)]
    if name in WIDENING and any(abs(number) > LARGEST_NUMBER for number in numbers):
        raise TemplateOutOfBounds(f"passes {name} the number {max(numbers, key=abs)}")
    if name == "join":
        argument = arguments[0] if arguments else ""
        # The method is called on the separator, the filter on the items.
        return _joined(subject, argument) if is_method else _joined(argument, subject)
    # Every occurrence can grow to the length of the replacement.
    if name == "replace":
        return _replaced(subject, arguments)
    # Each line or blank can become as long as the width, or as the indentation itself.
    if name in ("indent", "expandtabs", "wordwrap"):
        lines = 1 + sum(_count(subject, mark) for mark in ("\n", "\t", " "))
        return lines * max([8, *map(abs, numbers), *map(size_of, arguments)])
    # Every part is a new text.
    if name in ("split", "rsplit", "splitlines"):
        mark = next((value for value in arguments if isinstance(value, Text) and value), None)
        marks = [mark] if mark is not None else [" ", "\n", "\t", "\r"]
        return PART * (1 + sum(_count(subject, mark) for mark in marks))
    if name in ("list", "sort", "reverse", "unique", "dictsort"):
        return ITEM * size_of(subject)
    if name == "sum":
        return ITEM * sum(size_of(item) for item in subject if not isinstance(item, int)) if _is_listed(subject) else 0
    if name == "translate":
        return size_of(subject) * max((size_of(item) for value in arguments for item in _items(value)), default=0)
    if name in ("format", "format_map"):
        return formatted(subject, arguments, PERCENT if not is_method else BRACES)
    return 0


def formatted(text: Any, arguments: Sequence[Any], pattern: re.Pattern[str] = PERCENT) -> int:
    """Estimate the size of a filled-in format. Raises ``TemplateOutOfBounds`` for a huge or dynamic width."""
    shown = text if isinstance(text, str) else str(text)
    if pattern.search(shown):
        raise TemplateOutOfBounds("formats with a width that is huge or not written out")
    places = shown.count("%") + shown.count("{")
    return len(shown) + places * max((size_of(item) for value in arguments for item in _items(value)), default=0)


def repeated(left: Any, right: Any) -> int:
    """Return the size of ``left * right`` where one of them is a text or a list."""
    for value, times in ((left, right), (right, left)):
        if isinstance(value, Text | list | tuple) and isinstance(times, int):
            return weight(value) * max(0, times)
    return 0


def weight(value: Any) -> int:
    """Return the size of a new value: characters of a text, items of a collection by their memory."""
    if isinstance(value, Text):
        return len(value)
    return ITEM * len(value) if isinstance(value, list | tuple | dict | set) else 0


def _joined(separator: Any, items: Any) -> int:
    between = size_of(separator) if isinstance(separator, Text) else 0
    if isinstance(items, Text):
        return len(items) * (1 + between)
    return sum(between + size_of(item) for item in _items(items))


def _replaced(subject: Any, arguments: Sequence[Any]) -> int:
    texts = [value for value in arguments if isinstance(value, Text)]
    return _count(subject, texts[0]) * size_of(texts[1]) if len(texts) > 1 else 0


def _count(text: Any, mark: Any) -> int:
    """Count ``mark`` in ``text``; 0 where they are not texts of one type."""
    if isinstance(text, bytes) and isinstance(mark, str):
        mark = mark.encode()
    if isinstance(text, str) and isinstance(mark, str):
        return text.count(mark)
    return text.count(mark) if isinstance(text, bytes) and isinstance(mark, bytes) else 0


def _is_listed(value: Any) -> bool:
    return isinstance(value, list | tuple | set)


def _items(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    return list(value) if _is_listed(value) else [value]


def size_of(value: Any) -> int:
    """Return the length of a value; 1 for one without a length."""
    return len(value) if hasattr(value, "__len__") else 1
