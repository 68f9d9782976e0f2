r"""The verifier ``math``: an answer and a reference as expressions of sympy, by math-verify. Runs in a worker process.

The place of the answer, the first of these that the text outside thoughts has:

1. the last ``\boxed{}``. Boxes with different contents are several answers, so there is none;
2. the line after ``####``, likewise;
3. the text after the last "answer is" or "answer:", up to the end of its line;
4. the whole answer, if it is one line.

math-verify reads that place as a whole. It never searches the text for an expression, because its fallbacks to the last
number or the first match reward guesses.
"""

from __future__ import annotations

import functools
import re
from collections import deque
from typing import Any

from align.data.final_answers import answer_text
from align.verifiers.verdict import NO_ANSWER, UNEQUAL, UNPARSABLE, BadReference, Verdict, equal_or

LONGEST = 1000
"""Characters of the longest answer that is parsed."""
MOST_BOXES = 100
"""Boxes that are read, the last ones."""
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_MARK = re.compile(r"####([^\n#]*)")
_ANSWER = re.compile(r"\banswer(?:\s+is\b|[ \t]*:)[ \t]*:?([^\n]*)", re.IGNORECASE)
_MATH = re.compile(r"\$\$?(.+?)\$\$?[\s.]*|\\\((.+?)\\\)[\s.]*|\\\[(.+?)\\\][\s.]*", re.DOTALL)
_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mbox)\s*\{([^{}]*)\}")
_DOUBT = re.compile(r"\d|\b(?:or|not|maybe|perhaps|possibly)\b")
_ADJACENT = re.compile(r"\d\s+\d")
"""Two numbers side by side, which math-verify adds as a mixed number: ``3 4`` would equal 7."""


def verify(reference: Any, text: str) -> Verdict:
    """Return the verdict on an answer. Raises ``BadReference`` for a reference that math-verify cannot read."""
    gold_text = str(reference).strip()
    gold = _parse(_inner(gold_text))
    if not gold:
        raise BadReference("cannot be read by math-verify")
    answer = answer_text(text)
    piece = _find_answer(answer or "")
    if not piece:
        return Verdict(0.0, NO_ANSWER)
    if len(piece) > LONGEST or (_hides_answer(piece) and not _hides_answer(gold_text)):
        return Verdict(0.0, UNPARSABLE)
    parsed = _parse(piece)
    if not parsed:
        return Verdict(0.0, UNPARSABLE)
    if _is_value(gold[0]) and not _is_value(_right_side(parsed[0])):
        # A sum or an integral equals its value, but to copy it from the question is no answer.
        return Verdict(0.0, UNEQUAL)
    if _ADJACENT.search(piece) and not _ADJACENT.search(gold_text):
        return Verdict(0.0, UNEQUAL)
    from math_verify import verify as compare

    return equal_or(compare(gold, parsed, timeout_seconds=None))


def _find_answer(answer: str) -> str:
    """Return the place of the answer without its dollar signs; empty if there is none, or several."""
    boxes = [box.strip() for box in _boxes(answer)]
    marks = [match[1].strip() for match in _MARK.finditer(answer)]
    for places in (boxes, marks):
        if places:
            return _inner(places[-1]) if len(set(places)) == 1 else ""
    lines = [match[1] for match in _ANSWER.finditer(answer)]
    if lines:
        return _inner(lines[-1])
    return "" if "\n" in answer.strip() else _inner(answer)


def _hides_answer(text: str) -> bool:
    r"""Return True for a second answer or a doubt in a ``\text{}``, which math-verify drops as it drops units."""
    words = [match[1].strip().lower() for match in _TEXT.finditer(text)]
    return any(_DOUBT.search(word) is not None for word in words if word not in ("or", "and"))


def _boxes(answer: str) -> list[str]:
    r"""Return the contents of each ``\boxed{}``, which may have braces; a box that is not closed is empty."""
    boxes = []
    end = 0
    for match in deque(_BOX.finditer(answer), maxlen=MOST_BOXES):
        if match.start() < end:  # a box inside a box
            continue
        depth, end = 1, match.end()
        limit = min(len(answer), end + LONGEST + 1)
        while end < limit and depth:
            depth += {"{": 1, "}": -1}.get(answer[end], 0)
            end += 1
        boxes.append("" if depth else answer[match.end() : end - 1])
    return boxes


def _inner(text: str) -> str:
    """Return a text without asterisks, the signs of a formula around it, and a full stop at its end."""
    stripped = text.replace("**", "").strip()
    match = _MATH.fullmatch(stripped)
    if match is not None and "$" not in (inner := match[1] or match[2] or match[3]):
        return inner.strip()
    return stripped.removesuffix(".").strip()


@functools.lru_cache(maxsize=1024)
def _parse(text: str) -> list[Any]:
    """Return the expression that a text is as a whole, in a list; an empty list if it is none."""
    from math_verify import parse
    from math_verify.parser import LatexExtractionConfig

    # Only the box around the text is read, so the text has to be an expression from its beginning to its end.
    config = LatexExtractionConfig(try_extract_without_anchor=False, boxed_match_priority=0)
    if not text or text.count("{") != text.count("}"):
        return []
    # Limits of time would be alarms of this process; the pool of workers has its own.
    result: list[Any] = parse(
        f"\\boxed{{{text}}}", [config], fallback_mode="no_fallback", extraction_mode="first_match", parsing_timeout=None
    )
    return result


def _right_side(expression: Any) -> Any:
    """Return the right side of an equation; anything else as it is."""
    import sympy

    return expression.rhs if isinstance(expression, sympy.Eq) else expression


def _is_value(expression: Any) -> bool:
    """Return True for a number without an operation that is left to do: 5, -1/2, 3 1/2, 50 %, 3 * 10^8."""
    import sympy

    if isinstance(expression, sympy.Add):
        integer, part = expression.as_two_terms()
        return len(expression.args) == 2 and _is_value(integer) and _is_value(part) and _is_mixed(integer, part)
    if isinstance(expression, sympy.Mul):
        factors = [factor for factor in expression.args if factor != -1]
        return len([factor for factor in factors if isinstance(factor, sympy.Number)]) <= 1 and all(
            _is_factor(factor) for factor in factors
        )
    return isinstance(expression, sympy.Number) or _is_factor(expression)


def _is_factor(expression: Any) -> bool:
    """Return True for a number, a reciprocal of one, and a power of ten."""
    import sympy

    if not isinstance(expression, sympy.Pow):
        return isinstance(expression, sympy.Number)
    base, exponent = expression.args
    return isinstance(base, sympy.Number) and (exponent == -1 or (base == 10 and isinstance(exponent, sympy.Integer)))


def _is_mixed(first: Any, second: Any) -> bool:
    """Return True for a whole number and a fraction below 1 of the same sign, in any order."""
    integer, part = (first, second) if abs(float(first)) >= abs(float(second)) else (second, first)
    return float(integer).is_integer() and 0 < abs(float(part)) < 1 and (integer > 0) == (part > 0)
