"""The project's own dataset: short instructions whose answers a program can check, with right replies.

Deterministic: ``generate(size, seed)`` gives the same rows on every machine, from the standard library's Mersenne
Twister alone. Each family is one sort of constraint; they take turns, so every family has the same share.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable

from align.config.validation import suggest
from align.data.families import lengths, lists, numbers, sentences
from align.data.families.task import Family, Task
from align.data.rows import Row, assistant, normalized, user
from align.errors import UserError

VERSION = 1
"""Bumped when the same size and seed should now give other rows; part of every data stage's key."""

MAX_ROWS = 8_000
"""Beyond this the smaller families run out of different prompts."""

FAMILIES: dict[str, Family] = {
    **{name: sentences.twisted((name,)) for name in sentences.TWISTS},
    "combined": sentences.combined,
    "sentence_count": lengths.sentence_count,
    "exact_words": lengths.exact_words,
    "few_words": lengths.few_words,
    "question": sentences.question,
    "title": sentences.title,
    "keyword_twice": lengths.keyword_twice,
    "bullets": lists.bullets,
    "numbered": lists.numbered,
    "separated": lists.separated,
    "no_comma": lists.no_comma,
    "json": lists.json_object,
    "choose": lists.choose,
    "sort": lists.sort_words,
    "arithmetic": numbers.arithmetic,
    "letter_count": numbers.letter_count,
    "repeat": numbers.repeat,
    "copy": numbers.copy,
}
"""Every family by name; the name is the row's ``source`` after ``embedded/``."""

TRIES = 2000


def generate(size: int, seed: int, families: Iterable[str] | None = None) -> list[Row]:
    """``size`` rows with different prompts, the families (all by default) taking turns, in a shuffled order.

    Raises ``UserError`` for a family that does not exist, or one that has no more different prompts.
    """
    names = list(families) if families is not None else list(FAMILIES)
    for name in names:
        if name not in FAMILIES:
            raise UserError(f"embedded data: there is no family '{name}'.{suggest(name, FAMILIES)}")
    # One stream per family: adding a family leaves the others' rows as they are.
    streams = {name: random.Random(f"{seed}:{name}") for name in names}  # noqa: S311  (data, not secrecy)
    seen: set[str] = set()
    rows: list[Row] = []
    for index in range(size):
        name = names[index % len(names)]
        rows.append(_row(name, _fresh(name, streams[name], seen, len(rows))))
    random.Random(f"{seed}:order").shuffle(rows)  # noqa: S311
    return rows


def _fresh(name: str, rng: random.Random, seen: set[str], made: int) -> Task:
    for _ in range(TRIES):
        task = FAMILIES[name](rng)
        key = normalized(task.prompt)
        if key not in seen:
            seen.add(key)
            return task
    raise UserError(
        f"embedded data: the family '{name}' has no more different prompts after {made} rows in all; ask for fewer "
        "rows or for more families."
    )


def _row(name: str, task: Task) -> Row:
    checks = {"constraints": task.constraints, "guard": task.guard}
    return {
        "id": f"embedded-{hashlib.sha256(task.prompt.encode()).hexdigest()[:12]}",
        "source": f"embedded/{name}",
        "prompt": [user(task.prompt)],
        "checks": json.dumps(checks, sort_keys=True),
        "completion": [assistant(task.reply)],
    }
