"""The ledger of the ``synthesize`` stage: counts that add up, every dropped text with its reason. Torch-free."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from align.data.builds.ledger import EXAMPLES, Tally
from align.data.rows import REQUIRED, Row, write_rows
from align.data.steps.split import group, share

EXCERPT = 200
"""Characters of a dropped text in the ledger."""


class Ledger:
    """Counts by level (``prompts``, ``responses``, ``comparisons``, ...): everything added is kept or dropped."""

    def __init__(self) -> None:
        self.tallies: dict[str, Tally] = {}
        self.dropped: list[dict[str, Any]] = []
        self.notes: Counter[str] = Counter()
        self._examples: defaultdict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)

    def add(self, level: str, count: int = 1) -> None:
        """Count inputs."""
        self.tallies.setdefault(level, Tally()).rows_in += count

    def keep(self, level: str, count: int = 1) -> None:
        """Count outputs."""
        self.tallies.setdefault(level, Tally()).rows_out += count

    def drop(self, level: str, reason: str, where: str, text: str = "", **detail: Any) -> None:
        """Count an input that is dropped; ``where`` names it."""
        self.tallies.setdefault(level, Tally()).dropped[reason] += 1
        self.dropped.append({"level": level, "reason": reason, "where": where, "text": text, "detail": detail})
        examples = self._examples[level, reason]
        if len(examples) < EXAMPLES:
            excerpt = text if len(text) <= EXCERPT else f"{text[:EXCERPT]}..."
            examples.append({"where": where, "text": excerpt, "detail": detail})

    def to_json(self) -> dict[str, Any]:
        """Return the counts of every level. Raises ``AssertionError`` if they do not add up."""
        levels = {}
        for level, tally in self.tallies.items():
            counts = tally.to_json()
            examples = {reason: self._examples[level, reason] for reason in counts["dropped"]}
            names = {"in": counts["rows_in"], "out": counts["rows_out"], "dropped": counts["dropped"]}
            levels[level] = {**names, "examples": examples}
        return levels

    def counts(self, level: str) -> str:
        """Return a level's counts for messages: ``12 prompts, 3 cut off, 2 empty answer``."""
        tally = self.tallies.get(level, Tally())
        reasons = [f"{count} {reason}" for reason, count in tally.dropped.most_common()]
        return ", ".join([f"{tally.rows_in} {level}", *reasons])


def split_by_prompt(rows: list[Row], test_size: float, seed: int) -> dict[str, list[Row]]:
    """Return the rows of each split: prompts with a draw below ``test_size`` are tested, at least one of two."""
    # By prompt, like the split of a recipe; no split stays empty if there are two prompts.
    draws = {name: share(name, seed) for name in dict.fromkeys(map(group, rows))}
    tested = {name for name, draw in draws.items() if draw < test_size}
    if len(draws) > 1 and not tested:
        tested = {min(draws, key=draws.__getitem__)}
    if len(draws) > 1 and len(tested) == len(draws):
        tested.remove(max(draws, key=draws.__getitem__))
    return {
        "train": [row for row in rows if group(row) not in tested],
        "test": [row for row in rows if group(row) in tested],
    }


def write_table(path: Path, rows: list[Row], columns: tuple[str, ...]) -> None:
    """Write rows as Parquet; without any rows, the file has the required columns and ``columns``."""
    import pyarrow.parquet as pq

    if rows:
        write_rows(path, rows)
        return
    # A table without rows still needs its columns, so write one row and drop it.
    blank: Row = {name: [] if name in ("prompt", *columns) else "" for name in (*REQUIRED, *columns)}
    write_rows(path, [blank])
    pq.write_table(pq.read_table(path).slice(0, 0), path)


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    """Write records as JSON lines."""
    with path.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
