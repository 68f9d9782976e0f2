"""Formats with several answers to a prompt, scored or ranked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from align.data.formats.fields import PROMPTS, RESPONSES, Malformed, Unusable, first
from align.data.formats.instructions import question
from align.data.formats.messages import is_number, parsed, text, tools
from align.data.formats.options import FormatOptions
from align.data.formats.pairs import number
from align.data.formats.usage import Watched
from align.data.rows import Dropped, Message, Row

CONTENTS = ("content", "text", "response", "completion", "answer", "output", "generated_text")
SCORES = ("score", "rating", "reward", "pm_score", "fine-grained_score", "overall_score")
RANKS = ("rank", "ranking")

TOP, BOTTOM = 10.0, 1.0
MIDDLE = 3.0
"""Of ratings from 1 to 5."""


def answers(record: dict[str, Any]) -> tuple[list[dict[str, Any]], str]:
    """The answers, each with its text as ``content`` and the fields it came with, and the name of the field."""
    name = first(record, RESPONSES)
    assert name is not None
    items = parsed(record[name], name)
    if not isinstance(items, list):
        raise Malformed(f"'{name}' holds {type(items).__name__}, expected a list of answers")
    made = []
    for item in items:
        if isinstance(item, str) or is_number(item):
            made.append({"content": text(item, name)})
            continue
        if isinstance(item, list) and item and isinstance(item[-1], dict):
            item = item[-1]  # a conversation, whose last message is the answer
        key = first(item, CONTENTS) if isinstance(item, dict) else None
        if key is None:
            raise Malformed(f"'{name}' has an answer without its text ({', '.join(CONTENTS)})")
        content = {"content": text(item[key], f"{name}.{key}")}
        made.append(item.with_fields(content) if isinstance(item, Watched) else {**item, **content})
    return made, name


def shared_prompt(record: dict[str, Any], options: FormatOptions) -> list[Message]:
    """The prompt of all answers."""
    name = first(record, PROMPTS)
    assert name is not None
    return question(record, name, options)


def beside(record: dict[str, Any], names: Sequence[str], count: int) -> list[Any] | None:
    """A list that has something for each answer; None where the record has none."""
    name = first(record, names)
    values = parsed(record[name], name) if name else None
    if values is not None and (not isinstance(values, list) or len(values) != count):
        raise Malformed(f"'{name}' does not have one value for each of the {count} answers")
    return values


def score_of(answer: dict[str, Any], field: str) -> float | None:
    """An answer's score: of the field (dots lead inwards), or by what ``auto`` means; None where it was not scored."""
    if field == "auto":
        mean = aspects(answer)
        if mean is not None:
            return mean
        name = first(answer, SCORES)
        return number(answer[name]) if name else None
    value: Any = answer
    for part in field.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    found = None if value == "N/A" else number(value)
    mean = aspects(answer)
    if field == "overall_score" and found == TOP and mean is not None and mean < MIDDLE:
        # UltraFeedback wrote about two thousand ones as tens; a ten beside low ratings is one of them.
        return BOTTOM
    return found


def aspects(answer: dict[str, Any]) -> float | None:
    """Mean of UltraFeedback's ratings per aspect (helpfulness, honesty and so on), from 1 to 5; None without any."""
    given = answer.get("annotations")
    ratings = [
        number(aspect["Rating"])
        for aspect in (given.values() if isinstance(given, dict) else [])
        if isinstance(aspect, dict) and str(aspect.get("Rating", "N/A")) not in ("N/A", "None", "")
    ]
    known = [rating for rating in ratings if rating is not None]
    return sum(known) / len(known) if known else None


def from_scored(record: dict[str, Any], options: FormatOptions, kind: str) -> list[Row | Dropped]:
    """Answers with scores, in each or in a list beside them."""
    found, name = answers(record)
    values = beside(record, ("scores", "ratings", "rewards"), len(found))
    scores = [score_of(a, options.score) for a in found] if values is None else [number(value) for value in values]
    if found and all(score is None for score in scores):
        given = sorted({key for answer in found for key in answer if key != "content"})
        raise Malformed(
            f"no answer in '{name}' has a score ({options.score}); they have {', '.join(given) or 'their text alone'}. "
            "options.score names the field"
        )
    responses = [_response(answer, score, None) for answer, score in zip(found, scores, strict=True)]
    return [{"prompt": shared_prompt(record, options), "responses": responses, "tools": tools(record)}]


def from_ranked(record: dict[str, Any], options: FormatOptions, kind: str) -> list[Row | Dropped]:
    """Answers with ranks, the smallest the best, in each or in a list beside them; without ranks, the best first."""
    found, name = answers(record)
    values = beside(record, ("ranks", "ranking"), len(found))
    if values is None:
        values = [next((a[key] for key in RANKS if a.get(key) is not None), None) for a in found]
        if all(value is None for value in values):
            values = list(range(len(found)))
    ranks = [number(value, "rank") for value in values]
    if any(rank is None for rank in ranks):
        raise Malformed(f"some answers in '{name}' have a rank and some have none")
    responses = [_response(a, None, rank) for a, rank in zip(found, dense(ranks), strict=True)]
    return [{"prompt": shared_prompt(record, options), "responses": responses, "tools": tools(record)}]


def dense(ranks: Sequence[float | None]) -> list[int]:
    """Ranks as 0, 1, 2 without gaps, ties kept."""
    order = sorted({rank for rank in ranks if rank is not None})
    if not order:
        raise Unusable("no answers")
    return [order.index(rank) for rank in ranks if rank is not None]


def _response(answer: dict[str, Any], score: float | None, rank: int | None) -> dict[str, Any]:
    made = {"content": answer["content"], "score": score, "rank": rank}
    return made | ({"model": answer["model"]} if isinstance(answer.get("model"), str) else {})
