"""Plots of a scorecard: each task's numbers, scores by source, response lengths, finish and refusal rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from align.report.page.panels import (
    COLORS,
    GRID,
    LINES,
    MARKERS,
    Panel,
    error_bars,
    legend_name,
    nth,
    styled,
    value_or,
)
from align.report.page.ticks import set_whole_ticks

Card = Mapping[str, Any]

MAX_SOURCES = 30
BINS = 24
REFUSALS = "xstest"
"""Kind of the tasks whose rates are about refusing."""


@styled
def task_scores(card: Card, metric: str, title: str) -> Markup:
    """Draw one metric of every system with its 95 % interval, and the reference's value as a dotted line."""
    policies = [name for name in card["policies"] if card["estimates"][name].get(metric, {}).get("value") is not None]
    panel = Panel(3.0, 0.85 + 0.21 * max(2, len(policies)))
    for y, policy in enumerate(policies):
        estimate = card["estimates"][policy][metric]
        # A system has the same marker and color on every figure, whichever systems it lacks.
        index = card["policies"].index(policy)
        panel.axes.errorbar(
            estimate["value"],
            y,
            xerr=error_bars(estimate),
            marker=nth(MARKERS, index),
            color=nth(COLORS, index),
            markersize=5.5,
            capsize=2,
            linewidth=1.2,
        )
    reference = card["estimates"][card["reference"]].get(metric)
    if reference is not None and reference["value"] is not None:
        panel.axes.axvline(reference["value"], color="#8b95a5", linestyle=":", linewidth=1)
    panel.name_rows([legend_name(name)[:20] for name in policies])
    panel.axes.set_xlabel(f"{card['metrics'][metric]['unit']}", fontsize=8)
    panel.axes.set_title(legend_name(title), fontsize=9, loc="left")
    return panel.svg(f"{title} of every system")


@styled
def scores_by_family(card: Card, metric: str, limit: int = MAX_SOURCES) -> Markup | None:
    """Draw the metric of every system in each source (family), with 95 % intervals; the ``limit`` largest sources.

    None if no source has an estimate.
    """
    largest = sorted(card["families"].items(), key=lambda item: -item[1]["n"])[:limit]
    families = [(name, family) for name, family in sorted(largest) if family["estimates"]]
    if not families:
        return None
    policies = card["policies"]
    panel = Panel(8.0, 0.9 + 0.18 * len(families) * max(2, len(policies)) * 0.62)
    step = 0.7 / max(1, len(policies))
    for index, policy in enumerate(policies):
        # The systems of a source are below each other, centered on the source's line.
        offset = (index - (len(policies) - 1) / 2) * step
        rows = []
        for position, (_, family) in enumerate(families):
            estimate = family["estimates"].get(policy, {}).get(metric)
            if estimate is not None and estimate["value"] is not None:
                rows.append((position + offset, estimate))
        for y, estimate in rows:
            bounds = [value_or(estimate[end], estimate["value"]) for end in ("low", "high")]
            panel.axes.plot(bounds, [y, y], color=nth(COLORS, index), linewidth=1.1, alpha=0.7)
        panel.axes.plot(
            [estimate["value"] for _, estimate in rows],
            [y for y, _ in rows],
            linestyle="none",
            marker=nth(MARKERS, index),
            color=nth(COLORS, index),
            markersize=5,
            label=legend_name(policy),
        )
    panel.name_rows([f"{legend_name(name)}  (n={family['n']})" for name, family in families])
    for boundary in range(1, len(families)):
        panel.axes.axhline(boundary - 0.5, color=GRID, linewidth=0.8)
    panel.axes.set_xlabel(card["metrics"][metric]["title"])
    panel.figure.legend(loc="outside upper center", ncols=min(6, len(policies)))
    return panel.svg(f"{card['metrics'][metric]['title']} of each system by source")


@styled
def length_histogram(lengths: Mapping[str, Sequence[int]], label_suffix: str = "") -> Markup:
    """Draw the share of responses by length in tokens, with an outline for each system."""
    import numpy as np

    panel = Panel()
    # One set of edges for all systems, up to the longest response: a peak in the last bin is the token limit.
    longest = max((max(tokens, default=1) for tokens in lengths.values()), default=1)
    edges = np.linspace(0, longest + 1, min(BINS, longest + 1) + 1)
    for index, (policy, tokens) in enumerate(lengths.items()):
        if not tokens:
            continue
        counts, _ = np.histogram(tokens, edges)
        panel.axes.stairs(
            # Shares, since systems may have different numbers of responses.
            counts / len(tokens),
            edges,
            color=nth(COLORS, index),
            linestyle=nth(LINES, index),
            linewidth=1.6,
            label=legend_name(policy),
        )
    set_whole_ticks(panel.axes.xaxis)
    panel.axes.set_xlabel("tokens of a response")
    panel.axes.set_ylabel("share of responses")
    panel.axes.legend(loc="best")
    return panel.svg(f"Distribution of response lengths of each system{label_suffix}")


@styled
def rates(card: Card, metrics: Sequence[str], xlabel: str, label: str) -> Markup:
    """Draw shares from 0 to 1 of every system with 95 % intervals, and a marker for each of ``metrics``."""
    policies = [name for name in card["policies"] if any(metric in card["estimates"][name] for metric in metrics)]
    panel = Panel(3.9, 0.85 + 0.3 * max(2, len(policies)) + (0.2 if len(metrics) > 1 else 0))
    step = 0.6 / max(1, len(metrics))
    for index, metric in enumerate(metrics):
        offset = (index - (len(metrics) - 1) / 2) * step
        for position, policy in enumerate(policies):
            estimate = card["estimates"][policy].get(metric)
            if estimate is None or estimate["value"] is None:
                continue
            panel.axes.errorbar(
                estimate["value"],
                position + offset,
                xerr=error_bars(estimate),
                marker=nth(MARKERS, index),
                color=nth(COLORS, index),
                markersize=5.5,
                capsize=2,
                linewidth=1.2,
                linestyle="none",
            )
        title = legend_name(card["metrics"][metric]["title"])
        marker, color = nth(MARKERS, index), nth(COLORS, index)
        panel.axes.plot([], [], linestyle="none", marker=marker, color=color, label=title)
    panel.axes.set_xlim(-0.03, 1.03)
    panel.name_rows([legend_name(name) for name in policies])
    panel.axes.set_xlabel(xlabel)
    if len(metrics) > 1:
        panel.figure.legend(loc="outside upper center", ncols=2)
    return panel.svg(label)


def refusal_metrics(card: Card) -> dict[str, list[str]]:
    """Return task → metrics that are shares, for the tasks about refusing."""
    return {
        name: [metric for metric in task["metrics"] if _is_share(card, metric)]
        for name, task in card["tasks"].items()
        if task["kind"] == REFUSALS
    }


def _is_share(card: Card, metric: str) -> bool:
    values = [estimates[metric]["value"] for estimates in card["estimates"].values() if metric in estimates]
    return all(value is None or 0 <= value <= 1 for value in values)
