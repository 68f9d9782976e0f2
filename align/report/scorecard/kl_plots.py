"""Plots of score against KL: one point per system on held-out prompts, and the path of a stage over its updates.

A proxy that rises while the gold score falls is over-optimization (arXiv 2210.10760), so both are drawn.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from align.errors import printable
from align.report.curves.metric_series import Events, average_to
from align.report.page.panels import COLORS, LINES, MARKERS, Panel, error_bars, legend_name, nth, styled
from align.report.page.ticks import set_root_ticks

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
        # The KL of best-of-N is at most log N - (N - 1) / N; its bar goes from 0 to that bound.
        is_bound = kl.get("method") == "upper bound"
        arms = [[kl["value"]], [0.0]] if is_bound else error_bars(kl)
        panel.axes.errorbar(
            kl["value"],
            score["value"],
            xerr=arms,
            yerr=error_bars(score),
            marker=nth(MARKERS, index),
            color=nth(COLORS, index),
            markersize=7,
            markeredgecolor="white",
            capsize=2,
            linewidth=1.2,
            linestyle="none",
            label=legend_name(policy),
        )
    root_axis(panel)
    title = card["metrics"][metric]["title"]
    panel.axes.set_xlabel(f"KL to {printable(card['reference'])} (nats, root scale)")
    panel.axes.set_ylabel(title)
    panel.axes.margins(0.12)
    panel.axes.legend(loc="best")
    return panel.svg(f"{title} against KL to {card['reference']}, one point per system")


def has_path(events: Events) -> bool:
    """Return True if a stage logged KL together with a score more than once."""
    return "kl" in events.series and any(len(events.series.get(name, ([],))[0]) > 1 for name in PATHS)


@styled
def training_path(events: Mapping[str, Events], name: str) -> Markup | None:
    """Draw the path of every stage that logged ``name`` and KL, with the numbers of its first and last update.

    Both are means over an update's own rollouts, at the temperature of training and against the stage's own reference.
    None if no stage logged them.
    """
    panel = Panel()
    path_count = 0
    for index, (stage, stage_events) in enumerate(events.items()):
        points = _path_points(stage_events, name)
        if len(points) < 2:
            continue
        path_count += 1
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
            panel.axes.annotate(
                f"{steps[end]:g}", (kls[end], scores[end]), xytext=(4, 4), textcoords="offset points", fontsize=8
            )
    if not path_count:
        return None
    root_axis(panel)
    panel.axes.set_xlabel("KL to the stage's start (nats, root scale)")
    panel.axes.set_ylabel(PATHS[name])
    panel.axes.margins(0.12)
    panel.axes.legend(loc="best")
    return panel.svg(f"{PATHS[name]} against KL over the updates of {', '.join(events)}")


def _path_points(events: Events, name: str) -> list[tuple[float, float, float]]:
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
