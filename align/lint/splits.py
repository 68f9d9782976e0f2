"""Checks between rows: the same prompt on both sides of the split, the same tokens twice."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence

from align.data.rows import Row, normalized, prompt_key
from align.lint.findings import Findings, Place

GRAM, COVERED, FEWEST = 8, 0.8, 16
"""A test prompt of at least ``FEWEST`` words is nearly leaked when one training prompt has this share of its word
sequences of length ``GRAM``. Shorter prompts are mostly the words of their kind of question."""


def check_leaks(train: Sequence[tuple[Place, Row]], test: Sequence[tuple[Place, Row]], found: Findings) -> None:
    """Prompts of ``test`` that ``train`` has too: word for word as splits compare them, or nearly so."""
    known = {prompt_key(row): place for place, row in reversed(train)}
    rest: list[tuple[Place, Row]] = []
    for place, row in test:
        first = known.get(prompt_key(row))
        if first is None:
            rest.append((place, row))
        else:
            found.add("leaked-prompt", place, f"also {first}: {row['prompt'][-1]['content']}")
    _check_nearly(train, rest, found)


def _check_nearly(train: Sequence[tuple[Place, Row]], test: Sequence[tuple[Place, Row]], found: Findings) -> None:
    """By shared word sequences, from an index of the test prompts' (the smaller side)."""
    index: dict[int, list[int]] = defaultdict(list)
    sizes: list[int] = []
    for number, (_, row) in enumerate(test):
        grams = _grams(row)
        sizes.append(len(grams) if len(grams) > FEWEST - GRAM else 0)
        for gram in grams if sizes[-1] else ():
            index[gram].append(number)
    reported: set[int] = set()
    for place, row in train:
        hits = Counter(number for gram in _grams(row) & index.keys() for number in index[gram])
        for number, count in hits.items():
            if count >= COVERED * sizes[number] and number not in reported:
                reported.add(number)
                text = test[number][1]["prompt"][-1]["content"]
                found.add("nearly-leaked-prompt", test[number][0], f"{count} of {sizes[number]} in {place}: {text}")


def _grams(row: Row) -> set[int]:
    words = " ".join(normalized(turn["content"] or "") for turn in row["prompt"] if turn["role"] == "user").split()
    return {hash(tuple(words[at : at + GRAM])) for at in range(len(words) - GRAM + 1)}


class Repeats:
    """Remembers which token sequences were met."""

    def __init__(self) -> None:
        self._seen: dict[bytes, Place] = {}

    def check(self, sequences: Sequence[list[int]], place: Place, text: str, found: Findings) -> None:
        """``sequences`` are all of one row's."""
        key = hashlib.blake2b(repr(sequences).encode(), digest_size=16).digest()
        first = self._seen.setdefault(key, place)
        if first is not place:
            found.add("duplicate-row", place, f"same as {first}: {text}")
