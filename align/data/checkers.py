"""Programs that check an answer: the score ``gold`` of embedded rows, and the final number of a word problem.

``row["checks"]`` is JSON. For :func:`gold` it is ``{"constraints": [...], "guard": {...}}``; each constraint names a
``kind`` (a function below) and its arguments, or ``ifeval`` with the ``id`` and ``args`` of an if-verifiable checker
(arXiv 2311.07911). For :func:`gsm8k_answer` it is ``{"answer": "72"}``.

Not supported: if-verifiable's sentence, capital-word and language checkers, which download nltk data or are random.
"""

from __future__ import annotations

import functools
import json
import re
from collections import Counter
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from typing import Any

from align.data.final_answers import final_number
from align.data.rows import Row

VERSION = 4
"""Increased when a response gets another score than before; part of the key of every stage that scores with these."""

NEEDS_NLTK_DATA = frozenset({"length_constraints:number_sentences", "change_case:capital_word_frequency"})
NEEDS_LANGUAGE_GUESS = frozenset(
    {"language:response_language", "change_case:english_capital", "change_case:english_lowercase"}
)

_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")


def words(text: str) -> list[str]:
    """Return the words that constraints count: letters and digits, with inner apostrophes and hyphens."""
    return _WORD.findall(text)


def gold(rows: list[Row], responses: list[str]) -> list[float]:
    """Return the share of each row's constraints that its response satisfies, in [0, 1]; 0 if the guard fails.

    The guard gives constant, empty and repetitive replies no score: see :func:`passes_guard`.
    Raises ``ValueError`` for a row without constraints or of unequal lengths.
    """
    return [_score(_parse(row), response) for row, response in zip(rows, responses, strict=True)]


def gsm8k_answer(rows: list[Row], responses: list[str]) -> list[float]:
    """Return 1.0 if the response's final number equals the row's answer, else 0.0.

    The verifier ``{number: checks.answer}`` gives the same scores, and also reasons. The evaluation task ``gsm8k``
    reads answers in the same way: thoughts do not count, and a response with two answers scores 0.
    """
    scores = []
    for row, response in zip(rows, responses, strict=True):
        checks = json.loads(row["checks"]) if row["checks"] else {}
        if "answer" not in checks:
            raise ValueError(f"row {row['id']} has no answer in its checks; gsm8k_answer needs rows of format gsm8k")
        answer = final_number(str(checks["answer"]))
        scores.append(1.0 if answer is not None and answer == final_number(response) else 0.0)
    return scores


def passes_guard(guard: dict[str, Any], response: str) -> bool:
    """Return True for a response about the row's subject that is long enough to mean something.

    It needs ``min_words`` different words, at most ``max_words`` words in all, no more than ``max_share`` of them the
    same word, and words that begin with at least ``min_hits`` of the stems in ``any_of``. All but ``min_words`` are
    optional.
    """
    # The guard makes empty, endless and one-word replies worthless, which a policy would otherwise find.
    counts = Counter(word.lower() for word in words(response))
    total = counts.total()
    if len(counts) < guard["min_words"] or total > guard.get("max_words", 10**9):
        return False
    # One word over and over: the cheapest way to satisfy counts of words.
    if counts and max(counts.values()) > max(2, guard.get("max_share", 1.0) * total):
        return False
    stems = guard.get("any_of", [])
    if not stems:
        return True
    hits = sum(any(word.startswith(stem) for word in counts) for stem in stems)
    return hits >= int(guard.get("min_hits", 1))


def satisfies(constraint: dict[str, Any], response: str) -> bool:
    """Return True for a response that satisfies a constraint. Raises ``ValueError`` for an unknown kind."""
    arguments = {name: value for name, value in constraint.items() if name != "kind"}
    if constraint["kind"] == "ifeval":
        return _ifeval(arguments["id"], json.dumps(arguments["args"], sort_keys=True))(response)
    check = KINDS.get(constraint["kind"])
    if check is None:
        raise ValueError(f"unknown constraint '{constraint['kind']}'; known: ifeval, {', '.join(sorted(KINDS))}")
    return bool(check(response, **arguments))


def lowercase(response: str) -> bool:
    """Check for letters without any capital."""
    return response.islower()


def uppercase(response: str) -> bool:
    """Check for letters that are all capitals."""
    return response.isupper()


def starts_with(response: str, text: str) -> bool:
    """Check the beginning for ``text``, in any case; an opening quotation mark does not count."""
    return response.strip().lstrip('"“').lower().startswith(text.lower())


def word_count(response: str, low: int, high: int) -> bool:
    """Check for ``low`` to ``high`` words, both included."""
    return low <= len(words(response)) <= high


def sentence_count(response: str, count: int) -> bool:
    """Check for exactly ``count`` sentences: runs of ``.!?`` before space or the end, also after the last one."""
    text = response.strip().strip('"“”').strip()
    return len(re.findall(r"[.!?]+(?=[\s\"”]|$)", text)) == count and text[-1:] in set(".!?")


def question(response: str) -> bool:
    """Check for one question: the only question mark is at the end."""
    return response.strip().endswith("?") and response.count("?") == 1


def number(response: str, value: int) -> bool:
    """Check for only the number, with or without a full stop."""
    return _decimal(response.strip().rstrip(".")) == value


def one_of(response: str, answer: str) -> bool:
    """Check for only the answer, in any case, with or without a full stop or quotation marks."""
    return response.strip().strip(".\"'").strip().lower() == answer.lower()


def in_order(response: str, items: list[str]) -> bool:
    """Check for exactly these words in this order, with anything but words between them."""
    return [word.lower() for word in words(response)] == [item.lower() for item in items]


def numbered_list(response: str, count: int) -> bool:
    """Check for lines ``1.`` to ``count.`` (or ``1)``) and no other line."""
    lines = [line.strip() for line in response.strip().splitlines() if line.strip()]
    return len(lines) == count and all(re.match(rf"{n}[.)]\s*\w", line) for n, line in enumerate(lines, 1))


def separated(response: str, separator: str, count: int) -> bool:
    """Check for exactly ``count`` non-empty parts on one line between ``separator``."""
    parts = response.strip().split(separator)
    return len(parts) == count and all(part.strip() for part in parts) and "\n" not in response.strip()


def json_keys(response: str, keys: list[str]) -> bool:
    """Check for one JSON object with exactly these keys and no empty value."""
    try:
        value = json.loads(response.strip())
    except (ValueError, RecursionError):  # the latter for brackets that nest without end
        return False
    return (
        isinstance(value, dict) and set(value) == set(keys) and all(item not in ("", None) for item in value.values())
    )


def exact(response: str, text: str) -> bool:
    """Check for exactly this text, case included; space around it and a final full stop do not count."""
    return response.strip().rstrip(".").strip() == text


KINDS: dict[str, Callable[..., bool]] = {
    check.__name__: check
    for check in (
        lowercase,
        uppercase,
        starts_with,
        word_count,
        sentence_count,
        question,
        number,
        one_of,
        in_order,
        numbered_list,
        separated,
        json_keys,
        exact,
    )
}


@functools.lru_cache(maxsize=4096)
def _ifeval(name: str, arguments: str) -> Callable[[str], bool]:
    """Return an if-verifiable checker with its arguments. ``arguments`` is JSON, which the cache can hash."""
    if name in NEEDS_NLTK_DATA | NEEDS_LANGUAGE_GUESS:
        raise ValueError(f"{name} downloads data or guesses; use a constraint of align.data.checkers instead")
    # Imported late, since the package imports `datasets`, which takes 1.5 s.
    from if_verifiable.ifeval.instructions_registry import INSTRUCTION_DICT

    checker = INSTRUCTION_DICT[name](name)
    checker.build_description(**json.loads(arguments))
    return lambda response: bool(checker.check_following(response))


@functools.lru_cache(maxsize=65536)
def _loads(checks: str) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(checks)
    return parsed


def _parse(row: Row) -> dict[str, Any]:
    checks = _loads(row["checks"]) if row["checks"] else {}
    if not checks.get("constraints"):
        raise ValueError(f"row {row['id']} ({row['source']}) has no constraints to check; gold needs embedded data")
    return checks


def _score(checks: dict[str, Any], response: str) -> float:
    if not passes_guard(checks["guard"], response):
        return 0.0
    constraints = checks["constraints"]
    return sum(satisfies(constraint, response) for constraint in constraints) / len(constraints)


def _decimal(text: str) -> Decimal | None:
    try:
        value = Decimal(text.replace(",", "").strip().lstrip("$").strip())
    except InvalidOperation:
        return None
    return value if value.is_finite() else None
