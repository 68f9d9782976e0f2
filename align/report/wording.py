"""Numbers, times and verdicts as a reader wants them. Torch-free."""

from __future__ import annotations

import math
from typing import Any

MISSING = "–"
MARKS = {"better": "▲", "worse": "▼", "higher": "↑", "lower": "↓", "unclear": "·"}
"""Verdicts by shape, so that they read without color."""
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
"""Shares of pairs that a reward model orders right, and what they are called."""


def number(value: Any, digits: int = 3) -> str:
    """About ``digits`` significant digits: ``0.412``, ``12.3``, ``1,840``, ``5e-04``."""
    if value is None or isinstance(value, bool) or not isinstance(value, (int, float)):
        return MISSING if value is None else str(value)
    if not math.isfinite(value):
        return MISSING
    size = abs(value)
    if size != 0 and size < 1e-3:
        text = f"{value:.1e}"
    elif size >= 1000 or (isinstance(value, int) and size >= 1):
        text = f"{value:,.0f}"
    elif size >= 100:
        text = f"{value:.1f}"
    else:
        text = f"{value:.{max(0, digits - 1 - (math.floor(math.log10(size)) if size >= 1 else -1))}f}"
    return text.replace("-", "−")


def signed(value: Any) -> str:
    """A number with its sign: ``+0.310``, ``−0.020``."""
    text = number(value)
    return text if value is None or text == MISSING or text.startswith("−") else f"+{text}"


def interval(row: dict[str, Any], with_sign: bool = False) -> str:
    """``0.38 to 0.44``; a missing bound is a dash."""
    show = signed if with_sign else number
    return f"{show(row.get('low'))} to {show(row.get('high'))}"


def duration(seconds: Any) -> str:
    """``8 s``, ``3 min 20 s``, ``2 h 05 min``."""
    if not isinstance(seconds, (int, float)) or not math.isfinite(seconds):
        return MISSING
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def size(count: Any) -> str:
    """Bytes in binary units: ``1.9 GiB``."""
    if not isinstance(count, (int, float)):
        return MISSING
    amount = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024 or unit == "GiB":
            break
        amount /= 1024
    return f"{amount:.0f} {unit}" if amount >= 100 or unit == "B" else f"{amount:.1f} {unit}"


def count(value: Any) -> str:
    """A large count, short: ``38.2k``, ``1.4M``."""
    if not isinstance(value, (int, float)):
        return MISSING
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            scale = 1e3 if unit == "k" else limit
            return f"{value / scale:.1f}{unit}"
    return f"{value:,.0f}"


def p_value(value: Any) -> str:
    """``0.03``, ``< 0.001``."""
    if not isinstance(value, (int, float)):
        return MISSING
    return "< 0.001" if value < 0.001 else f"{value:.3f}" if value < 0.1 else f"{value:.2f}"
