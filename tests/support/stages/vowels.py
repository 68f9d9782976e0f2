"""A scoring function, and one that stops the engine it is used with; a stage names them by import path, as users do."""

from __future__ import annotations

import ctypes
import os
from typing import Any

from align.inference.transformers import TransformersEngine

HANGS_AFTER = 2
"""Rollouts that are scored before an engine hangs."""
_scored: list[int] = []


def share(rows: list[dict[str, Any]], responses: list[str]) -> list[float]:
    """Share of a response's characters that are vowels. With ``$ALIGN_TEST_HANGS`` the third rollout never comes."""
    _scored.append(len(responses))
    if os.environ.get("ALIGN_TEST_HANGS") and len(_scored) == HANGS_AFTER:
        TransformersEngine._decode = lambda *arguments: never()  # type: ignore[assignment]
    return [sum(c in "aeiou" for c in text) / max(len(text), 1) for text in responses]


def has_vowel(rows: list[dict[str, Any]], responses: list[str]) -> list[float]:
    """Return 1 for a response with a vowel, else 0: many groups score alike."""
    return [float(any(c in "aeiou" for c in text)) for text in responses]


def never() -> Any:
    """Hang in native code."""
    for _ in range(20):
        ctypes.CDLL(None).sleep(60)
