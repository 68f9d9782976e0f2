"""Misspelled keys of shipped YAML files, and the sweeps among these."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SWEEPS = sorted(Path("pipelines/sweeps").rglob("*.yaml"))


def keys(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(node, dict):
        for key, value in node.items():
            if isinstance(key, str):  # a number is a value, such as the step from which a layer is trained
                yield (*path, key)
            yield from keys(value, (*path, key))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from keys(value, (*path, index))


def misspell(word: str, rng: random.Random) -> str:
    index = rng.randrange(len(word))
    kind = rng.choice(["drop", "double", "swap", "wrong"]) if len(word) > 2 else "double"
    if kind == "drop":
        wrong = word[:index] + word[index + 1 :]
    elif kind == "double":
        wrong = word[:index] + word[index] + word[index:]
    elif kind == "swap" and index + 1 < len(word) and word[index] != word[index + 1]:
        wrong = word[:index] + word[index + 1] + word[index] + word[index + 2 :]
    else:
        wrong = word[:index] + ("x" if word[index] != "x" else "y") + word[index + 1 :]
    return wrong


def rename(raw: dict[str, Any], path: tuple[Any, ...], name: str) -> dict[str, Any]:
    changed = copy.deepcopy(raw)
    index: Any = changed
    for part in path[:-1]:
        index = index[part]
    renamed = {(name if key == path[-1] else key): value for key, value in index.items()}
    index.clear()
    index.update(renamed)
    return changed
