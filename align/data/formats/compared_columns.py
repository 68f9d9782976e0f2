"""Pairs from two columns and a label that says which of them is better, in the spellings that datasets have.

LLMBar and PandaLM write 1 and 2, Arena ``model_a``, HelpSteer3 signed numbers, PKU-SafeRLHF the number in the column's
name. SHP writes 1 for the first answer and 0 for the second, others the reverse: such a label needs ``a_is``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from align.config.recipe.record_mapping import ComparedColumns
from align.config.recipe.templates import parse_column
from align.data.formats.column_values import filled, label_number
from align.data.formats.fields import Malformed, Unusable
from align.errors import UserError

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
    """True where a number below 0 prefers ``a``, one above 0 ``b``, and 0 is a tie."""

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        sides = {"a": sorted(self.a), "b": sorted(self.b), "ties": sorted(self.ties)}
        return {**sides, "is_signed": self.is_signed}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> LabelRule:
        """Return the rule that ``to_json`` wrote."""
        a, b, ties = (frozenset(values[name]) for name in ("a", "b", "ties"))
        return cls(a, b, ties, values["is_signed"])


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
    a_words, b_words = A_WORDS | {better.a.lower()}, B_WORDS | {better.b.lower()}
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
    a, b = better.a[-1], better.b[-1]
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
