"""Plots of a scorecard: each task's numbers, scores by source, lengths, rates, and score against KL.

A proxy that rises while the gold score falls is over-optimization (arXiv 2210.10760), so both are drawn against KL.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from align.errors import printable
from align.report.page.metric_series import Events, average_to
from align.report.page.panels import (
    COLORS,
    GRID,
    LINES,
    MARKERS,
    Panel,
    legend_name,
    nth,
    set_root_ticks,
    set_whole_ticks,
    styled,
    value_or,
)

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
        panel.add_point(estimate, y, index, markersize=5.5)
    reference = card["estimates"][card["reference"]].get(metric)
    if reference is not None and reference["value"] is not None:
        panel.axes.axvline(reference["value"], color="#8b95a5", linestyle=":", linewidth=1)
    panel.name_rows([legend_name(name)[:20] for name in policies])
    panel.axes.set_xlabel(f"{card['metrics'][metric]['unit']}", fontsize=8)
    panel.axes.set_title(legend_name(title), fontsize=9, loc="left")
    return panel.svg(f"{title} of every system")


@styled
def scores_by_family(card: Card, metric: str) -> Markup | None:
    """Draw the metric of every system in each of the largest sources (families), with 95 % intervals.

    None if no source has an estimate.
    """
    largest = sorted(card["families"].items(), key=lambda item: -item[1]["n"])[:MAX_SOURCES]
    families = [(name, family) for name, family in sorted(largest) if family["estimates"]]
    if not families:
        return None
    policies = card["policies"]
    panel = Panel(8.0, 0.9 + 0.18 * len(families) * max(2, len(policies)) * 0.62)
    step = 0.7 / max(1, len(policies))
    for index, policy in enumerate(policies):
        # The systems of a source are below each other, centered on the source's line.
        offset = (index - (len(policies) - 1) / 2) * step
        color = nth(COLORS, index)
        values: list[float] = []
        positions: list[float] = []
        for position, (_, family) in enumerate(families):
            estimate = family["estimates"].get(policy, {}).get(metric)
            if estimate is not None and estimate["value"] is not None:
                values.append(estimate["value"])
                positions.append(position + offset)
                bounds = [value_or(estimate[end], estimate["value"]) for end in ("low", "high")]
                panel.axes.plot(bounds, [position + offset] * 2, color=color, linewidth=1.1, alpha=0.7)
        style = {"linestyle": "none", "marker": nth(MARKERS, index), "color": color, "markersize": 5}
        panel.axes.plot(values, positions, label=legend_name(policy), **style)
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
            panel.add_point(estimate, position + offset, index, markersize=5.5, linestyle="none")
        title = legend_name(card["metrics"][metric]["title"])
        style = {"linestyle": "none", "marker": nth(MARKERS, index), "color": nth(COLORS, index)}
        panel.axes.plot([], [], label=title, **style)
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


PATHS = {"score": "score that was optimized", "gold": "gold score"}
"""Metrics that a stage logs for each update, with their titles."""
MAX_PATH_POINTS = 40
"""Points of a path; more are averaged over runs of updates of equal length."""


@styled
def reward_against_kl(card: Mapping[str, Any], metric: str) -> Markup:
    """Draw one point per system: KL to the reference in nats across, a score up, 95 % intervals on both.

    A system with a mere upper bound on its KL (best of N) has a bar that ends at the bound.
    """
    panel = Panel()
    for index, policy in enumerate(card["policies"]):
        kl = card["estimates"][policy].get("kl")
        score = card["estimates"][policy].get(metric)
        if kl is None or score is None or kl["value"] is None or score["value"] is None:
            continue
        if kl.get("method") == "upper bound":
            # The KL of best-of-N is at most log N - (N - 1) / N; its bar goes from 0 to that bound.
            kl = {"value": kl["value"], "low": 0.0, "high": kl["value"]}
        style = {"markersize": 7, "markeredgecolor": "white", "linestyle": "none"}
        panel.add_point(kl, score, index, label=legend_name(policy), **style)
    root_axis(panel)
    title = card["metrics"][metric]["title"]
    panel.axes.set_xlabel(f"KL to {printable(card['reference'])} (nats, root scale)")
    panel.axes.set_ylabel(title)
    panel.axes.margins(0.12)
    panel.axes.legend(loc="best")
    return panel.svg(f"{title} against KL to {card['reference']}, one point per system")


@styled
def training_path(events: Mapping[str, Events], name: str) -> Markup | None:
    """Draw the path of every stage that logged ``name`` and KL, with the numbers of its first and last update.

    Both are means over an update's own rollouts, at the temperature of training and against the stage's own reference.
    None if no stage logged them.
    """
    paths = {stage: _path_points(stage_events, name) for stage, stage_events in events.items()}
    paths = {stage: points for stage, points in paths.items() if len(points) > 1}
    if not paths:
        return None
    panel = Panel()
    # A stage has the same color in the figures of all metrics.
    stages = [stage for stage, stage_events in events.items() if "kl" in stage_events.series]
    for stage, points in paths.items():
        index = stages.index(stage)
        steps, kls, scores = zip(*points, strict=True)
        panel.axes.plot(
            kls,
            scores,
            color=nth(COLORS, index),
            linestyle=nth(LINES, index),
            marker=nth(MARKERS, index),
            markersize=3,
            linewidth=1.1,
            label=legend_name(stage),
        )
        for end in (0, -1):
            # The direction of a path shows only by its first and last update.
            place = (kls[end], scores[end])
            panel.axes.annotate(f"{steps[end]:g}", place, (4, 4), textcoords="offset points", fontsize=8)
    root_axis(panel)
    panel.axes.set_xlabel("KL to the stage's start (nats, root scale)")
    panel.axes.set_ylabel(PATHS[name])
    panel.axes.margins(0.12)
    panel.axes.legend(loc="best")
    return panel.svg(f"{PATHS[name]} against KL over the updates of {', '.join(paths)}")


def _path_points(events: Events, name: str) -> list[tuple[float, ...]]:
    """Return (step, KL, score) of the steps that have both, averaged to at most :data:`MAX_PATH_POINTS`."""
    kl = dict(zip(*events.series.get("kl", ([], [])), strict=True))
    score = dict(zip(*events.series.get(name, ([], [])), strict=True))
    # A stage may log the two at different steps; a point needs both.
    steps = sorted(kl.keys() & score.keys())
    # Both are averaged over the same runs of steps, so each point stays a pair.
    _, kls = average_to(steps, [kl[step] for step in steps], MAX_PATH_POINTS)
    mean_steps, scores = average_to(steps, [score[step] for step in steps], MAX_PATH_POINTS)
    return list(zip(mean_steps, kls, scores, strict=True))


def root_axis(panel: Panel) -> None:
    """Give the KL axis a root scale: reward grows with the root of KL, and a base model may be far to the right."""
    panel.axes.set_xscale("function", functions=(_signed_root, _signed_square))
    set_root_ticks(panel.axes.xaxis)


def _signed_root(x: Any) -> Any:
    """Return the square root with the sign of ``x``: an estimate of a small KL may be negative."""
    import numpy as np

    return np.sign(x) * np.sqrt(np.abs(x))


def _signed_square(x: Any) -> Any:
    """Return the square with the sign of ``x``, the inverse of :func:`_signed_root`."""
    import numpy as np

    return np.sign(x) * np.square(x)
