"""A sweep on the page that compares its runs: all trials in one table, objectives against settings. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from align.errors import printable
from align.report.assets import Beside, Figure
from align.report.figures import COLORS, INK, Panel, bars, legend_name, styled
from align.report.wording import MISSING, duration, interval, number

MAX_FIGURES = 12
WIDE = 30.0
"""Ratio of the largest to the smallest value from which an axis is logarithmic."""


@dataclass(frozen=True)
class SweepTrials:
    """A sweep's trials as plain data. Each row has ``number``, ``run``, ``state``, ``best``, ``draw``, ``values``,
    ``intervals``, ``seconds`` and ``note``; rows are in the order shown.
    """

    dimensions: Sequence[str]
    objectives: Sequence[Mapping[str, Any]]
    """Each with ``name`` and ``better`` (``higher`` or ``lower``)."""
    rows: Sequence[Mapping[str, Any]]
    sentences: Sequence[str] = field(default_factory=list)


def sweep_section(trials: SweepTrials | None, beside: Beside) -> dict[str, Any] | None:
    """What the page's section about a sweep shows; the table lies beside the page, too."""
    if trials is None:
        return None
    names = [str(one["name"]) for one in trials.objectives]
    columns = {"number": "Trial", "run": "Run", "state": "State", "best": "Not beaten"}
    columns |= {f"set {name}": name for name in trials.dimensions}
    for name in names:
        columns |= {name: name, f"{name} low": f"{name} 95 % low", f"{name} high": f"{name} 95 % high"}
    columns |= {"seconds": "Seconds", "note": "Note"}
    plain = []
    for row in trials.rows:
        one = {key: row[key] for key in ("number", "run", "state", "best", "seconds", "note")}
        one |= {f"set {name}": value for name, value in row["draw"].items()}
        for name in names:
            low, high = row["intervals"].get(name) or (None, None)
            one |= {name: row["values"].get(name), f"{name} low": low, f"{name} high": high}
        plain.append(one)
    beside.table("trials", "Trials of the sweep", columns, plain)
    return {
        "dimensions": trials.dimensions,
        "objectives": trials.objectives,
        "rows": [_shown(row, trials) for row in trials.rows],
        "sentences": trials.sentences,
        "figures": _figures(trials, beside),
    }


def _shown(row: Mapping[str, Any], trials: SweepTrials) -> dict[str, Any]:
    cells = []
    for one in trials.objectives:
        value = row["values"].get(one["name"])
        low, high = row["intervals"].get(one["name"]) or (None, None)
        between = interval({"low": low, "high": high}) if low is not None and high is not None else ""
        cells.append({"value": MISSING if value is None else number(value), "interval": between})
    return {
        **{key: row[key] for key in ("number", "run", "state", "best", "note")},
        "draw": [_value(row["draw"].get(name)) for name in trials.dimensions],
        "cells": cells,
        "seconds": MISSING if row["seconds"] is None else duration(row["seconds"]),
    }


def _value(value: Any) -> str:
    if value is None:
        return MISSING
    return f"{value:g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)


def _figures(trials: SweepTrials, beside: Beside) -> list[Figure]:
    """Each objective against each dimension, one point a trial that is done."""
    done = [row for row in trials.rows if row["values"]]
    found: list[Figure] = []
    for one in trials.objectives:
        for name in trials.dimensions:
            rows = [row for row in done if name in row["draw"]]
            if len({str(row["draw"][name]) for row in rows}) < 2 or len(found) >= MAX_FIGURES:
                continue
            caption = f"{one['name']} ({one['better']} is better) against {name}, one point per trial"
            found.append(
                beside.figure(f"sweep-{one['name']}-{name}", slice_plot(rows, str(one["name"]), name), caption)
            )
    return found


@styled
def slice_plot(rows: Sequence[Mapping[str, Any]], objective: str, name: str) -> Markup:
    """An objective against one setting with 95 % intervals; trials that no other beats are ringed."""
    panel = Panel(3.9, 2.6)
    axes = panel.axes
    drawn = [row["draw"][name] for row in rows]
    numeric = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in drawn)
    labels = list(dict.fromkeys(str(value) for value in drawn))
    places = [float(value) if numeric else float(labels.index(str(value))) for value in drawn]
    for place, row in zip(places, rows, strict=True):
        low, high = row["intervals"].get(objective) or (None, None)
        estimate = {"value": row["values"][objective], "low": low, "high": high}
        axes.errorbar(
            place, estimate["value"], yerr=bars(estimate), marker="o", markersize=5, color=COLORS[0], capsize=2,
            linewidth=0.9,
        )  # fmt: skip
        if row["best"]:
            axes.plot(
                place, estimate["value"], marker="o", markersize=12, markerfacecolor="none", markeredgecolor=INK,
                linestyle="none",
            )  # fmt: skip
    if not numeric:
        axes.set_xticks(range(len(labels)), [legend_name(label) for label in labels], fontsize=7.5)
        axes.set_xlim(-0.5, len(labels) - 0.5)
    elif min(places) > 0 and max(places) / min(places) >= WIDE:
        axes.set_xscale("log")
    axes.set_xlabel(printable(name))
    axes.set_ylabel(printable(objective))
    return panel.svg(f"{objective} against {name}, {len(rows)} trials")
