"""Training curves and warnings from a stage's ``events.jsonl``. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align.store.events import parse_event

MAX_POINTS = 400
"""Points of a drawn curve; more are averaged in equal runs, which no screen would tell apart."""
FIRST = (
    "loss", "score", "gold", "kl", "length", "eos_rate", "entropy", "accuracy", "rewards/accuracies", "rewards/margins",
    "mean_token_accuracy", "margin", "policy_loss", "value_loss", "clipfrac", "explained_variance", "approx_kl",
    "learning_rate", "grad_norm",
)  # fmt: skip
"""The curves a reader asks for first, in that order; all others follow by name."""
TRAINING_NAME = {
    "token_accuracy": "mean_token_accuracy",
    "accuracy": "rewards/accuracies",
    "margin": "rewards/margins",
    "chosen_reward": "rewards/chosen",
    "rejected_reward": "rewards/rejected",
}
"""What trl calls a value in training that is logged as ``test_<name>`` on held-out rows."""


@dataclass
class Events:
    """What a stage reported: ``series`` maps a metric to its (steps, values), ``warnings`` and ``notes`` are in order.

    Where a value stands for several logged ones, ``spread`` has the (least, greatest) of them, and ``logged`` says how
    many were logged in all.
    """

    series: dict[str, tuple[list[float], list[float]]] = field(default_factory=dict)
    spread: dict[str, tuple[list[float], list[float]]] = field(default_factory=dict)
    logged: dict[str, int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_events(folder: Path) -> Events:
    """Curves, warnings and notes of a stage's folder; a missing file or a damaged line is no error.

    A resumed stage reports some steps twice: the later report counts.
    """
    points: dict[str, dict[float, float]] = {}
    found = Events()
    for event in _lines(folder / "events.jsonl"):
        if event.get("event") in ("warning", "note"):
            messages, message = found.warnings if event["event"] == "warning" else found.notes, event.get("message", "")
            if str(message) not in messages:
                messages.append(str(message))
        elif event.get("event") == "metrics" and isinstance(event.get("step"), (int, float)):
            for name, value in event.items():
                if name in ("event", "time", "step") or isinstance(value, bool):
                    continue
                if isinstance(value, (int, float)) and math.isfinite(value):
                    points.setdefault(name, {})[float(event["step"])] = float(value)
    for name, by_step in points.items():
        steps = sorted(by_step)
        values = [by_step[step] for step in steps]
        found.series[name], found.logged[name] = thin(steps, values), len(steps)
        if len(steps) > MAX_POINTS:
            runs = [values[start:end] for start, end in _runs(len(steps), MAX_POINTS)]
            found.spread[name] = [min(run) for run in runs], [max(run) for run in runs]
    return found


def thin(steps: list[float], values: list[float]) -> tuple[list[float], list[float]]:
    """At most :data:`MAX_POINTS` points: means of equal runs; the last run may be shorter."""
    return thin_to(steps, values, MAX_POINTS)


def thin_to(steps: list[float], values: list[float], most: int) -> tuple[list[float], list[float]]:
    """The same with at most ``most`` points."""
    if len(steps) <= most:
        return steps, values
    runs = _runs(len(steps), most)
    mean = [sum(values[start:end]) / (end - start) for start, end in runs]
    return [sum(steps[start:end]) / (end - start) for start, end in runs], mean


def _runs(count: int, most: int) -> list[tuple[int, int]]:
    """Equal runs of ``count`` points, as (start, end), at most ``most`` of them."""
    run = math.ceil(count / most)
    return [(start, min(count, start + run)) for start in range(0, count, run)]


def panels(series: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """Curves by panel, in reading order: a held-out curve shares the panel of its training curve."""
    groups: dict[str, list[str]] = {}
    for name in series:
        base = _training_name(name)
        if base != name and base not in series:
            base = TRAINING_NAME.get(base, base)
        groups.setdefault(base if base in series else name, []).append(name)
    return sorted(
        ((title, sorted(names, key=lambda name: name != title)) for title, names in groups.items()),
        key=lambda item: _rank(item[0]),
    )


def _training_name(name: str) -> str:
    """A curve's name without the split that it is of."""
    return name.removeprefix("test_").removeprefix("validation_").removeprefix("eval_")


def _rank(title: str) -> tuple[int, str]:
    name = _training_name(title)
    return (FIRST.index(name) if name in FIRST else len(FIRST), name)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with path.open("rb") as file:
            for line in file:
                if b'"metrics"' not in line and b'"warning"' not in line and b'"note"' not in line:
                    continue  # a run of days reports its progress more often than its metrics
                event = parse_event(line)
                if event is not None:
                    yield event
    except OSError:
        return
