"""The health of training stages: alarms, numbers next to their healthy ranges, and changes that stages measured.

The ranges come from docs/ppo.md, and the limits from the alarms. Torch-free.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from align.report.page.metric_series import Events
from align.report.page.number_format import number
from align.report.scorecard.conclusions import last_change
from align.rl.alarms import COLLAPSED_ENTROPY, KL_PER_TOKEN, LEAST_KL, MANY_CUT, START, SURGED_ENTROPY
from align.store.artifacts import Artifact

LOGGED = {"score", "kl", "entropy", "truncation_rate"}
"""Metrics by which a stage that learns from rollouts is recognized."""
ALARM = re.compile(r"^(?P<stage>[^:]+): (?P<place>(?:update|step) \d+): (?P<name>[\w -]+): ")
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
    rows = []
    for name, stage in stages.items():
        cells = [_cell(measure, stage) for measure in measures]
        rows.append({"stage": name, "alarms": raised_alarms(stage.warnings), "cells": cells})
    return {"columns": measures, "rows": rows}


def raised_alarms(warnings: Sequence[str]) -> list[str]:
    """Return the alarms among a stage's warnings, such as ``KL since update 12``."""
    matches = (ALARM.match(warning) for warning in warnings)
    return [f"{match['name']} since {match['place']}" for match in matches if match]


UNUSABLE = {
    "KL": "the policy has left the language that it started from",
    "divergence": "its held-out loss rose, so it answers worse than before training",
}
"""Alarms after which a checkpoint should not be used, with the reason."""
_COUNTED = re.compile(r"^(?P<place>(?:update|step) \d+): (?P<name>[\w -]+?)(?:, again at .*)?$")
"""An alarm of a record."""


def unusable(artifacts: Sequence[Artifact]) -> list[str]:
    """Return a sentence for each finished stage whose checkpoint should not be used, by the alarms in its record.

    A stage that kept an earlier, validated policy is not among them.
    """
    texts = []
    for artifact in artifacts:
        metrics = artifact.record.get("metrics") or {}
        matches = (_COUNTED.match(line) for line in metrics.get("alarms") or ())
        for match in matches:
            if match is not None and match["name"] in UNUSABLE and "kept" not in metrics:
                reason = f"{UNUSABLE[match['name']]} (alarm {match['name']}, {match['place']})"
                texts.append(f"Do not use the checkpoint of '{artifact.stage}': {reason}.")
    return texts


def result_sentence(artifacts: Sequence[Artifact], card: Mapping[str, Any] | None) -> str:
    """Return the result of a run in a sentence: what not to use, else what the scorecard or the last stage measured."""
    warned = unusable(artifacts)
    if warned:
        return warned[-1]
    change = None if card is None else last_change(dict(card))
    if change is not None:
        return change
    changes = measured_changes(artifacts)
    if changes:
        last = changes[-1]
        return f"{last['stage']}: {last['metric']} {last['before']} → {last['after']}."
    return f"All {len(artifacts)} stages are finished." if len(artifacts) > 1 else "The stage is finished."


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


NAMES = {
    "test_loss": "held-out loss",
    "test_token_accuracy": "held-out token accuracy",
    "test_accuracy": "held-out accuracy",
    "score": "mean score of its samples",
}
"""Metric, without ``_before`` and ``_after`` or ``_first`` and ``_last``, and its name on the page."""
ENDINGS = (("_before", "_after"), ("_first", "_last"))


def measured_changes(artifacts: Sequence[Artifact]) -> list[dict[str, str]]:
    """Return a row for each metric that a finished stage measured before and after its training."""
    rows = []
    for artifact in artifacts:
        metrics = artifact.record.get("metrics") or {}
        for metric, name in NAMES.items():
            for first, last in ENDINGS:
                before = metrics.get(metric + first)
                after = metrics.get(metric + last)
                if isinstance(before, (int, float)) and isinstance(after, (int, float)):
                    texts = {"before": number(before), "after": number(after)}
                    rows.append({"stage": artifact.stage, "metric": name, **texts})
    return rows
