"""Makes hostile text harmless to look at: what would be invisible, or would reorder the page, is shown as an escape.

HTML is escaped elsewhere (Jinja's autoescape, and ``textContent`` in the page's script). Torch-free.
"""

from __future__ import annotations

import json
import unicodedata
from typing import Any

from markupsafe import Markup

KEPT = frozenset("\n\t\u200c\u200d")
"""Line breaks, tabs, and the two joiners that ordinary Persian, Hindi and emoji need."""
HIDDEN = frozenset(("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"))
"""Unicode categories without a glyph: controls, format marks (bidi overrides, tags), lone surrogates, separators."""


def visible(text: str) -> str:
    r"""``text`` with every hidden character as ``\x1b`` or ``\u202e``; what is left can be encoded as UTF-8."""
    if text.isascii() and text.isprintable():
        return text
    shown = text
    for kept in KEPT:
        shown = shown.replace(kept, "")
    if shown.isprintable():  # what is not: HIDDEN, and spaces other than the common one
        return text
    return "".join(_escape(ch) if ch not in KEPT and unicodedata.category(ch) in HIDDEN else ch for ch in text)


def _escape(character: str) -> str:
    code = ord(character)
    if code <= 0xFF:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"


def finalize(value: Any) -> Any:
    """Jinja's hook for every value that is put on the page: text becomes visible text, safe markup stays."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    return visible(value)


def script_json(value: Any) -> Markup:
    """JSON for a ``<script type="application/json">`` element: no character in it can end the element."""
    text = json.dumps(_visible_deep(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)  # noqa: S704  (escaped above)


def _visible_deep(value: Any) -> Any:
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, dict):
        return {visible(str(key)): _visible_deep(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_visible_deep(item) for item in value]
    return value
