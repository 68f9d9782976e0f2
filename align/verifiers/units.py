r"""Units, scale words and number bases of answers: ``5 \text{ cm}^2``, ``\$5``, ``42 million``, ``1011_2``.

``read_measure`` separates them from the number, so that the verifier ``math`` compares both. Any other words behind a
number make the answer unreadable: ``42 \text{ is wrong}``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_NAMES = """
mm millimeter millimetre|cm centimeter centimetre|m meter metre|km kilometer kilometre|in inch inches|ft foot feet
yd yard|mi mile|mg milligram|g gram|kg kilogram|lb pound|oz ounce|ton tonne|s sec second|min minute|h hr hour
day|week|month|yr year|ml milliliter millilitre|l liter litre|gal gallon|qt quart|pt pint
cup|degree deg degrees|rad radian
dollar usd|cent|euro eur|n newton|j joule|kj|w watt|kw|v volt|amp ampere|ohm|k kelvin|pa pascal|hz hertz|mol mole
c celsius|f fahrenheit|percent|person people|child children|man men|woman women|mouse mice|die dice
"""
UNITS = {name: names.split()[0] for names in re.split(r"[|\n]", _NAMES.strip()) for name in names.split()}
"""Every name of a unit, in the singular and in irregular plurals -> the name that stands for it."""
SPEEDS = {"mph": ("mi", "h"), "kph": ("km", "h"), "kmh": ("km", "h")}
SCALES = {
    "dozen": "12",
    "hundred": "100",
    "thousand": "10^{3}",
    "million": "10^{6}",
    "billion": "10^{9}",
    "trillion": "10^{12}",
}
"""Scale words -> the factor."""
BASES = {
    "two": "2",
    "three": "3",
    "five": "5",
    "seven": "7",
    "eight": "8",
    "ten": "10",
    "twelve": "12",
    "sixteen": "16",
}
GENERIC = frozenset({"unit", "of", "each"})
"""Words that say nothing about the measure."""
NO_NOUNS = frozenset(
    {"minus", "plus", "times", "less", "guess", "perhaps", "always", "this", "thus", "is", "as", "was"}
)
"""Words in ``s`` that name nothing that can be counted."""

_TEXT = r"\\(?:text|mathrm|mbox|textrm|textit|rm)\s*\{([^{}]*)\}"
_QUOTIENT = re.compile(rf"\\[dt]?frac\s*\{{\s*{_TEXT}\s*\}}\s*\{{\s*{_TEXT}\s*\}}")
_POWER = r"\^\s*\{?\s*-?\d\s*\}?|[²³]"
_SPACE = re.compile(r"(?<!\\)\\[,;!: ]|~|\\quad\b")
_CURRENCY = re.compile(r"\s*(-?)\s*(\\\$|\$|€|£)\s*")
_SIGNS = {"\\$": "dollar", "$": "dollar", "€": "euro", "£": "lb"}
_DEGREES = re.compile(r"\s*(?:\^\s*\{?\s*\\circ\s*\}?|\^?\s*°|\\degree)")
_SUFFIX = re.compile(rf"(?<=[\d)}}\]])\s*((?:\s|{_TEXT}|{_POWER}|/|\\cdot\b|(?<![\\A-Za-z])[A-Za-z]+\.?)+)\Z")
_TOKEN = re.compile(r"[a-z]+|\^\s*\{?\s*(-?\d)\s*\}?|[²³/]|\S")
_BASE = re.compile(rf"([0-9A-Fa-f]+)_\s*\{{?\s*(?:{_TEXT}|(\w+))\s*\}}?\Z")


@dataclass(frozen=True)
class Measure:
    """A number as LaTeX, without its unit."""

    number: str
    units: frozenset[tuple[str, int]] = frozenset()
    """Names of units with their powers; empty without a unit."""
    factor: str = ""
    """The factor of a scale word, as LaTeX."""
    base: str = ""
    """The base of a number in another base than ten."""


def read_measure(text: str) -> Measure | None:
    """Return the parts of an answer; None if words that are no unit follow its number."""
    text = _QUOTIENT.sub(r"\\text{ \1/\2 }", _SPACE.sub(" ", text).strip())
    units: dict[str, int] = {}
    sign = _CURRENCY.match(text)
    if sign is not None:
        units[_SIGNS[sign[2]]] = 1
        text = sign[1] + text[sign.end() :]
    based = _BASE.fullmatch(text)
    if based is not None:
        base = (based[2] or based[3]).strip().lower()
        base = BASES.get(base, base)
        return Measure(based[1], base="" if base == "10" else base)
    if text.endswith("\\%"):
        units["percent"] = 1
    text = _DEGREES.sub(r" \\text{degree} ", text).strip()
    suffix = _SUFFIX.search(text)
    if suffix is None:
        return Measure(text, frozenset(units.items()))
    words = re.sub(_TEXT, r" \1 ", suffix[1]).lower()
    found = _read_words(words, units)
    if found is not None:
        return Measure(text[: suffix.start()].strip(), frozenset(units.items()), found)
    # Letters without \text are variables, unless all of them are units.
    return None if "\\" in suffix[1] and re.search(_TEXT, suffix[1]) else Measure(text)


def _read_words(words: str, units: dict[str, int]) -> str | None:
    """Add the units of some words to ``units`` and return the factor of their scale words; None for other words."""
    factors: list[str] = []
    direction, power, last = 1, 1, ""
    for token in _TOKEN.finditer(words):
        word = token[0]
        if word in ("/", "per"):
            direction = -1
        elif word in SCALES or word.removesuffix("s") in SCALES:
            factors.append(SCALES.get(word) or SCALES[word.removesuffix("s")])
        elif word in ("square", "sq", "cubic", "cu"):
            power = 2 if word.startswith("sq") else 3
        elif token[1] or word in ("²", "³", "squared", "cubed"):
            if not last:
                return None
            raised = int(token[1]) if token[1] else 2 if word in ("²", "squared") else 3
            units[last] = raised * (1 if units[last] > 0 else -1)
        elif word in SPEEDS:
            units |= dict(zip(SPEEDS[word], (1, -1), strict=True))
        elif word.removesuffix("s") in GENERIC or word in ("and", ".", "\\cdot"):
            power = 1
        else:
            name = _unit(word)
            if name is None:
                return None
            units[name] = direction * power
            direction, power, last = 1, 1, name
    return "\\times ".join(factors)


def _unit(word: str) -> str | None:
    """Return the name of a unit, or of things that are counted: a plural of four letters or more."""
    if word in UNITS or word.removesuffix("s") in UNITS:
        return UNITS.get(word) or UNITS[word.removesuffix("s")]
    is_plural = word.isalpha() and len(word) >= 4 and word.endswith("s") and word not in NO_NOUNS
    return word.removesuffix("s") if is_plural else None
