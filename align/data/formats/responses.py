"""Formats with several answers to a prompt, scored or ranked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from align.config.recipe.format_options import ReadingOptions
from align.data.formats.fields import PROMPTS, RESPONSES, Malformed, Unusable, first
from align.data.formats.instructions import question
from align.data.formats.messages import is_number, parse_json, text, tools
from align.data.formats.preferences import parse_number
from align.data.formats.tracked_record import TrackedRecord
from align.data.rows import Dropped, Message, Row

CONTENTS = ("content", "text", "response", "completion", "answer", "output", "generated_text")
SCORES = ("score", "rating", "reward", "pm_score", "fine-grained_score", "overall_score")
RANKS = ("rank", "ranking")

TOP_SCORE, BOTTOM_SCORE = 10.0, 1.0
MIDDLE_RATING = 3.0
"""Middle of ratings from 1 to 5."""


def answers(record: dict[str, Any]) -> tuple[list[dict[str, Any]], str]:
    """Return the answers, each with its text as ``content`` beside its other fields, and the name of their field."""
    name = first(record, RESPONSES)
    assert name is not None
    items = parse_json(record[name], name)
    if not isinstance(items, list):
        raise Malformed(f"'{name}' holds {type(items).__name__}, expected a list of answers")
    normalized = []
    for item in items:
        if isinstance(item, str) or is_number(item):
            normalized.append({"content": text(item, name)})
            continue
        if isinstance(item, list) and item and isinstance(item[-1], dict):
            item = item[-1]  # a conversation, whose last message is the answer
        key = first(item, CONTENTS) if isinstance(item, dict) else None
        if key is None:
            raise Malformed(f"'{name}' has an answer without its text ({', '.join(CONTENTS)})")
        content = {"content": text(item[key], f"{name}.{key}")}
        normalized.append(item.with_fields(content) if isinstance(item, TrackedRecord) else {**item, **content})
    return normalized, name


def shared_prompt(record: dict[str, Any], options: ReadingOptions) -> list[Message]:
    """Return the prompt of all answers."""
    name = first(record, PROMPTS)
    assert name is not None
    return question(record, name, options)


def list_beside_answers(record: dict[str, Any], names: Sequence[str], count: int) -> list[Any] | None:
    """Return the list with a value for each answer; None where the record has none."""
    name = first(record, names)
    values = parse_json(record[name], name) if name else None
    if values is not None and (not isinstance(values, list) or len(values) != count):
        raise Malformed(f"'{name}' does not have one value for each of the {count} answers")
    return values


def score_of(answer: dict[str, Any], field: str) -> float | None:
    """Return an answer's score: that of a field (``a.b`` is field b of a), or by ``auto``; None without a score."""
    if field == "auto":
        mean = mean_rating(answer)
        if mean is not None:
            return mean
        name = first(answer, SCORES)
        return parse_number(answer[name]) if name else None
    value: Any = answer
    for part in field.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    # UltraFeedback writes missing ratings as N/A.
    score = None if value == "N/A" else parse_number(value)
    mean = mean_rating(answer)
    if field == "overall_score" and score == TOP_SCORE and mean is not None and mean < MIDDLE_RATING:
        # UltraFeedback has about two thousand scores of 1 written as 10: those with low ratings.
        return BOTTOM_SCORE
    return score


def mean_rating(answer: dict[str, Any]) -> float | None:
    """Return the mean of UltraFeedback's ratings per aspect (helpfulness and so on), from 1 to 5; None without any."""
    annotations = answer.get("annotations")
    ratings = [
        parse_number(aspect["Rating"])
        for aspect in (annotations.values() if isinstance(annotations, dict) else [])
        if isinstance(aspect, dict) and str(aspect.get("Rating", "N/A")) not in ("N/A", "None", "")
    ]
    known = [rating for rating in ratings if rating is not None]
    return sum(known) / len(known) if known else None


def from_scored(record: dict[str, Any], options: ReadingOptions, kind: str) -> list[Row | Dropped]:
    """Convert answers with scores, in each answer or in a list beside them."""
    items, name = answers(record)
    values = list_beside_answers(record, ("scores", "ratings", "rewards"), len(items))
    if values is None:
        scores = [score_of(answer, options.score) for answer in items]
    else:
        scores = [parse_number(value) for value in values]
    if items and all(score is None for score in scores):
        fields = sorted({key for answer in items for key in answer if key != "content"})
        raise Malformed(
            f"no answer in '{name}' has a score ({options.score}); they have {', '.join(fields) or 'their text alone'}."
            " options.score names the field"
        )
    responses = [_response(answer, score, None) for answer, score in zip(items, scores, strict=True)]
    return [{"prompt": shared_prompt(record, options), "responses": responses, "tools": tools(record)}]


def from_ranked(record: dict[str, Any], options: ReadingOptions, kind: str) -> list[Row | Dropped]:
    """Convert answers with ranks, in each answer or in a list beside them; the smallest is the best.

    Answers without any ranks count as sorted, the best first.
    """
    items, name = answers(record)
    values = list_beside_answers(record, ("ranks", "ranking"), len(items))
    if values is None:
        # Ranks in the answers, else their order: lists of answers are often sorted from the best down.
        rank_names = [first(answer, RANKS) for answer in items]
        values = [None if key is None else answer[key] for answer, key in zip(items, rank_names, strict=True)]
        if all(value is None for value in values):
            values = list(range(len(items)))
    ranks = [parse_number(value, "rank") for value in values]
    if any(rank is None for rank in ranks):
        raise Malformed(f"some answers in '{name}' have a rank and some have none")
    responses = [_response(answer, None, rank) for answer, rank in zip(items, dense_ranks(ranks), strict=True)]
    return [{"prompt": shared_prompt(record, options), "responses": responses, "tools": tools(record)}]


def dense_ranks(ranks: Sequence[float | None]) -> list[int]:
    """Return ranks as 0, 1, 2 without gaps; ties stay ties."""
    order = sorted({rank for rank in ranks if rank is not None})
    if not order:
        raise Unusable("no answers")
    return [order.index(rank) for rank in ranks if rank is not None]


def _response(answer: dict[str, Any], score: float | None, rank: int | None) -> dict[str, Any]:
    response = {"content": answer["content"], "score": score, "rank": rank}
    if isinstance(answer.get("model"), str):
        response["model"] = answer["model"]
    return response
