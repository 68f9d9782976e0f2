"""Formats with a special record: tables of multiple choice, align's rows, Open Assistant's trees, labeled steps.

A list of choices may be in several columns: ``A`` to ``D``, ``choice0`` to ``choice3``. The prompt lists the choices
with letters; an answer is a letter with its choice. Comparisons have the right answer against each wrong one, from
which the step ``pairs`` selects. Evaluation tasks also read choices with these functions.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from align.config.recipe.format_options import ReadingOptions
from align.data.formats.answers import dense_ranks, parse_label, question
from align.data.formats.fields import (
    ANSWER_KEYS,
    CHOICES,
    PROMPTS,
    STEP_LABELS,
    STEPS,
    Malformed,
    choice_columns,
    first,
    require,
)
from align.data.formats.messages import is_number, prompt, text, tools, with_system
from align.data.rows import Dropped, Message, Row, assistant, user

CONVERSATIONS = ("prompt", "completion", "chosen", "rejected")
TEXTS = ("id", "source", "checks", "tools", "text")
ROLES = ("system", "user", "assistant", "tool")


def from_rows(record: dict[str, Any], options: ReadingOptions, kind: str) -> list[Row | Dropped]:
    """Return the record as it is. Raises ``Malformed`` for fields of a row that hold something else than rows have."""
    row = {name: value for name, value in dict(record).items() if value is not None}
    for name in CONVERSATIONS:
        if isinstance(row.get(name), list):
            row[name] = [_with_calls_as_text(message) for message in row[name]]
    for name in TEXTS:
        if name in row and not isinstance(row[name], str):
            if name != "checks" or not isinstance(row[name], dict):
                raise Malformed(f"'{name}' holds {type(row[name]).__name__}, expected text")
            row["checks"] = json.dumps(row["checks"], ensure_ascii=False)
    for name in CONVERSATIONS:
        if name in row:
            _check_messages(row[name], name)
    if "responses" in row:
        _check_responses(row["responses"])
    internal = next((name for name in row if name.startswith("_")), None)
    if internal is not None:
        raise Malformed(f"'{internal}' begins with _, as align's internal fields do")
    return [row]


def _with_calls_as_text(message: Any) -> Any:
    """Return a message with its calls as JSON text; OpenAI's files have a list of them."""
    if not isinstance(message, dict) or not isinstance(message.get("tool_calls"), list):
        return message
    return message | {"tool_calls": json.dumps(message["tool_calls"], ensure_ascii=False)}


def _check_messages(value: Any, name: str) -> None:
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise Malformed(
            f"'{name}' holds {type(value).__name__}, and rows have lists of messages (role, content) there; records "
            "with texts have another format, such as prompt_completion"
        )
    for message in value:
        if message.get("role") not in ROLES or not isinstance(message.get("content"), str):
            raise Malformed(f"'{name}' has a message without a role ({', '.join(ROLES)}) or without its content")
        for field in ("tool_calls", "tool_call_id", "name"):
            if not isinstance(message.get(field, ""), str | None):
                raise Malformed(f"'{name}' has a message whose {field} holds {type(message[field]).__name__}, not text")
        if not isinstance(message.get("train"), bool | None):
            raise Malformed(f"'{name}' has a message whose train is {message['train']!r}, not true or false")


def _check_responses(value: Any) -> None:
    if not isinstance(value, list) or not all(
        isinstance(item, dict) and isinstance(item.get("content"), str) for item in value
    ):
        raise Malformed("'responses' holds something else than a list of answers, each with its text as content")


Node = dict[str, Any]
PROMPTER = "prompter"
ASSISTANT = "assistant"


def from_oasst(record: dict[str, Any], options: ReadingOptions, kind: str) -> list[Row | Dropped]:
    """Convert one tree."""
    root = record["prompt"]
    if not isinstance(root, dict) or root.get("role") != PROMPTER:
        raise Malformed("'prompt' is not the first message of a tree (text, role prompter, replies)")
    if not is_selected(root, options):
        return [Dropped("deleted, by a model, or of another language")]
    if kind in ("preferences", "unpaired"):
        return list(ranked_turns(root, [], options)) or [Dropped("no two ranked answers")]
    drafts: list[Row | Dropped] = list(best_conversations(root, [], options))
    if not drafts and kind == "prompts":
        return [{"prompt": [_turn(root)]}]
    return drafts or [Dropped("no answers")]


def is_selected(node: Node, options: ReadingOptions) -> bool:
    """Return True if the options keep a message."""
    return (
        (options.deleted or not node.get("deleted"))
        and (options.synthetic or not node.get("synthetic"))
        and (options.languages is None or node.get("lang") in options.languages)
    )


def replies(node: Node, role: str, options: ReadingOptions) -> list[Node]:
    """Return the selected messages of ``role`` directly below a message."""
    children = node.get("replies") or []
    if not isinstance(children, list) or not all(isinstance(child, dict) for child in children):
        raise Malformed("'replies' is not a list of messages")
    turns = [child for child in children if child.get("role") == role]
    return [turn for turn in turns if is_selected(turn, options)]


def _turn(node: Node) -> Message:
    return (user if node["role"] == PROMPTER else assistant)(text(node.get("text"), "text"))


def ranked_turns(node: Node, before: list[Message], options: ReadingOptions) -> Iterator[Row | Dropped]:
    """Yield one draft for each turn from ``node`` downwards that has two ranked answers or more."""
    prompt = [*before, _turn(node)]
    answers = replies(node, ASSISTANT, options)
    ranked = [answer for answer in answers if answer.get("rank") is not None]
    if len(ranked) > 1:
        ranks = dense_ranks([float(answer["rank"]) for answer in ranked])
        order = sorted(range(len(ranked)), key=ranks.__getitem__)
        responses = [
            {"content": _turn(ranked[index])["content"], "score": None, "rank": ranks[index]} for index in order
        ]
        yield {"prompt": prompt, "responses": responses}
    # Ranked answers existed, but the options or deletions left fewer than two.
    elif sum(reply.get("rank") is not None for reply in node.get("replies") or []) > 1:
        yield Dropped("ranked answers deleted, by a model, or of another language")
    for answer in answers:
        for turn in replies(answer, PROMPTER, options):
            yield from ranked_turns(turn, [*prompt, _turn(answer)], options)


def best_conversations(node: Node, before: list[Message], options: ReadingOptions) -> Iterator[Row]:
    """Yield conversations along the best answer to each turn; ``options.paths`` follows one continuation of it or all.

    A turn's answers without a rank come after those with one, in the order of the file.
    """
    answers = replies(node, ASSISTANT, options)
    if not answers:
        return
    prompt = [*before, _turn(node)]
    # Rank 0 is the best; ``min`` keeps the first of several unranked answers.
    chosen = min(answers, key=lambda answer: answer["rank"] if answer.get("rank") is not None else float("inf"))
    continuations = [turn for turn in replies(chosen, PROMPTER, options) if replies(turn, ASSISTANT, options)]
    if options.turns == "all" or not continuations:
        yield {"prompt": prompt, "completion": [_turn(chosen)]}
    for turn in continuations[:1] if options.paths == "best" else continuations:
        yield from best_conversations(turn, [*prompt, _turn(chosen)], options)


SEPARATOR = "\n\n"


def from_stepwise(record: dict[str, Any], options: ReadingOptions, kind: str) -> list[Row | Dropped]:
    """Convert a record to one row; steps of only white space are dropped with their labels."""
    prompt_name, steps_name, labels_name = (require(record, names) for names in (PROMPTS, STEPS, STEP_LABELS))
    texts = record[steps_name]
    labels = record[labels_name]
    if not isinstance(texts, list) or not all(isinstance(step, str) for step in texts):
        raise Malformed(f"{steps_name} is no list of texts")
    if not isinstance(labels, list) or len(labels) != len(texts):
        count = len(labels) if isinstance(labels, list) else "no list of"
        raise Malformed(f"{len(texts)} steps in {steps_name} and {count} marks in {labels_name}")
    steps = [
        {"content": step, "label": _step_label(label)}
        for step, label in zip(texts, labels, strict=True)
        if step.strip()
    ]
    if not steps:
        return [Dropped("no step")]
    return [
        {
            "prompt": question(record, prompt_name, options),
            "completion": [assistant(SEPARATOR.join(str(step["content"]) for step in steps))],
            "label": all(float(step["label"]) >= 0.5 for step in steps),
            "steps": steps,
            "tools": tools(record),
        }
    ]


def _step_label(label: Any) -> float:
    """Return a label as a number from 0 to 1: soft labels (Math-Shepherd) unchanged, PRM800K's -1 as 0."""
    if isinstance(label, (int, float)) and not isinstance(label, bool):
        if not -1 <= label <= 1:
            raise Malformed(f"a step's mark is {label!r}, expected true, false or a number from 0 to 1")
        return max(0.0, float(label))
    return float(parse_label(label))


LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
TRUE_WORDS = ("yes", "true")
FALSE_WORDS = ("no", "false")


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

    ``first_choice`` is the number of the first choice. Without it, numbers count from 0, and digits in a text name no
    choice: such data count from 0 (HellaSwag) or from 1 (WinoGrande). A text comes before a letter, and the data's
    labels before a number: a choice may itself be a letter or a digit. If all labels are numbers, other numbers name no
    choice.
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
    last = len(choices.texts) - 1
    first = first_choice or 0
    ways = (
        f"the number of a choice from {first} to {first + last}, a letter from A to {LETTERS[last]}, or the text of "
        "one of the choices"
    )
    if first_choice is None and str(answer).strip().isdigit():
        return f"{ways}. Where numbers count from 1, or are written as text, say so: first_choice: 1 (or 0)"
    return ways


def from_multiple_choice(record: dict[str, Any], options: ReadingOptions, kind: str) -> list[Row | Dropped]:
    """Convert a question with choices: to its prompt, to the right answer, or to all answers with scores 1 and 0."""
    question_name, choices_name, key = (require(record, names) for names in (PROMPTS, CHOICES, ANSWER_KEYS))
    choices = read_choices(record, choices_name)
    index = right_choice(record[key], choices, options.first_choice)
    if index is None:
        expected = describe_answers(record[key], choices, options.first_choice)
        raise Malformed(f"'{key}' is {record[key]!r}, expected {expected}")
    form = {"both": "{0}. {1}", "letter": "{0}", "text": "{1}"}[options.choice_reply]
    replies = [form.format(letter, choice) for letter, choice in zip(LETTERS, choices.texts, strict=False)]
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
    """Return True for a record with a question, at least two choices, and an answer that names a choice."""
    question_name, choices_name, key = (first(record, names) for names in (PROMPTS, CHOICES, ANSWER_KEYS))
    if question_name is None or choices_name is None or key is None:
        return False
    if not isinstance(record[question_name], str) and not is_number(record[question_name]):
        return False
    try:
        choices = read_choices(record, choices_name)
    except Malformed:
        return False
    # Data count choices from 0 or from 1, and either may be meant here.
    return any(right_choice(record[key], choices, number) is not None for number in (0, 1))
