"""Times and tokens of a run's optimizer steps, read from what the side itself writes. Torch-free.

``align`` writes events with times. trl and LLaMA-Factory print a dict for every step, whose arrival ``process`` times,
and leave ``trainer_state.json`` with exact tokens; LLaMA-Factory has them in ``trainer_log.jsonl`` too, step by step,
which is there even if the model could not be saved.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

REFERENCE_UNIT = "reference answers"
"""Unit of align's progress while a reference model scores the rows."""
TOKENS = ("num_tokens", "num_input_tokens_seen", "total_tokens")
"""Names of the tokens so far in a log: trl's own, transformers', LLaMA-Factory's."""


class UnreadableRun(ValueError):
    """A run ended well and left no steps to measure."""


@dataclass(frozen=True)
class Step:
    """An optimizer step: when it ended (seconds), real tokens up to it, its loss."""

    time: float
    tokens: int
    loss: float


@dataclass(frozen=True)
class Loop:
    """The steps of a run, and the seconds of a reference pass before them (0 where a step does that itself)."""

    steps: list[Step]
    reference_seconds: float = 0.0

    @property
    def tokens(self) -> int:
        """Real tokens of the whole run."""
        return self.steps[-1].tokens

    @property
    def seconds_per_token(self) -> float:
        """Seconds of a real token: of all steps but the first, and of the reference pass over all tokens."""
        first, last = self.steps[0], self.steps[-1]
        return (last.time - first.time) / (last.tokens - first.tokens) + self.reference_seconds / self.tokens


def read_align(folder: Path, kind: str) -> Loop:
    """Read the events of the training stage in ``folder``'s store. Raises ``UnreadableRun`` where there are none."""
    files = sorted((folder / "store" / kind).glob("*/events.jsonl"))
    if len(files) != 1:
        raise UnreadableRun(f"{folder}/store/{kind} has {len(files)} finished stages; one was expected")
    return loop_of_events([json.loads(line) for line in files[0].read_text(encoding="utf-8").splitlines() if line])


def loop_of_events(events: list[dict[str, Any]]) -> Loop:
    """Return the steps and the reference pass in a stage's events, in order of time."""
    steps = [
        Step(event["time"], int(event["tokens"]), float(event["loss"]))
        for event in events
        if event["event"] == "progress" and event.get("unit") == "steps" and event["done"] > 0
    ]
    return Loop(_checked(steps), reference_seconds(events))


def reference_seconds(events: Iterable[dict[str, Any]]) -> float:
    """Return the seconds that a reference model scored the rows before training.

    A pass begins with an event that says 0 answers are done; of a pass without it, the time since the event before
    counts, which is too long rather than too short. Raises ``UnreadableRun`` where there is no such event either.
    """
    total, before = 0.0, None
    for event in events:
        is_reference = event["event"] == "progress" and event.get("unit") == REFERENCE_UNIT
        if is_reference and event["done"] > 0:
            if before is None:
                raise UnreadableRun("the reference pass has no beginning: no event comes before its first answers")
            total += event["time"] - before
        before = event["time"]
    return total


def loop_of_output(lines: Iterable[tuple[float, str]], out: Path) -> Loop:
    """Return the steps in the output of transformers' Trainer; tokens are from the state in ``out``."""
    printed = [(time, values) for time, values in map(_parse_line, lines) if values is not None and "loss" in values]
    tokens = read_tokens(out)
    if len(printed) != len(tokens):
        raise UnreadableRun(f"{len(printed)} steps were printed, and {out} has the tokens of {len(tokens)}")
    return Loop(_checked([Step(time, n, v["loss"]) for (time, v), n in zip(printed, tokens, strict=True)]))


def _parse_line(line: tuple[float, str]) -> tuple[float, dict[str, float] | None]:
    """Return the numbers of a line that a Trainer logs, ``{'loss': '0.69', ...}``; None for any other line."""
    time, text = line
    # A progress bar may stand before it on the same line.
    start = text.rfind("{'loss'")
    if start < 0:
        return time, None
    try:
        return time, {name: float(value) for name, value in ast.literal_eval(text[start:].strip()).items()}
    except (SyntaxError, ValueError, AttributeError):
        return time, None


def read_tokens(out: Path) -> list[int]:
    """Return the real tokens so far at each logged step, from the newest file below ``out`` that has them."""
    states = [out / "trainer_state.json", *sorted(out.glob("checkpoint-*/trainer_state.json"), key=_step_of)[::-1]]
    existing = [path for path in (*states, out / "trainer_log.jsonl") if path.is_file()]
    if not existing:
        raise UnreadableRun(f"{out} has neither trainer_state.json nor trainer_log.jsonl")
    text = existing[0].read_text(encoding="utf-8")
    is_log = existing[0].suffix == ".jsonl"
    history = [json.loads(line) for line in text.splitlines()] if is_log else json.loads(text)["log_history"]
    entries = [entry for entry in history if "loss" in entry]
    names = [name for name in TOKENS if all(name in entry for entry in entries)]
    if not names:
        raise UnreadableRun(f"{existing[0]} has no tokens: neither of {', '.join(TOKENS)} is in every step")
    return [int(entry[names[0]]) for entry in entries]


def _step_of(state: Path) -> int:
    return int(state.parent.name.rpartition("-")[2])


def _checked(steps: list[Step]) -> list[Step]:
    if len(steps) < 2:
        raise UnreadableRun(f"{len(steps)} steps: at least 2 are needed, because the first is not counted")
    if any(later.tokens <= earlier.tokens for earlier, later in pairwise(steps)):
        raise UnreadableRun("a step read no tokens")
    return steps
