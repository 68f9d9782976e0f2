r"""The verifier ``math``: an answer and a reference as expressions of sympy, by math-verify. Runs in a worker process.

The place of the answer, the first of these that the text outside thoughts has:

1. ``\boxed{}``. Several boxes must all be right, or they are several answers and there is none;
2. the line after ``####``, likewise; if there is a box as well, both must be right;
3. the text after the last "answer is" or "answer:", up to the end of its line, or the line below such a heading. The
   line before must have no other;
4. the whole answer, if it is one line.

math-verify reads that place as a whole. It never searches the text for an expression, because its fallbacks to the last
number or the first match reward guesses.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections import deque
from fractions import Fraction
from typing import Any

import sympy
from math_verify import parse
from math_verify import verify as compare
from math_verify.parser import LatexExtractionConfig
from sympy.core.relational import Relational

from align.data.final_answers import answer_text
from align.data.number_forms import unformatted
from align.verifiers.units import SCALES, UNITS, Measure, read_measure
from align.verifiers.verdict import NO_ANSWER, UNEQUAL, UNPARSABLE, BadReference, Verdict, equal_or

LONGEST = 1000
"""Characters of the longest answer that is parsed."""
TOLERANCE = 1.001e-6
"""Relative difference of two numbers that are equal: ``0.333333`` is 1/3."""
MOST_BOXES = 100
"""Boxes that are read, the last ones."""
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_MARK = re.compile(r"####([^\n#]*)")
_ANSWER = re.compile(r"\banswer(?:\s+is\b|[ \t]*:)[ \t]*:?([^\n]*)", re.IGNORECASE)
_MATH = re.compile(r"\$\$?(.+?)\$\$?[\s.]*|\\\((.+?)\\\)[\s.]*|\\\[(.+?)\\\][\s.]*", re.DOTALL)
_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mbox)\s*\{([^{}]*)\}")
_WRAPPED = re.compile(
    r"\{([^{},]+)\}|\\(?:displaystyle|textstyle|bf|large)\b(.+)"
    r"|\\(?:mathbf|mathit|boldsymbol|bm|emph|underline|textbf|textit)\s*(?:\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}|(\w))",
    re.DOTALL,
)
"""A text within one mark of emphasis."""
_HEADING = re.compile(
    r"(\banswer(?:[ \t]+is\b[ \t]*:?|[ \t]*:)|^[#> \t]*(?:final[ \t]+)?answer)[ \t]*\n\s*(?=\S)", re.I | re.M
)
_DISPLAY = re.compile(r"\$\$([^$]{1,1000})\$\$|\\\[((?:(?!\\\]).){1,1000})\\\]", re.DOTALL)
_AFTER_BOX = re.compile(r"(?:\\[,; ]|[ \t$])*(?:(\\(?:text|mathrm)\s*\{[^{}]*\})|([A-Za-z]{4,})\b)")
_EXPONENT = re.compile(r"(?<=\d)[eE]([-+]?\d{1,3})(?![\d.^])")
_TAG = re.compile(r"</?answer>", re.IGNORECASE)
_REASON = re.compile(r"[ ,]+(?:because|since)\b.*")
_SET_NUMBER = re.compile(r"\\(?:text|textrm|mathrm|mathbf|textbf)\s*\{\s*(-?\d[\d.,]*)\s*\}")
_REPEATING = re.compile(r"(-?)(\d{0,20})\.(\d{0,20})\\(?:overline|bar|dot)\s*\{(\d{1,20})\}")
_UNSEEN = re.compile(r"\\(?:[hv]?phantom|[bx]?cancel|sout)\b|\\color(?:\[\w+\])?\{white\}|^-\s*\(?\s*-")
"""Text that a reader does not see, or sees struck out, and a sign that is left to compute."""
_NUMBER_FIRST = re.compile(r"[-−(\[{]*\\?\$?\d")
_GROUPS = re.compile(r"(?<=\d)(?:\\[,! ]|[\u00a0\u2009\u202f])(?=\d{3}(?!\d))")
_FRACTION = re.compile("[¼-¾⅐-⅞]")
_CALCULUS = re.compile(r"\\(?:int|sum|prod|lim|partial)\b|\\frac\s*\{\s*d\s*\}")
_FUNCTION = re.compile(
    r"\\(?:[dt]?binom|gcd|max|min|log|ln|exp|sin|cos|tan|lfloor|lceil|det|bmod|pmod)(?![A-Za-z])|\\begin\{vmatrix\}"
)
"""Operations that math-verify performs, and a number does not have."""
_QUOTIENT = re.compile(r"\\[dt]?frac[\s{(-]*\d|\d\s*/\s*\d")
_DOUBT = re.compile(r"\d|\b(?:or|not|maybe|perhaps|possibly)\b")
_ADJACENT = re.compile(r"\d\s+\d")
"""Two numbers side by side, which math-verify adds as a mixed number: ``3 4`` would equal 7."""


def verify(reference: Any, text: str) -> Verdict:
    """Return the verdict on an answer. Raises ``BadReference`` for a reference that math-verify cannot read."""
    gold_text = _inner(str(reference).strip())
    if not _parse((read_measure(gold_text) or Measure(gold_text)).number):
        raise BadReference("cannot be read by math-verify")
    pieces = _find_answers(unformatted(answer_text(text) or ""))
    if not pieces:
        return Verdict(0.0, NO_ANSWER)
    # An answer in a box and another behind ``####`` must both be right, or it would be a choice of two.
    verdicts = [_compare(gold_text, piece) for piece in pieces]
    wrong = [verdict for verdict in verdicts if verdict.score < 1]
    if wrong and len(wrong) < len(verdicts):
        return Verdict(0.0, NO_ANSWER)
    return (wrong or verdicts)[0]


def _compare(gold_text: str, piece: str) -> Verdict:
    """Return the verdict on one place of an answer."""
    if _TEXT.fullmatch(gold_text) and piece.isalpha():
        piece = f"\\text{{{piece}}}"  # a word, not a product of its letters
    if len(piece) > LONGEST or (_hides_answer(piece) and not _hides_answer(gold_text)):
        return Verdict(0.0, UNPARSABLE)
    gold_measure, measure = read_measure(gold_text), read_measure(piece)
    if measure is None and gold_measure is not None:
        return Verdict(0.0, UNPARSABLE)
    # Words that are no unit are compared as they are if the reference has some.
    gold_measure = gold_measure or Measure(gold_text)
    measure = measure or Measure(piece)
    gold, parsed = _parse(gold_measure.number), _parse(measure.number)
    if not parsed:
        return Verdict(0.0, UNPARSABLE)
    if _is_computation(gold[0], gold_text, parsed[0], piece) or _is_contradiction(parsed[0]):
        return Verdict(0.0, UNEQUAL)
    if _ADJACENT.search(piece) and not _ADJACENT.search(gold_text):
        return Verdict(0.0, UNEQUAL)
    # A unit that only one side writes is ignored. A base counts if the answer writes it.
    units = gold_measure.units, measure.units
    if (all(units) and units[0] != units[1]) or (measure.base and measure.base != gold_measure.base):
        return Verdict(0.0, UNEQUAL)
    gold, parsed = _scaled(gold_measure), _scaled(measure)
    # math-verify rounds to six places: without the second check all numbers near 0 are equal.
    return equal_or(
        compare(gold, parsed, timeout_seconds=None, allow_set_relation_comp=True) and _are_close(gold[0], parsed[0])
    )


def _scaled(measure: Measure) -> list[Any]:
    """Return the expression of a number with its scale word: 42 million."""
    return _parse(f"({measure.number})\\times {measure.factor}" if measure.factor else measure.number)


def _are_close(gold: Any, answer: Any) -> bool:
    """Return False if two numbers, or any numbers at the same place of two lists, differ by more than ``TOLERANCE``.

    Whole numbers must be equal. ``50`` and ``50 %`` may differ by the factor 100, but not ``0.5`` and ``0.5 %``.
    """
    gold, answer = _right_side(gold), _right_side(answer)
    pairs = [_entries(side) for side in (gold, answer)]
    if pairs[0] and pairs[1]:
        return len(pairs[0]) == len(pairs[1]) and all(map(_are_close, *pairs))
    if not all(isinstance(side, sympy.Expr) and side.is_number and side.is_real for side in (gold, answer)):
        return True
    tolerance = 0 if gold.is_Integer and answer.is_Integer else TOLERANCE
    values = [sympy.N(side, 30) for side in (gold, answer)]
    factors = (1, 100, sympy.Rational(1, 100)) if max(abs(value) for value in values) >= 1 else (1,)
    return any(abs(values[0] * factor - values[1]) <= tolerance * abs(values[1]) for factor in factors)


def _entries(expression: Any) -> list[Any]:
    """Return the entries of a tuple, an interval, a set of real numbers or a matrix; none for anything else."""
    if isinstance(expression, sympy.FiniteSet):
        are_real = all(entry.is_number and entry.is_real for entry in expression.args)
        return sorted(expression.args, key=float) if are_real else []
    if isinstance(expression, sympy.Interval):
        return [expression.start, expression.end]
    if isinstance(expression, sympy.MatrixBase):
        return list(expression)
    return list(expression.args) if isinstance(expression, sympy.Tuple) else []


def _is_computation(gold: Any, gold_text: str, parsed: Any, piece: str) -> bool:
    """Return True for an operation that is left to do, and that the reference does not have.

    A sum or an integral equals its value, but to copy it from the question is no answer.
    """
    if not set(_CALCULUS.findall(piece)) <= set(_CALCULUS.findall(gold_text)):
        return True
    answer = _right_side(parsed)
    if _is_left_to_compute(answer) and not _is_left_to_compute(_right_side(gold)):
        return True
    if not getattr(gold, "free_symbols", set()) and not _functions(piece) <= _functions(gold_text):
        return True
    if not _is_value(gold):
        return _has_symbols_below(answer) and not _has_symbols_below(gold)
    if _FUNCTION.search(piece) or not _is_value(answer):
        return True
    # ``10/2`` is left to compute if the reference is a whole number.
    return bool(getattr(gold, "is_Integer", False)) and _QUOTIENT.search(piece) is not None


def _functions(text: str) -> set[str]:
    """Return the functions in a text. Logarithms of all bases are one function."""
    return {"log" if name in ("\\log", "\\ln") else name for name in _FUNCTION.findall(text)}


def _is_left_to_compute(expression: Any) -> bool:
    """Return True for an expression in which numbers could be joined: 3 + 4, 3 * 4 x, 2^3, (1 + 3, 2), sin(1)."""
    if isinstance(expression, sympy.MatrixBase):
        return any(_is_left_to_compute(entry) for entry in expression)
    if not isinstance(expression, sympy.Basic):
        return False
    numbers = [part for part in expression.args if isinstance(part, sympy.Number) and part != -1]
    if isinstance(expression, sympy.Add) and len(numbers) > 1:
        return len(expression.args) > 2 or not _is_mixed(*numbers)
    if isinstance(expression, sympy.Add) and expression.is_number and not numbers:
        return len(sympy.Add.make_args(sympy.Add(*expression.args))) < len(expression.args)  # like terms
    if isinstance(expression, sympy.Mul) and len(numbers) > 1:
        return True
    if isinstance(expression, sympy.Pow) and len(numbers) == 2:
        base, exponent = expression.args
        is_scale = base == 10 and exponent.is_Integer
        return not is_scale and bool((base**exponent).is_Rational) and exponent != -1
    if isinstance(expression, sympy.Function) and expression.is_number and not isinstance(expression, sympy.exp):
        return True
    return any(_is_left_to_compute(part) for part in expression.args)


def _has_symbols_below(expression: Any) -> bool:
    """Return True for an expression that divides by a variable."""
    if not isinstance(expression, sympy.Expr):
        return False
    return any(power.exp.is_negative and power.base.free_symbols for power in expression.atoms(sympy.Pow))


def _is_contradiction(parsed: Any) -> bool:
    """Return True for an equation of two different numbers: ``6 = 5``."""
    if not isinstance(parsed, sympy.Eq):
        return False
    left_side, right_side = parsed.args
    return isinstance(left_side, sympy.Number) and isinstance(right_side, sympy.Number) and left_side != right_side


def _find_answers(answer: str) -> list[str]:
    """Return the places of the answer without their dollar signs; none if there are several that differ."""
    answer = _DISPLAY.sub(lambda match: f"$${' '.join((match[1] or match[2]).split())}$$", _TAG.sub(" ", answer))
    answer = _HEADING.sub(lambda match: f"{match[1].removesuffix(':')}: ", answer)
    boxes = {_unwrap(box.strip()) for box in _boxes(answer)}
    marks = {match[1].strip() for match in _MARK.finditer(answer)}
    # 1. Places that are marked as the answer count before any others.
    if boxes or marks:
        # A number that is stated after the last box corrects it.
        end = max((match.end() for match in _BOX.finditer(answer)), default=len(answer))
        later = {_inner(match[1]) for match in _ANSWER.finditer(answer, end) if not _BOX.search(match[1])}
        places = sorted(boxes) + sorted(marks) + sorted(place for place in later if _NUMBER_FIRST.match(place))
        is_single = len(marks) <= 1 and not any(_BOX.search(box) for box in boxes)
        return [_inner(_unwrap(place)) for place in places] if is_single and all(places) else []
    # 2. Otherwise the last line that states an answer counts, or a text of a single line.
    lines = [line for line in answer.splitlines() if line.strip()]
    stated = [
        (index, _inner(_REASON.sub("", match[1])))
        for index, line in enumerate(lines)
        for match in _ANSWER.finditer(line)
    ]
    if not stated:
        return [_inner(answer)] if len(lines) == 1 else []
    last, place = stated[-1]
    # The line before must not state another answer.
    before = dict(stated[:-1]).get(last - 1, place)
    return [place] if place and place == before else []


def _unwrap(place: str) -> str:
    """Return the content of a place that is one box."""
    boxes = _boxes(place)
    return boxes[0].strip() if len(boxes) == 1 and _BOX.match(place) and place.endswith("}") else place


def _hides_answer(text: str) -> bool:
    r"""Return True for a second answer or a doubt in a ``\text{}``, which math-verify drops as it drops units."""
    words = [match[1].strip().lower() for match in _TEXT.finditer(text)]
    return _UNSEEN.search(text) is not None or any(
        _DOUBT.search(word) is not None for word in words if word not in ("or", "and")
    )


def _boxes(answer: str) -> list[str]:
    r"""Return the contents of each ``\boxed{}``, which may have braces; a box that is not closed is empty."""
    boxes = []
    end = 0
    for match in deque(_BOX.finditer(answer), maxlen=MOST_BOXES):
        if match.start() < end:  # a box inside a box
            continue
        depth = 1
        end = match.end()
        limit = min(len(answer), end + LONGEST + 1)
        while end < limit and depth:
            depth += {"{": 1, "}": -1}.get(answer[end], 0)
            end += 1
        boxes.append("" if depth else answer[match.end() : end - 1] + _unit_behind(answer, end))
    return boxes


def _unit_behind(answer: str, end: int) -> str:
    r"""Return the unit or the scale word that follows a box, as in ``\boxed{90} \text{ radians}``, or an empty text."""
    match = _AFTER_BOX.match(answer, end)
    if match is None:
        return ""
    word = (match[2] or "").lower()
    if word:
        names = (word, word.removesuffix("s"))
        return f" \\text{{ {word}}}" if any(name in UNITS or name in SCALES for name in names) else ""
    measure = read_measure(f"1 {match[1]}")
    return f" {match[1]}" if measure is not None and (measure.units or measure.factor) else ""


def _inner(text: str) -> str:
    """Return a text without asterisks, the signs of a formula around it, and a full stop at its end."""
    stripped = _without_marks(_plain_digits(text))
    words = _TEXT.fullmatch(stripped)
    if words is not None and any(sign.isdigit() for sign in words[1]):
        stripped = words[1].strip()
    match = _MATH.fullmatch(stripped)
    if match is not None and "$" not in (inner := match[1] or match[2] or match[3]):
        return _without_marks(inner)
    return _without_marks(stripped.removesuffix("."))


def _without_marks(text: str) -> str:
    """Return an answer without the marks of emphasis around it."""
    text = text.strip()
    while (match := _WRAPPED.fullmatch(text)) is not None:
        text = next(filter(None, match.groups()), "").strip()
    return text


def _plain_digits(text: str) -> str:
    """Return a text whose digits are ASCII, without separators of thousands, and with LaTeX's fractions."""
    text = "".join(str(unicodedata.decimal(sign)) if sign.isdecimal() else sign for sign in text)
    text = _SET_NUMBER.sub(r"\1", _EXPONENT.sub(r"\\times 10^{\1}", text)).replace("\\varnothing", "\\emptyset")
    text = _REPEATING.sub(_spell_repeating, text)
    return _FRACTION.sub(_spell_fraction, _GROUPS.sub("", text))


def _spell_fraction(match: re.Match[str]) -> str:
    above, below = unicodedata.normalize("NFKC", match[0]).split("\u2044")
    return f"\\frac{{{above}}}{{{below}}}"


def _spell_repeating(match: re.Match[str]) -> str:
    r"""Return ``\frac{1}{6}`` for ``0.1\overline{6}``."""
    sign, whole, before, period = match.groups()
    scale = 10 ** len(before)
    value = Fraction(int(whole + before or 0), scale) + Fraction(int(period), scale * (10 ** len(period) - 1))
    return f"{sign}\\frac{{{value.numerator}}}{{{value.denominator}}}"


@functools.lru_cache(maxsize=1024)
def _parse(text: str) -> list[Any]:
    """Return the expression that a text is as a whole, in a list; an empty list if it is none."""
    # Only the box around the text is read, so the text has to be an expression from its beginning to its end.
    config = LatexExtractionConfig(try_extract_without_anchor=False, boxed_match_priority=0)
    if not text or text.count("{") != text.count("}"):
        return []
    # Limits of time would be alarms of this process; the pool of workers has its own.
    result: list[Any] = parse(
        f"\\boxed{{{text}}}", [config], fallback_mode="no_fallback", extraction_mode="first_match", parsing_timeout=None
    )
    return [_joined(expression) for expression in result]


def _joined(expression: Any) -> Any:
    """Return the set of the numbers for which one of several inequalities holds: ``x < 1 or x > 2``."""
    if not isinstance(expression, sympy.FiniteSet) or len(expression.free_symbols) != 1:
        return expression
    if any(isinstance(part, sympy.Eq) or not isinstance(part, Relational) for part in expression.args):
        return expression
    try:
        return sympy.Or(*expression.args).as_set()
    except NotImplementedError:
        return expression


def _right_side(expression: Any) -> Any:
    """Return the right side of an equation; anything else as it is."""
    return expression.rhs if isinstance(expression, sympy.Eq) else expression


def _is_value(expression: Any) -> bool:
    """Return True for a number without an operation that is left to do: 5, -1/2, 3 1/2, 50 %, 3 * 10^8."""
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
    """Return True for a number, a reciprocal of one, a power of ten, and the 1/100 of a percentage."""
    if isinstance(expression, sympy.UnevaluatedExpr):
        return bool(expression.args[0] == sympy.Rational(1, 100))
    if not isinstance(expression, sympy.Pow):
        return isinstance(expression, sympy.Number)
    base, exponent = expression.args
    return isinstance(base, sympy.Number) and (exponent == -1 or (base == 10 and isinstance(exponent, sympy.Integer)))


def _is_mixed(first: Any, second: Any) -> bool:
    """Return True for a whole number and a fraction below 1 of the same sign, in any order."""
    integer, part = (first, second) if abs(float(first)) >= abs(float(second)) else (second, first)
    return float(integer).is_integer() and 0 < abs(float(part)) < 1 and (integer > 0) == (part > 0)
