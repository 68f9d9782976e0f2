"""Scoring functions of your own: name one in a pipeline as ``score: examples.scorers:letters``.

A scoring function takes the dataset's rows and one response for each, and returns one finite number for each.
``row["prompt"]`` holds the messages, ``row["checks"]`` whatever your recipe put there, as JSON text.
"""

from typing import Any


def letters(rows: list[dict[str, Any]], responses: list[str]) -> list[float]:
    """Share of the characters that are ASCII letters: something that even an untrained model varies in."""
    return [sum(c.isascii() and c.isalpha() for c in text) / max(len(text), 1) for text in responses]


def short(rows: list[dict[str, Any]], responses: list[str]) -> list[float]:
    """1 for an answer of at most ten words, less the longer it is."""
    return [1.0 / max(1.0, len(text.split()) / 10) for text in responses]
