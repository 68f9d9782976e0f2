"""Metrics over steps, warnings and notes from a stage's ``events.jsonl``. Torch-free."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align.store.json_files import parse_event

MAX_POINTS = 400
"""Points of a drawn curve; more are averaged in runs of equal length, which no screen shows differently."""
METRICS = json.loads(Path(__file__).with_name("metrics.json").read_text(encoding="utf-8"))
EPISODE_CURVES: list[str] = METRICS["episode_curves"]
"""Curves of stages whose environment answers the policy."""
FIRST_CURVES: list[str] = METRICS["first_curves"]
"""Curves in the order in which readers look for them; all others follow by name."""
TRAINING_NAMES: dict[str, str] = METRICS["training_names"]
"""Name of a held-out metric (logged as ``test_<name>``) → the name under which trl logs it in training."""
TURN_SCORE = re.compile(r"score_turn_(\d+)")
TURNS_PER_PANEL = 6
"""Scores by turn that share a panel; each has its own color and line style."""
SHOWN = (b'"metrics"', b'"warning"', b'"note"', b'"change"')
"""Kinds of the events that a page shows, as a line of the file has them."""
METADATA_FIELDS = ("event", "time", "step")


@dataclass
class Events:
    """Reports of a stage: ``series`` maps a metric to (steps, values); ``warnings`` and ``notes`` are in order.

    Where a point averages several logged values, ``spread`` has their (minima, maxima). ``logged`` has the number of
    logged values of each metric.
    """

    series: dict[str, tuple[list[float], list[float]]] = field(default_factory=dict)
    spread: dict[str, tuple[list[float], list[float]]] = field(default_factory=dict)
    logged: dict[str, int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    changes: dict[float, str] = field(default_factory=dict)
    """Settings that change after a step, in a stage that continues another with other settings."""


def read_events(folder: Path) -> Events:
    """Return metrics, warnings and notes of a stage's folder; a missing file or a damaged line is not an error.

    A resumed stage reports some steps twice; the later report counts.
    """
    points: dict[str, dict[float, float]] = {}
    events = Events()
    for event in _parse_lines(folder / "events.jsonl"):
        kind = event.get("event")
        if kind in ("warning", "note"):
            messages = events.warnings if kind == "warning" else events.notes
            message = str(event.get("message", ""))
            if message not in messages:
                messages.append(message)
        elif kind == "change" and isinstance(event.get("step"), (int, float)):
            events.changes[float(event["step"])] = str(event.get("text", ""))
        elif kind == "metrics" and isinstance(event.get("step"), (int, float)):
            step = float(event["step"])
            for name, value in metric_values(event):
                # A resumed stage logs steps again from its checkpoint; the later value replaces the lost one.
                points.setdefault(name, {})[step] = value
    for name, by_step in points.items():
        _add_series(events, name, by_step)
    return events


def metric_values(event: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield the finite numbers of a ``metrics`` event by name."""
    for name, value in event.items():
        if name in METADATA_FIELDS or isinstance(value, bool):
            continue
        if isinstance(value, (int, float)) and math.isfinite(value):
            yield name, float(value)


def _add_series(events: Events, name: str, by_step: dict[float, float]) -> None:
    """Add a metric's curve, averaged if it has more than :data:`MAX_POINTS` steps, with the range of each mean."""
    steps = sorted(by_step)
    values = [by_step[step] for step in steps]
    events.series[name] = average_to(steps, values)
    events.logged[name] = len(steps)
    if len(steps) > MAX_POINTS:
        runs = [values[start:end] for start, end in _equal_runs(len(steps), MAX_POINTS)]
        events.spread[name] = [min(run) for run in runs], [max(run) for run in runs]


def average_to(
    steps: list[float], values: list[float], max_points: int = MAX_POINTS
) -> tuple[list[float], list[float]]:
    """Return at most ``max_points`` points: means of runs of equal length, of which the last may be shorter."""
    if len(steps) <= max_points:
        return steps, values
    runs = _equal_runs(len(steps), max_points)
    mean_steps = [sum(steps[start:end]) / (end - start) for start, end in runs]
    mean_values = [sum(values[start:end]) / (end - start) for start, end in runs]
    return mean_steps, mean_values


def _equal_runs(count: int, max_runs: int) -> list[tuple[int, int]]:
    """Return at most ``max_runs`` runs of equal length over ``count`` points, as (start, end)."""
    length = math.ceil(count / max_runs)
    return [(start, min(count, start + length)) for start in range(0, count, length)]


def group_by_panel(series: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """Return (title, metrics) of each panel, in reading order.

    A held-out curve shares the panel of its training curve and is second in it. Scores by turn also share panels.
    """
    groups = _group_turns(series)
    grouped = {name for names in groups.values() for name in names}
    for name in series:
        if name in grouped:
            continue
        base = _base_name(name)
        # trl logs some training metrics under other names than the metrics of held-out rows.
        if base != name and base not in series:
            base = TRAINING_NAMES.get(base, base)
        groups.setdefault(base if base in series else name, []).append(name)
    # False sorts before True: the training curve comes first.
    panels = [(title, sorted(names, key=lambda name: name != title)) for title, names in groups.items()]
    return sorted(panels, key=lambda panel: _reading_order(panel[0]))


def _group_turns(series: Iterable[str]) -> dict[str, list[str]]:
    """Return title → scores by turn of each of their panels."""
    turns = sorted(int(match[1]) for name in series if (match := TURN_SCORE.fullmatch(name)))
    groups = {}
    for start in range(0, len(turns), TURNS_PER_PANEL):
        block = turns[start : start + TURNS_PER_PANEL]
        title = f"score_turn_{block[0]}" + (f" to {block[-1]}" if len(block) > 1 else "")
        groups[title] = [f"score_turn_{turn}" for turn in block]
    return groups


def is_episode_panel(title: str) -> bool:
    """Return True if a panel is about episodes, which stages without an environment do not have."""
    return title in EPISODE_CURVES or TURN_SCORE.match(title) is not None


def _base_name(name: str) -> str:
    """Return a curve's name without the split that it was measured on."""
    return name.removeprefix("test_").removeprefix("validation_").removeprefix("eval_")


def _reading_order(title: str) -> tuple[int, str]:
    name = _base_name(title)
    turn = TURN_SCORE.match(name)
    if turn:
        return FIRST_CURVES.index("score"), f"score_turn_{int(turn[1]):06d}"
    if name.startswith("score_") and not name.endswith(("_std", "_correlation")):
        return FIRST_CURVES.index("score"), name  # the rewards of a list, next to their sum
    if "." in name:
        return FIRST_CURVES.index("gold"), name  # metrics of tasks during training, such as gsm8k.final
    return (FIRST_CURVES.index(name) if name in FIRST_CURVES else len(FIRST_CURVES), name)


def _parse_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the metrics, warnings, notes and changes of settings of an event file."""
    try:
        with path.open("rb") as file:
            for line in file:
                # A run of days has far more progress events than metrics: skip them before parsing any JSON.
                if not any(kind in line for kind in SHOWN):
                    continue
                event = parse_event(line)
                if event is not None:
                    yield event
    except OSError:
        return
