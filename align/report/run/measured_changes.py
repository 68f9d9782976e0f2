"""Changes that training stages measured on held-out rows or on their own samples, before any evaluation is there."""

from __future__ import annotations

from collections.abc import Sequence

from align.report.page.number_format import number
from align.store.artifacts import Artifact

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
                before, after = metrics.get(metric + first), metrics.get(metric + last)
                if isinstance(before, (int, float)) and isinstance(after, (int, float)):
                    rows.append(
                        {"stage": artifact.stage, "metric": name, "before": number(before), "after": number(after)}
                    )
    return rows
