"""The split of a Hub dataset with slices, as ``datasets`` writes it: ``train[:5000]``, ``train[10%:20%]+test``."""

from __future__ import annotations

import re
from dataclasses import dataclass

PART = re.compile(r"(?P<name>[\w.-]+)(?:\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\])?")


@dataclass(frozen=True)
class SplitPart:
    """A split, and the first and the last row to read; None stands for its own first or last row."""

    name: str
    start: str | None = None
    stop: str | None = None

    @property
    def is_stream(self) -> bool:
        """True if the rows can be read without knowing their number."""
        bounds = [bound for bound in (self.start, self.stop) if bound is not None]
        return not any(bound.endswith("%") or bound.startswith("-") for bound in bounds)

    def bounds(self, rows: int | None = None) -> tuple[int, int | None]:
        """Return the numbers of the first row and of the one after the last, from 0; ``rows`` is their number.

        None as the second one stands for the end. A share of the rows is rounded to the nearest row, as in
        ``datasets``.
        """
        first = _row(self.start, rows)
        return (0 if first is None else first), _row(self.stop, rows)


def _row(bound: str | None, rows: int | None) -> int | None:
    if bound is None:
        return None
    if bound.endswith("%"):
        assert rows is not None
        number = round(int(bound[:-1]) * rows / 100)
    else:
        number = int(bound)
    if number < 0:
        assert rows is not None
        number += rows
    return max(0, number if rows is None else min(number, rows))


def parse_split(split: str) -> list[SplitPart]:
    """Return the parts of a split. Raises ``ValueError`` for text that is none."""
    parts = []
    for text in split.split("+"):
        match = PART.fullmatch(text.strip())
        if match is None:
            raise ValueError(
                f"'{text}' is no split; write a name, with rows in brackets: train, train[:5000], train[10%:20%], "
                "train+test"
            )
        parts.append(SplitPart(match["name"], match["start"], match["stop"]))
    return parts
