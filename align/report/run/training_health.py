"""The health of stages that learn from their rollouts: alarms, and a few numbers next to their healthy ranges.

The ranges come from docs/ppo.md, and the limits from the alarms. Torch-free.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from align.report.curves.metric_series import Events
from align.report.page.number_format import number
from align.rl.alarms import COLLAPSED_ENTROPY, KL_PER_TOKEN, LEAST_KL, MANY_CUT, START, SURGED_ENTROPY

LOGGED = {"score", "kl", "entropy", "truncation_rate"}
"""Metrics by which a stage that learns from rollouts is recognized."""
ALARM = re.compile(r"^(?P<stage>[^:]+): update (?P<update>\d+): (?P<name>[\w -]+): ")
"""Beginning of the warning about an alarm."""


@dataclass(frozen=True)
class Health:
    """A metric of the table: its healthy range in words, and whether (start, now, length) is inside of it."""

    metric: str
    title: str
    healthy: str
    is_healthy: Callable[[float, float, float], bool]
    as_share: bool = False


MEASURES = (
    Health("score", "Reward", "rises", lambda start, now, length: now >= start),
    Health("gold", "Gold", "rises with the reward", lambda start, now, length: now >= start),
    Health(
        "kl",
        "KL to the reference",
        f"rises slowly; below {KL_PER_TOKEN:g} nat a token",
        lambda start, now, length: now <= max(LEAST_KL, KL_PER_TOKEN * length),
    ),
    Health(
        "entropy",
        "Entropy",
        f"falls slowly; {COLLAPSED_ENTROPY:g} to {SURGED_ENTROPY:g} times the start",
        lambda start, now, length: COLLAPSED_ENTROPY * start <= now <= SURGED_ENTROPY * start,
    ),
    Health(
        "truncation_rate",
        "Cut off",
        f"falls to 0; below {MANY_CUT:.0%}",
        lambda start, now, length: now < MANY_CUT,
        as_share=True,
    ),
)


def training_health(events: Mapping[str, Events]) -> dict[str, Any] | None:
    """Return the table's ``columns`` (title, healthy range) and ``rows``; None if no stage learns from rollouts."""
    stages = {name: stage for name, stage in events.items() if stage.series.keys() >= LOGGED}
    if not stages:
        return None
    measures = [measure for measure in MEASURES if any(measure.metric in stage.series for stage in stages.values())]
    return {
        "columns": [{"title": measure.title, "healthy": measure.healthy} for measure in measures],
        "rows": [
            {
                "stage": name,
                "alarms": raised_alarms(stage.warnings),
                "cells": [_cell(measure, stage) for measure in measures],
            }
            for name, stage in stages.items()
        ],
    }


def raised_alarms(warnings: Sequence[str]) -> list[str]:
    """Return the alarms among a stage's warnings, such as ``KL since update 12``."""
    matches = (ALARM.match(warning) for warning in warnings)
    return [f"{match['name']} since update {match['update']}" for match in matches if match]


def _cell(measure: Health, events: Events) -> dict[str, Any]:
    """Return the metric at the start and now, and whether it is healthy; a metric that was not logged is a dash."""
    if measure.metric not in events.series:
        return {"text": number(None), "ok": True}
    values = events.series[measure.metric][1]
    # Single updates are noisy. As for the alarms, the start is the mean of the first updates.
    count = max(1, min(START, len(values) // 4))
    start = statistics.fmean(values[:count])
    now = statistics.fmean(values[-count:])
    length = events.series["length"][1][-1] if "length" in events.series else 0.0
    texts = [f"{value:.0%}" if measure.as_share else number(value) for value in (start, now)]
    return {"text": " → ".join(texts), "ok": measure.is_healthy(start, now, length)}
