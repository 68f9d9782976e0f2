"""Which held-out prompts are answered: a seeded choice that every compared checkpoint can read in full. Torch-free."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from align.models.render import render_prompt

Row = dict[str, Any]


@dataclass(frozen=True)
class Policy:
    """One compared checkpoint: its name in the pipeline, its folder, its artifact's key, and its tokenizer."""

    name: str
    model_dir: Any
    key: str
    tokenizer: Any


def choose_rows(rows: list[Row], most: int | None, seed: int) -> list[Row]:
    """At most ``most`` rows, drawn without replacement from ``seed`` and left in their order."""
    if most is None or most >= len(rows):
        return rows
    picked = random.Random(seed).sample(range(len(rows)), most)  # noqa: S311
    return [rows[index] for index in sorted(picked)]


def render_for_all(
    rows: list[Row], policies: list[Policy], longest: int
) -> tuple[list[Row], Mapping[str, list[list[int]]], int]:
    """Rows whose prompt fits ``longest`` tokens under every template, their ids by policy, and how many do not.

    Dropping a row for all policies keeps every comparison paired; a prompt that was cut would ask something else.
    """
    rendered = {
        policy.name: [render_prompt(policy.tokenizer, row["prompt"], row.get("tools")) for row in rows]
        for policy in policies
    }
    kept = [index for index in range(len(rows)) if all(len(ids[index]) <= longest for ids in rendered.values())]
    chosen = {name: [ids[index] for index in kept] for name, ids in rendered.items()}
    return [rows[index] for index in kept], chosen, len(rows) - len(kept)
