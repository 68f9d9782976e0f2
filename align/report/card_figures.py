"""Figures of a scorecard: each task's numbers, scores by source, lengths, what ends by itself, refusals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from align.report.figures import COLORS, GRID, LINES, MARKERS, Panel, bars, either, legend_name, nth, styled

Card = Mapping[str, Any]

MOST_SOURCES = 30
BINS = 24
REFUSALS = "xstest"
"""Kind of the tasks whose rates are about refusing."""


@styled
def task_scores(card: Card, metric: str, title: str) -> Markup:
    """One metric of every system with its 95 % interval; the reference's value as a line."""
    policies = [name for name in card["policies"] if card["estimates"][name].get(metric, {}).get("value") is not None]
    panel = Panel(3.0, 0.85 + 0.21 * max(2, len(policies)))
    for place, policy in enumerate(policies):
        estimate = card["estimates"][policy][metric]
        index = card["policies"].index(policy)
        panel.axes.errorbar(
            estimate["value"], place, xerr=bars(estimate), marker=nth(MARKERS, index), color=nth(COLORS, index),
            markersize=5.5, capsize=2, linewidth=1.2,
        )  # fmt: skip
    reference = card["estimates"][card["reference"]].get(metric)
    if reference is not None and reference["value"] is not None:
        panel.axes.axvline(reference["value"], color="#8b95a5", linestyle=":", linewidth=1)
    panel.axes.set_yticks(range(len(policies)), [legend_name(name)[:20] for name in policies])
    panel.axes.set_ylim(len(policies) - 0.5, -0.5)
    panel.axes.grid(axis="y", visible=False)
    panel.axes.set_xlabel(f"{card['metrics'][metric]['unit']}", fontsize=8)
    panel.axes.set_title(legend_name(title), fontsize=9, loc="left")
    return panel.svg(f"{title} of every system")


@styled
def by_family(card: Card, metric: str, most: int = MOST_SOURCES) -> Markup | None:
    """The metric of every system in each source, 95 % intervals; the ``most`` largest sources."""
    families = sorted(card["families"].items(), key=lambda item: -item[1]["n"])[:most]
    families = [(name, family) for name, family in sorted(families) if family["estimates"]]
    if not families:
        return None
    policies = card["policies"]
    panel = Panel(8.0, 0.9 + 0.18 * len(families) * max(2, len(policies)) * 0.62)
    step = 0.7 / max(1, len(policies))
    for index, policy in enumerate(policies):
        rows = [
            (place + (index - (len(policies) - 1) / 2) * step, family["estimates"].get(policy, {}).get(metric))
            for place, (_, family) in enumerate(families)
        ]
        rows = [(y, estimate) for y, estimate in rows if estimate is not None and estimate["value"] is not None]
        for y, estimate in rows:
            panel.axes.plot(
                [either(estimate["low"], estimate["value"]), either(estimate["high"], estimate["value"])], [y, y],
                color=nth(COLORS, index), linewidth=1.1, alpha=0.7,
            )  # fmt: skip
        panel.axes.plot(
            [estimate["value"] for _, estimate in rows], [y for y, _ in rows], linestyle="none",
            marker=nth(MARKERS, index), color=nth(COLORS, index), markersize=5, label=legend_name(policy),
        )  # fmt: skip
    panel.axes.set_yticks(range(len(families)), [f"{legend_name(name)}  (n={f['n']})" for name, f in families])
    panel.axes.set_ylim(len(families) - 0.5, -0.5)
    panel.axes.grid(axis="y", visible=False)
    for place in range(1, len(families)):
        panel.axes.axhline(place - 0.5, color=GRID, linewidth=0.8)
    panel.axes.set_xlabel(card["metrics"][metric]["title"])
    panel.figure.legend(loc="outside upper center", ncols=min(6, len(policies)))
    return panel.svg(f"{card['metrics'][metric]['title']} of each system by source")


@styled
def length_histogram(lengths: Mapping[str, Sequence[int]], what: str = "") -> Markup:
    """Share of responses by length in tokens, one outline per system; ``what`` is for the label alone."""
    import numpy as np

    panel = Panel()
    longest = max((max(values, default=1) for values in lengths.values()), default=1)
    edges = np.linspace(0, longest + 1, min(BINS, longest + 1) + 1)
    for index, (policy, values) in enumerate(lengths.items()):
        if not values:
            continue
        counts, _ = np.histogram(values, edges)
        panel.axes.stairs(
            counts / len(values), edges, color=nth(COLORS, index), linestyle=nth(LINES, index), linewidth=1.6,
            label=legend_name(policy),
        )  # fmt: skip
    panel.axes.set_xlabel("tokens of a response")
    panel.axes.set_ylabel("share of responses")
    panel.axes.legend(loc="best")
    return panel.svg(f"Distribution of response lengths of each system{what}")


@styled
def rates(card: Card, metrics: Sequence[str], xlabel: str, label: str) -> Markup:
    """Shares from 0 to 1 of every system, a marker for each of ``metrics``, with 95 % intervals."""
    policies = [name for name in card["policies"] if any(metric in card["estimates"][name] for metric in metrics)]
    panel = Panel(3.9, 0.85 + 0.3 * max(2, len(policies)) + (0.2 if len(metrics) > 1 else 0))
    step = 0.6 / max(1, len(metrics))
    for index, metric in enumerate(metrics):
        for place, policy in enumerate(policies):
            estimate = card["estimates"][policy].get(metric)
            if estimate is None or estimate["value"] is None:
                continue
            at = place + (index - (len(metrics) - 1) / 2) * step
            panel.axes.errorbar(
                estimate["value"], at, xerr=bars(estimate), marker=nth(MARKERS, index), color=nth(COLORS, index),
                markersize=5.5, capsize=2, linewidth=1.2, linestyle="none",
            )  # fmt: skip
        panel.axes.plot([], [], linestyle="none", marker=nth(MARKERS, index), color=nth(COLORS, index),
                        label=legend_name(card["metrics"][metric]["title"]))  # fmt: skip
    panel.axes.set_xlim(-0.03, 1.03)
    panel.axes.set_yticks(range(len(policies)), [legend_name(name) for name in policies])
    panel.axes.set_ylim(len(policies) - 0.5, -0.5)
    panel.axes.grid(axis="y", visible=False)
    panel.axes.set_xlabel(xlabel)
    if len(metrics) > 1:
        panel.figure.legend(loc="outside upper center", ncols=2)
    return panel.svg(label)


def refusal_metrics(card: Card) -> dict[str, list[str]]:
    """Task → its shares, of tasks about refusing."""
    return {
        name: [metric for metric in about["metrics"] if _is_share(card, metric)]
        for name, about in card["tasks"].items()
        if about["kind"] == REFUSALS
    }


def _is_share(card: Card, metric: str) -> bool:
    values = [per[metric]["value"] for per in card["estimates"].values() if metric in per]
    return all(value is None or 0 <= value <= 1 for value in values)
