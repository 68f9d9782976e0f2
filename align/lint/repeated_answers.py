"""Checks on answers between rows: several for one prompt, the same in most rows, or on both sides of the split."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from align.data.rows import Row, normalized, prompt_key
from align.lint.findings import Findings, Place

PlacedRow = tuple[Place, Row]
FEWEST, MOST = 50, 0.5
"""From ``FEWEST`` rows on, an answer in more than this share of them is reported."""
LONG_ANSWER = 12
"""Words from which an answer that stands in two rows with different prompts is no coincidence."""


def check_repeated_answers(rows: Sequence[PlacedRow], found: Findings) -> None:
    """Check the answers of one split against each other."""
    answers: Counter[str] = Counter()
    by_prompt: dict[str, dict[str, Place]] = defaultdict(dict)
    preferences: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for place, row in rows:
        prompt = prompt_key(row)
        if row.get("chosen") and row.get("rejected"):
            _check_contradiction(place, row, preferences[prompt], found)
            continue
        answer = _last_text(row, "completion") or _last_text(row, "chosen")
        if not answer or row.get("label") is not None:
            continue
        answers[answer] += 1
        seen = by_prompt[prompt]
        if answer not in seen and seen:
            found.add("prompt-with-several-answers", place, f"answered otherwise in {next(iter(seen.values()))}")
        seen.setdefault(answer, place)
    total = answers.total()
    if total >= FEWEST:
        answer, count = answers.most_common(1)[0]
        if count > MOST * total:
            found.add("one-answer-for-all", None, f"{count} of {total} answers are {answer!r}")


def _check_contradiction(place: Place, row: Row, preferences: set[tuple[str, str]], found: Findings) -> None:
    """Check that no other pair of the prompt has the same sides the other way round."""
    chosen, rejected = _last_text(row, "chosen"), _last_text(row, "rejected")
    if chosen != rejected and (rejected, chosen) in preferences:
        found.add("pairs-contradict", place, f"another pair prefers {rejected!r} to {chosen!r}")
    preferences.add((chosen, rejected))


def check_leaked_answers(train: Sequence[PlacedRow], test: Sequence[PlacedRow], found: Findings) -> None:
    """Look for long answers of ``test`` that a row of ``train`` with another prompt has too."""
    known: dict[str, tuple[Place, str]] = {}
    for place, row in train:
        for answer in _long_answers(row):
            known.setdefault(answer, (place, prompt_key(row)))
    for place, row in test:
        for answer in _long_answers(row):
            source = known.get(answer)
            if source is not None and source[1] != prompt_key(row):
                found.add("leaked-answer", place, f"also {source[0]}: {answer}")


def _long_answers(row: Row) -> Iterator[str]:
    """Answers that a stage learns to give, of ``LONG_ANSWER`` words or more."""
    for name in ("completion", "chosen"):
        text = _last_text(row, name)
        if len(text.split()) >= LONG_ANSWER:
            yield text


def _last_text(row: Row, name: str) -> str:
    messages = row.get(name) or []
    return normalized(messages[-1]["content"] or "") if messages else ""
