"""Values of a record's columns and templates, with the name of the setting in every error."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from align.config.recipe.record_mapping import ColumnValue, Constant, LabelWords, Mean, Plain, ValueWords
from align.config.recipe.templates import MissingValue, parse_column, parse_template
from align.data.formats.fields import Malformed
from align.data.formats.messages import parse_json


def column_value(name: str, value: ColumnValue, record: Mapping[str, Any]) -> Any:
    """Return the value that ``columns`` gives a field: a list for a list of columns, without empty ones at its end."""
    if isinstance(value, Constant):
        return value.constant
    if isinstance(value, LabelWords):
        return _label(name, value, record)
    if isinstance(value, ValueWords):
        return _in_words(name, value, record)
    if isinstance(value, Mean):
        return mean_value(name, value, record)
    if isinstance(value, str):
        return filled(name, value, record)
    items = [filled(name, text, record) for text in value]
    # Rows with fewer choices leave the last columns empty.
    while items and items[-1] in (None, ""):
        items.pop()
    return items


def _label(name: str, words: LabelWords, record: Mapping[str, Any]) -> bool | None:
    """Return the truth value that a word stands for; None if the record has none."""
    value = filled(name, words.column, record)
    if value is None:
        return None
    good, bad = (_words(side) for side in (words.good, words.bad))
    word = _word(value)
    if word not in good | bad:
        known_words = ", ".join(sorted(good | bad))
        raise Malformed(f"'{name}' is {value!r}, expected one of {known_words}; add it to good or bad")
    return word in good


def _in_words(name: str, value: ValueWords, record: Mapping[str, Any]) -> str | None:
    """Return the words that a value stands for; None if the record has none."""
    original = filled(name, value.column, record)
    if original is None:
        return None
    words = {_word(known_value): text for known_value, text in value.words.items()}
    if _word(original) not in words:
        raise Malformed(f"'{name}' is {original!r}, expected one of {', '.join(words)}; add it to words")
    return words[_word(original)]


def _words(side: Plain | list[Plain]) -> set[str]:
    return {_word(value) for value in (side if isinstance(side, list) else [side])}


def _word(value: Any) -> str:
    """Return a label as it is compared: in lower case, a whole number without its point."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip().lower()


def mean_value(name: str, value: Mean, record: Mapping[str, Any]) -> float | list[float | None] | None:
    """Return the mean of the list in a column, or of each list in it; None for an empty or absent list.

    Empty entries (null, "" and NaN) do not count. Raises ``Malformed`` for anything but numbers.
    """
    items = parse_json(filled(name, value.mean, record), value.mean)
    if items is None:
        return None
    if not isinstance(items, list):
        raise Malformed(f"'{value.mean}' holds {type(items).__name__}, expected a list of numbers")
    if items and all(isinstance(item, list) for item in items):
        return [_mean(item, value.mean) for item in items]
    return _mean(items, value.mean)


def _mean(items: list[Any], column: str) -> float | None:
    numbers = []
    for item in items:
        if item in (None, "") or (isinstance(item, float) and math.isnan(item)):
            continue
        number = label_number(item)
        if number is None:
            raise Malformed(f"'{column}' has {item!r} in its list, expected numbers")
        numbers.append(number)
    return math.fsum(numbers) / len(numbers) if numbers else None


def filled(name: str, text: str, record: Mapping[str, Any]) -> Any:
    """Return the value of a column or template for the setting ``name``; None where the column has none.

    Raises ``Malformed`` for a template that the record cannot fill.
    """
    try:
        return parse_column(text).value(record)
    except MissingValue as error:
        raise Malformed(f"'{name}' cannot be filled: {error}") from None


def filled_text(name: str, text: str, record: Mapping[str, Any]) -> str:
    """Return a text that may quote columns. Raises ``Malformed`` where the record cannot fill it."""
    try:
        return parse_template(text).render(record)
    except MissingValue as error:
        raise Malformed(f"'{name}' cannot be filled: {error}") from None


def label_number(value: Any) -> float | None:
    """Return a label as a finite number; None for another one."""
    if isinstance(value, bool):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None
