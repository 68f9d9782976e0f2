"""Score against drift: one point per system on held-out prompts, and the way a stage took, update by update.

A proxy that rises while the gold score turns is over-optimization (arXiv 2210.10760), so both are drawn.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from align.errors import printable
from align.report.curves import Events, thin_to
from align.report.figures import COLORS, LINES, MARKERS, Panel, bars, legend_name, nth, styled

SCORES = ("reward", "gold")
"""Metrics of the prompt set that are drawn against KL, proxy first."""
PATHS = {"score": "score that was optimized", "gold": "gold score"}
"""What a stage logs an update, and what it is called."""
MOST_POINTS = 40
"""Points of a path; more are means of equal runs of updates."""


@styled
def reward_against_kl(card: Mapping[str, Any], metric: str) -> Markup:
    """One point per system: KL to the reference (nats) across, a score up, 95 % intervals on both.

    A system whose KL is only bounded (best of N) has a bar that ends at the bound.
    """
    panel = Panel()
    for index, policy in enumerate(card["policies"]):
        own = card["estimates"][policy]
        if "kl" not in own or metric not in own or own["kl"]["value"] is None or own[metric]["value"] is None:
            continue
        x, y = own["kl"], own[metric]
        arms = [[x["value"]], [0.0]] if x.get("method") == "upper bound" else bars(x)
        panel.axes.errorbar(
            x["value"], y["value"], xerr=arms, yerr=bars(y), marker=nth(MARKERS, index), color=nth(COLORS, index),
            markersize=7, markeredgecolor="white", capsize=2, linewidth=1.2, linestyle="none",
            label=legend_name(policy),
        )  # fmt: skip
    root_axis(panel)
    panel.axes.set_xlabel(f"KL to {printable(card['reference'])} (nats, root scale)")
    panel.axes.set_ylabel(card["metrics"][metric]["title"])
    panel.axes.margins(0.12)
    panel.axes.legend(loc="best")
    return panel.svg(f"{card['metrics'][metric]['title']} against KL to {card['reference']}, one point per system")


def has_path(events: Events) -> bool:
    """Whether a stage logged KL and a score together."""
    return "kl" in events.series and any(len(events.series.get(name, ([],))[0]) > 1 for name in PATHS)


@styled
def path(events: Mapping[str, Events], name: str) -> Markup | None:
    """The way of every stage that logged ``name`` and KL: from its first update (its number) to its last.

    Both are means over an update's own rollouts, at the temperature of training and against the stage's own reference.
    None where nothing was logged.
    """
    panel = Panel()
    drawn = 0
    for index, (stage, found) in enumerate(events.items()):
        points = _points(found, name)
        if len(points) < 2:
            continue
        drawn += 1
        steps, kls, scores = zip(*points, strict=True)
        panel.axes.plot(
            kls, scores, color=nth(COLORS, index), linestyle=nth(LINES, index), marker=nth(MARKERS, index),
            markersize=3, linewidth=1.1, label=legend_name(stage),
        )  # fmt: skip
        for at in (0, -1):
            panel.axes.annotate(
                f"{steps[at]:g}", (kls[at], scores[at]), xytext=(4, 4), textcoords="offset points", fontsize=8
            )
    if not drawn:
        return None
    root_axis(panel)
    panel.axes.set_xlabel("KL to the stage's start (nats, root scale)")
    panel.axes.set_ylabel(PATHS[name])
    panel.axes.margins(0.12)
    panel.axes.legend(loc="best")
    return panel.svg(f"{PATHS[name]} against KL over the updates of {', '.join(events)}")


def _points(events: Events, name: str) -> list[tuple[float, float, float]]:
    """(step, KL, score) of steps that have both."""
    kl = dict(zip(*events.series.get("kl", ([], [])), strict=True))
    score = dict(zip(*events.series.get(name, ([], [])), strict=True))
    steps = sorted(kl.keys() & score.keys())
    _, kls = thin_to(steps, [kl[step] for step in steps], MOST_POINTS)
    means, scores = thin_to(steps, [score[step] for step in steps], MOST_POINTS)
    return list(zip(means, kls, scores, strict=True))


def root_axis(panel: Panel) -> None:
    """Reward moves with the root of KL, and a base model may be far to the right of all others."""
    from matplotlib.ticker import MaxNLocator

    panel.axes.set_xscale("function", functions=(_signed_root, _signed_square))
    panel.axes.xaxis.set_major_locator(MaxNLocator(nbins=5))


def _signed_root(x: Any) -> Any:
    """Square root that keeps the sign: an estimate of a small KL may be negative."""
    import numpy as np

    return np.sign(x) * np.sqrt(np.abs(x))


def _signed_square(x: Any) -> Any:
    import numpy as np

    return np.sign(x) * np.square(x)
