"""Names of the formats in which a policy writes tool calls, and patterns of the user's. Torch-free."""

from __future__ import annotations

from typing import Any

from align.config.validation import hint_nearest
from align.errors import shorten

TOOL_FORMATS = ("hermes", "llama3", "mistral", "smollm3", "olmo3")
"""Formats that ``align.data.tool_calls`` parses."""
AUTO = "auto"
PATTERN_PREFIX = "regex:"
GROUPS = ("name", "arguments")
"""Groups that a pattern must have."""


def check_tool_format(name: str) -> None:
    """Raise ``ValueError`` for the name of no format, and for a pattern that cannot be used."""
    if name.startswith(PATTERN_PREFIX):
        compile_call_pattern(name.removeprefix(PATTERN_PREFIX))
    elif name not in (AUTO, *TOOL_FORMATS):
        raise ValueError(
            f"unknown format '{shorten(name)}'.{hint_nearest(name, [*TOOL_FORMATS, AUTO])} "
            f"Known are auto, {', '.join(TOOL_FORMATS)} and regex:PATTERN."
        )


def compile_call_pattern(pattern: str) -> Any:
    """Return a compiled pattern of the package regex, whose searches can have a time limit; ``.`` matches line breaks.

    Raises ``ValueError`` for an invalid pattern, a pattern without the groups ``name`` and ``arguments``, and a pattern
    that matches an empty text.
    """
    import regex

    try:
        compiled = regex.compile(pattern, regex.DOTALL)
    except (regex.error, RecursionError, OverflowError) as error:
        raise ValueError(
            f"'{shorten(pattern)}' is no regular expression ({error}). Correct it; special characters such as [ and "
            "{ need a backslash."
        ) from None
    missing = [group for group in GROUPS if group not in compiled.groupindex]
    if missing:
        raise ValueError(
            f"'{shorten(pattern)}' has no group {' and no group '.join(missing)}. Write them as (?P<name>...) and "
            "(?P<arguments>...)."
        )
    if compiled.match(""):
        raise ValueError(f"'{shorten(pattern)}' matches an empty text, so that every turn would call.")
    return compiled
