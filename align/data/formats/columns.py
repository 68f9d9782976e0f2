"""Columns of a record: values in templates, columns that stay with the rows, and labels that compare two answers."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from align.config.recipe.record_mapping import (
    ROW_FIELDS,
    ColumnValue,
    ComparedColumns,
    Constant,
    LabelWords,
    Mean,
    Plain,
    RecordMapping,
    ValueWords,
    describe_taken_name,
)
from align.config.recipe.templates import MissingValue, parse_column, parse_template
from align.data.formats.fields import Malformed, Unusable
from align.data.formats.messages import parse_json
from align.errors import UserError


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
    """Return the value of a column or template for the setting ``name``; None if the column has none.

    Raises ``Malformed`` for a template that the record cannot fill.
    """
    try:
        return parse_column(text).value(record)
    except MissingValue as error:
        raise Malformed(f"'{name}' cannot be filled: {error}") from None


def filled_text(name: str, text: str, record: Mapping[str, Any]) -> str:
    """Return a text that may quote columns. Raises ``Malformed`` if the record cannot fill it."""
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


def kept_fields(record: Mapping[str, Any], mapping: RecordMapping, read: Iterable[str]) -> dict[str, Any]:
    """Return the columns that stay with the row, as JSON has them; an absent column is omitted.

    ``read`` are the fields that the format reads itself, which ``keep: all`` leaves out. Raises ``Malformed`` for a
    value that is no text, number, list or mapping; ``UserError`` if ``all`` includes a column with a reserved name.
    """
    fields: dict[str, Any] = {}
    if mapping.keep == "all":
        texts = [value for value in mapping.columns.values() if isinstance(value, str)]
        if mapping.better is not None:
            texts += [mapping.better.a, mapping.better.b]
        # A column that became a field as it is need not be there twice; a column that a template quotes stays.
        copied = {*read, *texts}
        names = [name for name in record if name not in copied]
        for name in names:
            if _is_reserved(name):
                raise UserError(_describe_collision(name, names))
        columns = {name: name for name in names}
    else:
        columns = mapping.kept_columns()
    for name, text in columns.items():
        value = record.get(text) if text in record else filled(name, text, record)
        if value is not None:
            fields[name] = _plain(value, name)
    return fields


def kept_sources(mapping: RecordMapping) -> set[str]:
    """Return the columns of the record that ``keep`` names."""
    templates = [parse_column(text) for text in mapping.kept_columns().values()]
    return {reference.column for template in templates for reference in template.references}


def read_checks(record: dict[str, Any]) -> str:
    """Return the record's ``checks`` for a program that checks answers, as JSON text; ``""`` if it has none.

    A field of that name that is no JSON object means something else, and stays unread.
    """
    # The method of dict does not mark the field as read, since the field may mean something else.
    value = dict.get(record, "checks")
    if isinstance(value, str):
        try:
            parsed = json.loads(value)
        except (ValueError, RecursionError):
            return ""
    else:
        parsed = value
    if not isinstance(parsed, dict) or not parsed:
        return ""
    # This access marks the field as read.
    record["checks"]
    return value if isinstance(value, str) else json.dumps(_plain(parsed, "checks"), ensure_ascii=False)


def _is_reserved(name: str) -> bool:
    return name in ROW_FIELDS or name.startswith("_")


def _describe_collision(name: str, names: Sequence[str]) -> str:
    free = [column for column in names if not _is_reserved(column)]
    listed = ", ".join(f"{column}: {column}" for column in free[:20])
    renamed = f"record_{name.lstrip('_')}: {name}"
    return (
        f"keep: all would keep a column '{name}'; {describe_taken_name(name).partition('. ')[0].partition(' ')[2]}. "
        f"Write the columns, and rename this one: keep: {{{', '.join(filter(None, (listed, renamed)))}}}"
    )


def _plain(value: Any, name: str) -> Any:
    """Return a value of JSON: dates become text, numbers of other libraries become Python's."""
    if isinstance(value, bool) or value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item, name) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, name) for item in value]
    if isinstance(value, (bytes, bytearray)):
        raise Malformed(f"keep: '{name}' holds {type(value).__name__}; text, numbers, lists and mappings can be kept")
    if hasattr(value, "isoformat"):
        return str(value.isoformat())
    number = label_number(value)
    if number is None:
        raise Malformed(f"keep: '{name}' holds {type(value).__name__}; text, numbers, lists and mappings can be kept")
    return number


MOST_LABELS = 8
"""Labels that an error shows."""

A_WORDS = frozenset({"a", "model_a", "response_a", "answer_a", "output_a", "assistant_a", "first", "left"})
B_WORDS = frozenset({"b", "model_b", "response_b", "answer_b", "output_b", "assistant_b", "second", "right"})
TIE_WORDS = frozenset(
    {"tie", "tie (bothbad)", "bothbad", "both bad", "both_bad", "both", "neither", "equal", "draw", "same"}
)


@dataclass(frozen=True)
class LabelRule:
    """The meaning of a label: ``signed`` numbers, or the labels of each side in lower case."""

    a: frozenset[str] = frozenset()
    b: frozenset[str] = frozenset()
    ties: frozenset[str] = TIE_WORDS
    is_signed: bool = False
    """True if a number below 0 prefers ``a``, one above 0 ``b``, and 0 is a tie."""


def label_text(value: Any) -> str:
    """Return a label as rules compare it: lower case, whole numbers without a fraction."""
    if isinstance(value, bool):
        return str(value).lower()
    text = str(value).strip().lower()
    number = label_number(value)
    # Tables write 1 as 1.0, and CSV as "1".
    return str(int(number)) if number is not None and number == int(number) else text


def label_rule(better: ComparedColumns, records: Sequence[Mapping[str, Any]], place: str) -> LabelRule:
    """Return the meaning of a source's labels: as its settings say, else as its first records show.

    Raises ``UserError`` for numbers that mean different things in different data, such as 0 and 1.
    """
    if better.a_is is not None and better.b_is is not None:
        sides = [_label_set(better.a_is), _label_set(better.b_is)]
        return LabelRule(sides[0], sides[1], (TIE_WORDS | {"0"}) - sides[0] - sides[1])
    template = parse_column(better.label)
    values = [value for record in records if (value := template.value(record)) not in (None, "")]
    numbers = [number for value in values if (number := label_number(value)) is not None]
    a_words = A_WORDS | {better.a.lower()}
    b_words = B_WORDS | {better.b.lower()}
    if not numbers:
        return LabelRule(a_words, b_words)
    # From here on the labels are numbers, whose meaning differs from dataset to dataset.
    if min(numbers) < 0:
        return LabelRule(is_signed=True)
    labels = {label_text(number) for number in numbers}
    digits = _final_digits(better)
    # ``response_0`` and ``response_1`` say which number is which.
    if digits is not None and labels <= {*digits, "0"}:
        return LabelRule(a_words | {digits[0]}, b_words | {digits[1]}, (TIE_WORDS | {"0"}) - set(digits))
    if labels <= {"0", "1", "2"} and "2" in labels:
        return LabelRule(a_words | {"1"}, b_words | {"2"}, TIE_WORDS | {"0"})
    shown = ", ".join(sorted(labels)[:MOST_LABELS])
    raise UserError(
        f"{place}: better.label holds {shown}, which name the first answer in some data and the second in other. Say "
        "it: better: {a_is: 1, b_is: 0}."
    )


def _final_digits(better: ComparedColumns) -> tuple[str, str] | None:
    a = better.a[-1]
    b = better.b[-1]
    return (a, b) if a.isdigit() and b.isdigit() and a != b else None


def _label_set(value: Any) -> frozenset[str]:
    values = value if isinstance(value, list) else [value]
    return frozenset(label_text(item) for item in values)


def better_and_worse(better: ComparedColumns, record: Mapping[str, Any], rule: LabelRule) -> dict[str, Any]:
    """Return ``chosen`` and ``rejected`` of a record. Raises ``Unusable`` for a tie, or a record without a label."""
    label = filled("better.label", better.label, record)
    a, b = (filled(f"better.{side}", getattr(better, side), record) for side in ("a", "b"))
    if label in (None, ""):
        raise Unusable("no label of the better answer")
    side = _better_side(label, rule)
    if side == "tie":
        if better.tie == "stop":
            raise Malformed(f"'{better.label}' is {label!r}, a tie; better: {{tie: drop}} leaves ties out")
        raise Unusable("tie")
    return {"chosen": a, "rejected": b} if side == "a" else {"chosen": b, "rejected": a}


def _better_side(label: Any, rule: LabelRule) -> str:
    number = label_number(label)
    if rule.is_signed and number is not None:
        if number == 0:
            return "tie"
        return "a" if number < 0 else "b"
    word = label_text(label)
    for side, words in (("a", rule.a), ("b", rule.b), ("tie", rule.ties)):
        if word in words:
            return side
    raise Malformed(
        f"the label of the better answer is {label!r}, which names neither; say which labels do with better: "
        "{a_is: ..., b_is: ...}"
    )
