"""Custom scoring functions: use one in a pipeline as ``score: examples.scorers:letters``.

A scoring function takes the dataset's rows and one response per row, and returns one finite number per response.
``row["prompt"]`` holds the messages, ``row["checks"]`` what your recipe put there, as JSON text.
"""

from typing import Any


def letters(rows: list[dict[str, Any]], responses: list[str]) -> list[float]:
    """Return the share of characters that are ASCII letters; it varies even for an untrained model."""
    return [sum(c.isascii() and c.isalpha() for c in text) / max(len(text), 1) for text in responses]


def short(rows: list[dict[str, Any]], responses: list[str]) -> list[float]:
    """Return 1 for a response of at most ten words, less the longer it is."""
    return [1.0 / max(1.0, len(text.split()) / 10) for text in responses]
