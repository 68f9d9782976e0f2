"""Formats of numbers, times, sizes and verdicts, as a page or a terminal shows them. Torch-free."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

MISSING = "–"
TINY = 1e-5
"""Numbers below it have too many zeros to be read without a power of ten."""
HYPHEN_AS_MINUS = re.compile(r"(?<![\w)\].-])-(?=\.?\d)|(?<= )-(?= )|(?<=\de)-(?=\d)")
MARKS = {"better": "▲", "worse": "▼", "higher": "↑", "lower": "↓", "unclear": "·"}
"""A shape for each verdict, which is readable without color."""
WORDS = {
    "better": "better",
    "worse": "worse",
    "higher": "higher",
    "lower": "lower",
    "unclear": "no clear difference",
}
ACCURACIES = {
    "as_labeled": "as labeled",
    "true": "by gold score",
    "labels_true": "labels themselves",
    "longer": "longer answer wins",
    "shorter_chosen": "where shorter is chosen",
}
"""Titles of the shares of pairs that a reward model orders correctly."""


def number(value: Any, digits: int = 3) -> str:
    """Return a number with about ``digits`` significant digits: ``0.412``, ``12.3``, ``1,840``, ``0.0004``.

    None and numbers that are not finite are a dash; any other value is returned as text.
    """
    if value is None:
        return MISSING
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if not math.isfinite(value):
        return MISSING
    magnitude = abs(value)
    # Adding zero drops the sign of a negative zero.
    value += 0
    # Write tiny numbers in powers of ten, small numbers with two digits, large numbers without decimals, all others
    # with three.
    if magnitude != 0 and magnitude < TINY:
        text = f"{value:.1e}"
    elif magnitude != 0 and magnitude < 1e-3:
        text = f"{value:.{1 - math.floor(math.log10(magnitude))}f}".rstrip("0")
    elif magnitude >= 1000 or (isinstance(value, int) and magnitude >= 1):
        text = f"{value:,.0f}"
    elif magnitude >= 100:
        text = f"{value:.1f}"
    else:
        # Digits before the point count as significant, so fewer decimals follow larger numbers.
        exponent = math.floor(math.log10(magnitude)) if magnitude >= 1 else -1
        decimals = max(0, digits - 1 - exponent)
        text = f"{value:.{decimals}f}"
    return text.replace("-", "−")


def shorten(text: str, length: int) -> str:
    """Return ``text`` in at most ``length`` characters; an ellipsis replaces the end of a longer text."""
    return text if len(text) <= length else f"{text[: length - 1]}…"


def signed(value: Any) -> str:
    """Return a number with its sign: ``+0.310``, ``−0.020``."""
    text = number(value)
    return text if value is None or text == MISSING or text.startswith("−") else f"+{text}"


def with_minus_signs(text: str) -> str:
    """Return a sentence with ``−`` for every hyphen that is a minus: before a number, or between two spaces.

    Gates and flags are worded by the evaluation, whose files are ASCII.
    """
    return HYPHEN_AS_MINUS.sub("−", text)


def interval(row: Mapping[str, Any], with_sign: bool = False) -> str:
    """Return the bounds ``low`` and ``high`` of ``row``, ``0.38 to 0.44``; a missing bound is a dash."""
    format_bound = signed if with_sign else number
    return f"{format_bound(row.get('low'))} to {format_bound(row.get('high'))}"


def estimate_text(estimate: Mapping[str, Any] | None) -> dict[str, str]:
    """Return the ``value`` and the ``interval`` of an estimate as text; a dash and no interval without an estimate."""
    if estimate is None:
        return {"value": MISSING, "interval": ""}
    return {"value": number(estimate["value"]), "interval": interval(estimate)}


def value_with_interval(estimate: Mapping[str, Any]) -> str:
    """Return an estimate as ``0.412 (0.38 to 0.44)``."""
    return f"{number(estimate['value'])} ({interval(estimate)})"


def difference_text(row: Mapping[str, Any]) -> dict[str, str]:
    """Return a difference as text: ``change``, ``interval``, corrected ``p``, ``verdict``, ``mark`` and ``words``."""
    verdict = row["verdict"]
    texts = {"change": signed(row["value"]), "interval": interval(row, True), "p": p_value(row["p_holm"])}
    return texts | {"verdict": verdict, "mark": MARKS[verdict], "words": WORDS[verdict]}


def duration(seconds: Any) -> str:
    """Return seconds as ``8 s``, ``3 min 20 s`` or ``2 h 05 min``."""
    if not isinstance(seconds, (int, float)) or not math.isfinite(seconds):
        return MISSING
    # Round first: 59.7 s is one minute, not 60 s.
    rounded = round(seconds)
    if rounded < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{rounded} s"
    if rounded < 3600:
        return f"{rounded // 60} min {rounded % 60:02d} s"
    return f"{rounded // 3600} h {rounded % 3600 // 60:02d} min"


def size(byte_count: Any) -> str:
    """Return bytes in binary units: ``1.9 GiB``."""
    if not isinstance(byte_count, (int, float)):
        return MISSING
    amount = float(byte_count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024 or unit == "GiB":
            break
        amount /= 1024
    return f"{amount:.0f} {unit}" if amount >= 100 or unit == "B" else f"{amount:.1f} {unit}"


def count(value: Any) -> str:
    """Return a large count in short form: ``38.2k``, ``1.4M``."""
    if not isinstance(value, (int, float)):
        return MISSING
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            scale = 1e3 if unit == "k" else limit
            return f"{value / scale:.1f}{unit}"
    return f"{value:,.0f}"


def p_value(value: Any) -> str:
    """Return a p-value as ``0.31``, ``0.034`` or ``< 0.001``."""
    if not isinstance(value, (int, float)):
        return MISSING
    if value < 0.001:
        return "< 0.001"
    return f"{value:.3f}" if value < 0.1 else f"{value:.2f}"
