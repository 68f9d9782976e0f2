"""Differences between two texts, word by word, for answers that are shown side by side."""

from __future__ import annotations

import re

from align.errors import missing_extra

MAX_WORDS = 10_000
"""Words and signs of a text; longer texts are not compared."""
SAME, ADDED, REMOVED = "same", "added", "removed"
Pieces = list[tuple[str, str]]

_WORD = re.compile(r"\w+\s*|[^\w\s]\s*|\s+")


def diff_words(before: str, after: str) -> Pieces | None:
    """Return the pieces of ``after`` with the words that ``before`` has in their place. White space is not compared.

    A piece is ``(SAME, text)``, ``(ADDED, text)`` for words that only ``after`` has, or ``(REMOVED, text)`` for words
    that only ``before`` has. The same and the added pieces together are ``after``. None if a text is too long.
    """
    try:
        # difflib needs a minute for a response that repeats one word 1,400 times; rapidfuzz needs a millisecond.
        from rapidfuzz.distance import Indel
    except ImportError:
        raise missing_extra("rapidfuzz", "studio", "align studio") from None
    old = _WORD.findall(before)
    new = _WORD.findall(after)
    if max(len(old), len(new)) > MAX_WORDS:
        return None
    pieces: Pieces = []
    removed = ""
    added = ""
    for step in Indel.opcodes([word.strip() for word in old], [word.strip() for word in new]):
        if step.tag != "equal":
            # Words that replace others come in turns; they are read as one change.
            removed += "".join(old[step.src_start : step.src_end])
            added += "".join(new[step.dest_start : step.dest_end])
            continue
        pieces += _change(removed, added)
        pieces.append((SAME, "".join(new[step.dest_start : step.dest_end])))
        removed = ""
        added = ""
    return pieces + _change(removed, added)


def _change(removed: str, added: str) -> Pieces:
    return [(kind, text) for kind, text in ((REMOVED, removed), (ADDED, added)) if text]
