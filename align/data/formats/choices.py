"""Tables of multiple choice: a question, its choices, and the right one by letter, number, text or truth value.

A list of choices may be in several columns: ``A`` to ``D``, ``choice0`` to ``choice3``. The prompt lists the choices
with letters; an answer is a letter with its choice. Comparisons have the right answer
against each wrong one, from which the step ``pairs`` selects. Evaluation tasks read choices with these functions too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from align.config.recipe.format_options import ReadingOptions
from align.data.formats.fields import ANSWER_KEYS, CHOICES, PROMPTS, Malformed, choice_columns, first
from align.data.formats.messages import is_number, prompt, text, with_system
from align.data.rows import Dropped, Row, assistant, user

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
TRUE_WORDS, FALSE_WORDS = ("yes", "true"), ("no", "false")


@dataclass(frozen=True)
class Choices:
    """The choices of a question, with the labels that the data gives them, if it does."""

    texts: tuple[str, ...]
    labels: tuple[str, ...] = ()


def gather_choices(record: dict[str, Any], ignored: Collection[str] = ()) -> dict[str, Any]:
    """Return the record with choices in several columns as one field ``choices``: ``{"0": …, "1": …}``.

    The keys are the last signs of the columns' names, which answers may name. A record without such columns, or with
    an ``ignored`` column of this kind, is returned as it is.
    """
    if first(record, CHOICES) is not None or first(record, PROMPTS) is None:
        return record
    columns = choice_columns(record)
    if len(columns) < 2 or not columns.keys().isdisjoint(ignored):
        return record
    rest = {name: value for name, value in record.items() if name not in columns}
    return {**rest, "choices": {end: record[name] for name, end in columns.items()}}


def read_choices(record: dict[str, Any], name: str) -> Choices:
    """Return the choices in the field ``name``.

    Raises ``Malformed`` for fewer than two, or more than there are letters.
    """
    choices = _parse_choices(record[name], name)
    if not 2 <= len(choices.texts) <= len(LETTERS):
        raise Malformed(f"'{name}' has {len(choices.texts)} choices, expected 2 to {len(LETTERS)}")
    return choices


def _parse_choices(value: Any, name: str) -> Choices:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise Malformed(f"'{name}' holds text, expected a list of choices (in a CSV cell: as JSON)") from None
    if isinstance(value, dict) and isinstance(value.get("text"), list):
        # ARC and CommonsenseQA: {"text": [...], "label": [...]}
        labels = [str(label) for label in value.get("label") or []]
        texts = [text(item, f"{name}.text") for item in value["text"]]
        if labels and len(labels) != len(texts):
            raise Malformed(f"'{name}' has {len(texts)} texts and {len(labels)} labels")
        return Choices(tuple(texts), tuple(labels))
    if isinstance(value, dict):
        filled = {str(label): item for label, item in value.items() if item is not None}
        return Choices(tuple(text(item, f"{name}.{label}") for label, item in filled.items()), tuple(filled))
    if not isinstance(value, list):
        raise Malformed(f"'{name}' holds {type(value).__name__}, expected a list of choices")
    if value and all(isinstance(item, dict) and "text" in item for item in value):
        texts = [text(item["text"], f"{name}.text") for item in value]
        return Choices(tuple(texts), tuple(str(item["label"]) for item in value if "label" in item))
    return Choices(tuple(text(item, name) for item in value))


def right_choice(answer: Any, choices: Choices, first_choice: int | None = None) -> int | None:
    """Return the index of the right choice; None if the answer names none.

    ``first_choice`` is the number of the first one. Without it, numbers count from 0, and digits in a text name none:
    such data count from 0 (HellaSwag) or from 1 (WinoGrande). A text comes before a letter, and the data's labels
    before a number: a choice may itself be a letter or a digit. If all labels are numbers, other numbers name none.
    """
    texts = choices.texts
    are_numbers = bool(choices.labels) and all(label.isdigit() for label in choices.labels)
    # What the recipe says about numbers comes before the names of columns.
    labels = () if are_numbers and first_choice is not None else choices.labels
    # A truth value picks the choice that says so, since the order of yes and no differs.
    if isinstance(answer, bool):
        words = TRUE_WORDS if answer else FALSE_WORDS
        places = [index for index, choice in enumerate(texts) if choice.strip().lower() in words]
        return places[0] if len(places) == 1 else None
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)
    if isinstance(answer, str):
        if texts.count(answer) == 1:
            return texts.index(answer)
        answer = answer.strip()
        # "(A)", "A." and "A)" are the letter A.
        bare = re.sub(r"^\((.+)\)$|^([A-Za-z])[.):]$", lambda match: match[1] or match[2], answer)
        if bare in labels:
            return labels.index(bare)
        if len(bare) == 1 and bare.upper() in LETTERS[: len(texts)]:
            return LETTERS.index(bare.upper())
        if first_choice is None or not re.fullmatch(r"\d{1,2}", answer):
            return None
        answer = int(answer)
    elif str(answer) in labels:
        return labels.index(str(answer))
    if not isinstance(answer, int) or (are_numbers and labels):
        return None
    index = answer - (first_choice or 0)
    return index if 0 <= index < len(texts) else None


def describe_answers(answer: Any, choices: Choices, first_choice: int | None) -> str:
    """Return the ways in which a record may name its right choice, and the setting for an answer that is a number."""
    last, first = len(choices.texts) - 1, first_choice or 0
    ways = (
        f"the number of a choice from {first} to {first + last}, a letter from A to {LETTERS[last]}, or the text of "
        "one of the choices"
    )
    if first_choice is None and str(answer).strip().isdigit():
        return f"{ways}. Where numbers count from 1, or are written as text, say so: first_choice: 1 (or 0)"
    return ways


def from_multiple_choice(record: dict[str, Any], options: ReadingOptions, kind: str) -> list[Row | Dropped]:
    """Convert a question with choices: to its prompt, to the right answer, or to all answers with scores 1 and 0."""
    question_name, choices_name = first(record, PROMPTS), first(record, CHOICES)
    key = first(record, ANSWER_KEYS)
    assert question_name is not None and choices_name is not None and key is not None
    choices = read_choices(record, choices_name)
    index = right_choice(record[key], choices, options.first_choice)
    if index is None:
        expected = describe_answers(record[key], choices, options.first_choice)
        raise Malformed(f"'{key}' is {record[key]!r}, expected {expected}")
    replies = [_reply(LETTERS[place], choice, options.choice_reply) for place, choice in enumerate(choices.texts)]
    checks = {"answer": LETTERS[index], "text": choices.texts[index]}
    return [
        {
            "prompt": with_system(record, _prompt(record, question_name, choices, options)),
            "completion": [assistant(replies[index])],
            "responses": [
                {"content": reply, "score": float(place == index), "rank": None} for place, reply in enumerate(replies)
            ],
            "checks": json.dumps(checks, ensure_ascii=False),
        }
    ]


def _reply(letter: str, choice: str, form: str) -> str:
    return {"both": f"{letter}. {choice}", "letter": letter, "text": choice}[form]


def _prompt(record: dict[str, Any], name: str, choices: Choices, options: ReadingOptions) -> list[dict[str, Any]]:
    """Return the question, behind its context, with a line for each choice."""
    turns = prompt(record[name], name, options)
    if not turns or turns[-1]["role"] != "user":
        raise Malformed(f"'{name}' is a conversation whose last turn is not the user's")
    lines = "\n".join(f"{LETTERS[place]}. {choice}" for place, choice in enumerate(choices.texts))
    context = text(record.get("context") or "", "context")
    question = turns[-1]["content"].strip()
    parts = [context.strip(), question, lines] if context.strip() else [question, lines]
    return [*turns[:-1], user("\n\n".join(parts))]


def is_multiple_choice(record: dict[str, Any]) -> bool:
    """Return True for a record with a question, at least two choices, and an answer that names one of them."""
    question_name, choices_name = first(record, PROMPTS), first(record, CHOICES)
    key = first(record, ANSWER_KEYS)
    if question_name is None or choices_name is None or key is None or not _is_text(record[question_name]):
        return False
    try:
        choices = read_choices(record, choices_name)
    except Malformed:
        return False
    return any(right_choice(record[key], choices, number) is not None for number in (0, 1))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) or is_number(value)
