"""Escapes for hostile text on a page: invisible and reordering characters are shown as escape sequences.

HTML itself is escaped elsewhere: by Jinja's autoescape, and by ``textContent`` in the page's scripts. Torch-free.
"""

from __future__ import annotations

import json
from typing import Any

from markupsafe import Markup

from align.errors import printable


def finalize(value: Any) -> Any:
    """Return a template's value with its text made printable; ``Markup`` is trusted and stays as it is."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    return printable(value)


def script_json(value: Any) -> Markup:
    """Return JSON for a ``<script type="application/json">`` element; no character in it can end the element."""
    text = json.dumps(_make_printable(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)  # noqa: S704  (escaped above)


def _make_printable(value: Any) -> Any:
    """Return nested ``value`` with every text and key made printable."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {printable(str(key)): _make_printable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_make_printable(item) for item in value]
    return value
