"""Makes hostile text on a page harmless: what would be invisible, or would reorder it, is shown as an escape.

HTML is escaped elsewhere (Jinja's autoescape, and ``textContent`` in the page's script). Torch-free.
"""

from __future__ import annotations

import json
from typing import Any

from markupsafe import Markup

from align.errors import printable


def finalize(value: Any) -> Any:
    """Jinja's hook for every value that is put on the page: text becomes printable text, safe markup stays."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    return printable(value)


def script_json(value: Any) -> Markup:
    """JSON for a ``<script type="application/json">`` element: no character in it can end the element."""
    text = json.dumps(_printable_deep(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)  # noqa: S704  (escaped above)


def _printable_deep(value: Any) -> Any:
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {printable(str(key)): _printable_deep(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_printable_deep(item) for item in value]
    return value
