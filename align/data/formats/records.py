"""Records with a special format: align's rows, Open Assistant's trees, solutions with labeled steps."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from align.config.recipe.format_options import ReadingOptions
from align.data.formats.answers import dense_ranks, parse_label, question
from align.data.formats.fields import PROMPTS, STEP_LABELS, STEPS, Malformed, first
from align.data.formats.messages import text, tools
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
PROMPTER, ASSISTANT = "prompter", "assistant"


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
    return [child for child in children if child.get("role") == role and is_selected(child, options)]


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
    """Convert a record to one row; steps of white space alone are dropped with their labels."""
    prompt_name, steps_name, labels_name = first(record, PROMPTS), first(record, STEPS), first(record, STEP_LABELS)
    assert prompt_name is not None and steps_name is not None and labels_name is not None
    texts, labels = record[steps_name], record[labels_name]
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
