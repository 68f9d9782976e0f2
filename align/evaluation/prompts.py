"""Which held-out prompts are answered: a seeded choice that every compared checkpoint can read in full. Torch-free."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

Row = dict[str, Any]


class Renders(Protocol):
    """A compared system, as far as this file needs to know one."""

    @property
    def name(self) -> str:
        """As the scorecard calls it."""
        ...

    def render(self, messages: list[Any], *, tools: str | None = None) -> list[int]:
        """Token ids of a conversation, up to where the answer begins."""
        ...


@dataclass(frozen=True)
class Policy:
    """One compared checkpoint: its name in the pipeline, its folder, the digest of its files, and its tokenizer."""

    name: str
    model_dir: Path
    key: str
    tokenizer: Any


def choose_rows(rows: list[Row], most: int | None, seed: int) -> list[Row]:
    """At most ``most`` rows, drawn without replacement from ``seed`` and left in their order."""
    if most is None or most >= len(rows):
        return rows
    picked = random.Random(seed).sample(range(len(rows)), most)  # noqa: S311
    return [rows[index] for index in sorted(picked)]


def render_for_all(
    rows: list[Row], systems: Sequence[Renders], longest: int
) -> tuple[list[Row], Mapping[str, list[list[int]]], int]:
    """Rows whose prompt fits ``longest`` tokens under every template, their ids by system, and how many do not.

    Dropping a row for all systems keeps every comparison paired; a prompt that was cut would ask something else.
    """
    rendered = {
        system.name: [system.render(row["prompt"], tools=row.get("tools")) for row in rows] for system in systems
    }
    kept = [index for index in range(len(rows)) if all(len(ids[index]) <= longest for ids in rendered.values())]
    chosen = {name: [ids[index] for index in kept] for name, ids in rendered.items()}
    return [rows[index] for index in kept], chosen, len(rows) - len(kept)
