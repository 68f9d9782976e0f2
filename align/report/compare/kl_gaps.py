"""KLs of reinforcement learning that differ by orders of magnitude between compared runs. Torch-free."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from align.report.curves.metric_series import Events
from align.report.page.number_format import number
from align.store.artifacts import Artifact

GAP = 100.0
"""Ratio of two typical KLs from which a comparison reports them."""
LEAST_KL = 0.01
"""Nats a response: below it the larger KL is small as well, and the ratio is noise."""
METRIC = "kl"

EventsByRun = Mapping[str, Mapping[str, Events]]
"""Run → stage → its events."""


def kl_gaps(runs: Mapping[str, Mapping[str, Artifact]], events: EventsByRun) -> list[str]:
    """Return a sentence for each stage whose KL differs by two orders of magnitude between runs.

    Stages are compared by name. Runs without a common stage are compared by their last stages that have a KL.
    """
    measured = {run: _typical_kls(by_stage) for run, by_stage in events.items()}
    stages = dict.fromkeys(stage for by_stage in measured.values() for stage in by_stage)
    groups = [{run: stage for run, by_stage in measured.items() if stage in by_stage} for stage in stages]
    groups = [group for group in groups if len(group) > 1]
    if not groups:
        groups = [{run: list(by_stage)[-1] for run, by_stage in measured.items() if by_stage}]
    texts = []
    for group in groups:
        # Runs that share the artifact also share its KL.
        by_key = {str(runs[run][stage].record.get("key")): (run, stage) for run, stage in group.items()}
        texts.append(_describe_gap({place: measured[place[0]][place[1]] for place in by_key.values()}))
    return [text for text in texts if text]


def _typical_kls(by_stage: Mapping[str, Events]) -> dict[str, float]:
    """Return the median KL of the second half of each stage's updates. A stage with one update has no typical KL.

    The first update samples from the reference itself, so its KL is 0 in every run.
    """
    typical = {}
    for stage, events in by_stage.items():
        values = events.series.get(METRIC, ([], []))[1]
        if len(values) > 1:
            typical[stage] = statistics.median(values[len(values) // 2 :])
    return typical


def _describe_gap(kls: Mapping[tuple[str, str], float]) -> str:
    """Return a sentence about the largest and the smallest KL; empty if they are less than ``GAP`` apart."""
    if len(kls) < 2:
        return ""
    low = min(kls, key=lambda place: kls[place])
    high = max(kls, key=lambda place: kls[place])
    if kls[high] < LEAST_KL or kls[high] < GAP * kls[low]:
        return ""
    times = f", {number(kls[high] / kls[low], 2)} times as large" if kls[low] > 0 else ""
    return (
        f"{low[0]}: {low[1]} has a KL of {number(kls[low])} nats a response, and {high[0]}: {high[1]} has "
        f"{number(kls[high])}{times}. One policy has hardly moved or the other one has left its reference: compare "
        "learning_rate, kl_coef and the number of updates before the scores."
    )
