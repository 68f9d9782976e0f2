"""Reads the responses that stages have written down: rollouts, episodes and answers at validations. Torch-free.

A missing file has no lines, and damaged lines are skipped. The number of lines is bounded, since a file may be large.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence, Set
from itertools import groupby, islice
from pathlib import Path
from typing import Any, TypeVar

MAX_ROLLOUTS = 48
"""Responses of a stage on the page."""
MAX_VALIDATIONS = 8
"""Validations of a stage on the page, side by side."""

Line = dict[str, Any]
Entry = TypeVar("Entry")


def read_lines(path: Path, fields: Set[str]) -> Iterator[Line]:
    """Yield the objects of a JSONL file that have ``fields``; damaged lines are skipped, a missing file has none."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            for text in file:
                try:
                    line = json.loads(text)
                except (ValueError, RecursionError):  # the latter for brackets that nest without end
                    continue
                if isinstance(line, dict) and fields <= line.keys():
                    yield line
    except OSError:
        return


def read_rollouts(path: Path) -> list[Line]:
    """Return at most :data:`MAX_ROLLOUTS` lines of a ``completions.jsonl``, evenly from its first to its last.

    The responses of an update to one prompt stay together.
    """
    lines = read_lines(path, {"prompt", "response"})
    groups = [list(islice(group, MAX_ROLLOUTS)) for _, group in groupby(lines, _prompt_of_update)]
    largest = max(map(len, groups), default=1)
    return [line for group in _evenly(groups, MAX_ROLLOUTS // largest) for line in group]


def read_episodes(path: Path) -> list[Line]:
    """Return the first :data:`MAX_ROLLOUTS` episodes of a stage that samples in an environment, as lines of rollouts.

    ``path`` is its ``samples.jsonl``, in which a line has all episodes of a prompt. No more of the file is read: it may
    have millions of lines, and the page is written again and again.
    """
    lines = (line for prompt in read_lines(path, {"prompt", "episodes"}) for line in _episode_lines(prompt))
    return list(islice(lines, MAX_ROLLOUTS))


def read_validations(path: Path) -> list[list[Line]]:
    """Return the responses to each prompt of a ``validations.jsonl``, in the order of the updates.

    At most :data:`MAX_VALIDATIONS` updates are read, evenly from the first to the last.
    """
    lines = read_lines(path, {"update", "prompt", "response"})
    updates = [list(group) for _, group in groupby(lines, lambda line: str(line["update"]))]
    by_prompt: dict[int, list[Line]] = {}
    for answers in _evenly(updates, MAX_VALIDATIONS):
        # Every validation has the same prompts in the same order.
        for number, line in enumerate(answers):
            by_prompt.setdefault(number, []).append(line)
    return list(by_prompt.values())


def _prompt_of_update(line: Line) -> str:
    return json.dumps([line.get("update"), line["prompt"]])


def _evenly(entries: Sequence[Entry], count: int) -> list[Entry]:
    """Return at most ``count`` entries, evenly from the first to the last."""
    count = min(count, len(entries))
    return [entries[round(index * (len(entries) - 1) / max(1, count - 1))] for index in range(count)]


def _episode_lines(prompt: Line) -> Iterator[Line]:
    episodes, scores = prompt["episodes"], prompt.get("scores") or []
    if not isinstance(episodes, list) or not isinstance(scores, list):
        return
    for index, episode in enumerate(episodes):
        if not isinstance(episode, dict):
            continue
        turns = episode.get("turns")
        score = scores[index] if index < len(scores) else None
        yield episode | {
            "prompt": prompt["prompt"],
            "response": str(episode.get("text", "")),
            "source": f"{prompt.get('split', '')} {prompt.get('id', '')}".strip(),
            "score": score if isinstance(score, int | float) else None,
            "turns": len(turns) if isinstance(turns, list) else 0,
        }
