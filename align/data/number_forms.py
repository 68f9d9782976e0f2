"""Texts without formatting, and numbers in other forms as decimals: scales, powers of ten, fractions. Torch-free."""

from __future__ import annotations

import re
import unicodedata
from decimal import Decimal

_COMMENT = re.compile(r"<!--.*?(?:-->|\Z)", re.DOTALL)
_SPACED_GROUPS = re.compile(r"(?<=\d)(?:\\,|['’\u00a0\u2009\u202f])(?=\d{3}(?!\d))")
"""Separators of thousands that join nothing else; a plain space could separate two answers."""
_INDIAN = re.compile(r"(?<![\d.,])\d{1,2}(?:,\d{2})+,\d{3}(?![\d,])")
_DASH = re.compile(r"(?<![\w)])–(?=[\d.])")
_FRACTION = re.compile("[¼-¾⅐-⅞]")
_HEXADECIMAL = re.compile(r"\b0[xX][0-9a-fA-F]+\b")
_MANTISSA = r"(?<![\w.,])(\d{1,20}(?:,\d{3}){0,6}(?:\.\d{1,20})?)"
_POWER = re.compile(
    _MANTISSA + r"(?:\s*(?:\\times|\\cdot|[×*·x])\s*10\s*(?:\^|\*\*)\s*\{?([-−+]?\d{1,2})\}?|[eE]([-+]?\d{1,2}))(?!\w)"
)
_SCALED = re.compile(_MANTISSA + r"(?:\s?(thousand|million|billion|trillion)|([kK]))\b")
_MONEY = re.compile(r"([$€£]\s?)(\d{1,20}(?:,\d{3}){0,6}(?:\.\d{1,20})?)(M|mn|B|bn)\b")
_SCALES = {"k": 3, "thousand": 3, "m": 6, "mn": 6, "million": 6, "b": 9, "bn": 9, "billion": 9, "trillion": 12}
_ZERO_WIDTH = re.compile("[\u00ad\u200b\u200e\u200f\u2060\ufeff]")
_TAG = re.compile(
    r"</?(?:b|i|u|em|strong|code|mark|span|p|div|center)(?:\s+[\w-]{1,30}=\"[^\"\n]{0,200}\")*\s*/?>", re.IGNORECASE
)
_STRUCK = re.compile(r"~~[^~\n]+~~")
_EMPHASIS = re.compile(
    r"(?<![\w*\\)\]}])(\*{1,3})(?=[^\s*])([^*\n]+)(?<!\s)\1(?![\d(*])"
    r"|(?<![\w\\)\]}])(_{1,3})(?=[^\s_])([^_\n]+)(?<!\s)\3(?!\w)"
    r"|(?<!`)(`{1,2})(?!`)([^`\n]+)\5(?!`)"
)
"""Bold, italics and code. A mark next to an operand is a product, a power or an index: ``2**3``, ``3*6*2``, ``x_1``."""
_MOST_NESTED = 4
"""Marks around each other that are removed: ``**_`18`_**`` has three."""

NUMBER = re.compile(
    r"(?P<outer>(?<![\w)])[-−])?"  # a minus sign, unless it is between two operands
    r"(?:[$€£](?P<inner>[-−])?)?"
    r"(?:(?P<whole>\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?P<part>\.\d+)?|(?<!\d)(?P<only>\.\d+))"
)
"""A number as people write it: 1,234.50, $-5, -$5, .5; commas only between groups of three digits."""
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))")
_LATEX_TEXT = re.compile(
    r"\\(?:text|textbf|textit|texttt|emph|underline|mathrm|mathbf|mathit|mathsf|boldsymbol|bm|mbox)\s*\{([^{}]*)\}"
)


def unformatted(text: str) -> str:
    """Return a text without marks of emphasis, inline tags, comments, and signs that nobody sees."""
    return without_marks(_ZERO_WIDTH.sub("", text))


def without_marks(text: str) -> str:
    """Return a text as a reader of the rendered text sees it: no marks of emphasis, inline tags, or comments."""
    text = _STRUCK.sub(" ", _TAG.sub("", _COMMENT.sub(" ", text)))
    for _ in range(_MOST_NESTED):
        shown = _EMPHASIS.sub(lambda match: match[2] or match[4] or match[6], text)
        if shown == text:
            break
        text = shown
    return text


def plain_numbers(text: str) -> str:
    """Return a text whose numbers have one form: ``1.5 million`` and ``1.5e6`` become ``1500000``, ``3½`` ``3 1/2``.

    Hexadecimal numbers are removed.
    """
    text = _HEXADECIMAL.sub("", text)
    text = _DASH.sub("−", _SPACED_GROUPS.sub("", text))
    text = _INDIAN.sub(lambda match: match[0].replace(",", ""), text)
    text = _FRACTION.sub(_spell_fraction, text)
    text = _POWER.sub(lambda match: _shift(match[1], int((match[2] or match[3]).replace("−", "-"))), text)
    text = _MONEY.sub(lambda match: match[1] + _shift(match[2], _SCALES[match[3].lower()]), text)
    return _SCALED.sub(lambda match: _shift(match[1], _SCALES[(match[2] or match[3]).lower()]), text)


def _spell_fraction(match: re.Match[str]) -> str:
    """Return `` 1/2`` for ``½``; Unicode decomposes it with a slash of its own."""
    parts = unicodedata.normalize("NFKC", match[0]).replace("\u2044", "/")
    return f" {parts}"


def _shift(digits: str, places: int) -> str:
    """Return a number with its point moved to the right."""
    return format(Decimal(digits.replace(",", "")).scaleb(places).normalize(), "f")


def without_latex(text: str) -> str:
    r"""Write LaTeX's ``\frac{7}{2}``, ``1{,}080``, ``\$`` and ``\text{}`` as plain text."""
    text = text.replace("{,}", ",").replace("\\!", "").replace("\\$", "$")
    text = _LATEX_TEXT.sub(r"\1", text)
    return _LATEX_FRACTION.sub(_plain_fraction, text)


def _plain_fraction(match: re.Match[str]) -> str:
    """Return ``7/2``, with a space before it for mixed numbers; empty for a fraction of anything but numbers."""
    above, below = (match[1] or match[2]).strip(), (match[3] or match[4]).strip()
    is_number = NUMBER.fullmatch(above) and NUMBER.fullmatch(below)
    if not is_number:
        return ""
    # A minus sign before the fraction must stay next to it.
    start = match.start()
    has_digit_before = match.string[max(0, start - 3) : start].rstrip()[-1:].isdigit()
    return f"{' ' if has_digit_before else ''}{above}/{below}"
