"""The embedded dataset: short instructions whose answers a program can check, with correct replies.

Deterministic: ``generate(size, seed)`` gives the same rows on every machine, from the standard library's Mersenne
Twister alone. Each family is one kind of constraint; they take turns, so all have the same share.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable

from align.config.validation import suggest
from align.data.families import lists, sentences
from align.data.families.lists import Family, Task
from align.data.rows import Row, assistant, normalized, user
from align.errors import UserError

VERSION = 1
"""Increased when the same size and seed give other rows than before; part of every data stage's key."""

FAMILIES: dict[str, Family] = {
    **{name: sentences.twisted((name,)) for name in sentences.TWISTS},
    "combined": sentences.combined,
    "sentence_count": lists.sentence_count,
    "exact_words": lists.exact_words,
    "few_words": lists.few_words,
    "question": sentences.question,
    "title": sentences.title,
    "keyword_twice": lists.keyword_twice,
    "bullets": lists.bullets,
    "numbered": lists.numbered,
    "separated": lists.separated,
    "no_comma": lists.no_comma,
    "json": lists.json_object,
    "choose": lists.choose,
    "sort": lists.sort_words,
    "arithmetic": lists.arithmetic,
    "letter_count": lists.letter_count,
    "repeat": lists.repeat,
    "copy": lists.copy,
}
"""Every family by name, as in ``EMBEDDED_FAMILIES``; the name is the row's ``source`` after ``embedded/``."""

TRIES = 2000
"""Attempts to write a prompt that no row has yet."""


def generate(size: int, seed: int, families: Iterable[str] | None = None) -> list[Row]:
    """Return ``size`` shuffled rows with different prompts; the families (all by default) take turns.

    Raises ``UserError`` for a family that does not exist, or one that has no more different prompts.
    """
    names = list(families) if families is not None else list(FAMILIES)
    for name in names:
        if name not in FAMILIES:
            raise UserError(f"embedded data: there is no family '{name}'.{suggest(name, FAMILIES)}")
    # One random stream per family, so another family does not change the rows of these.
    streams = {name: random.Random(f"{seed}:{name}") for name in names}  # noqa: S311  (data, not secrecy)
    used: set[str] = set()
    rows: list[Row] = []
    for index in range(size):
        name = names[index % len(names)]
        rows.append(_row(name, _new_task(name, streams[name], used, len(rows))))
    # The turns of the families must not show in the order of the rows.
    random.Random(f"{seed}:order").shuffle(rows)  # noqa: S311
    return rows


def _new_task(name: str, rng: random.Random, used: set[str], count: int) -> Task:
    """Return a task whose prompt is not in ``used``, and add it; ``count`` is the number of rows so far."""
    for _ in range(TRIES):
        task = FAMILIES[name](rng)
        # Compared as splits compare prompts: rows that differ only in punctuation would be one question.
        key = normalized(task.prompt)
        if key not in used:
            used.add(key)
            return task
    raise UserError(
        f"embedded data: the family '{name}' has no more different prompts after {count} rows in all; ask for fewer "
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
