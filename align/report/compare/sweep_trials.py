"""A sweep's section on the comparison of its runs: a table of all trials, objectives against settings. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from align.errors import printable
from align.report.page.assets import AssetWriter, Figure, estimate_cells, estimate_columns
from align.report.page.number_format import MISSING, duration, interval, number, with_minus_signs
from align.report.page.panels import COLORS, INK, Panel, error_bars, legend_name, styled

MAX_FIGURES = 12
LOG_SCALE_RATIO = 30.0
"""Ratio of the largest to the smallest value from which an axis is logarithmic."""
STATE_COLUMNS = {"number": "Trial", "run": "Run", "state": "State", "best": "Not beaten"}
END_COLUMNS = {"seconds": "Seconds", "note": "Note"}


@dataclass(frozen=True)
class SweepTrials:
    """A sweep's trials as plain data, in the order shown.

    Each row has ``number``, ``run``, ``state``, ``best``, ``draw`` (setting → value), ``values`` and ``intervals`` (by
    objective), ``seconds`` and ``note``.
    """

    dimensions: Sequence[str]
    objectives: Sequence[Mapping[str, Any]]
    """Each with ``name`` and ``better`` (``higher`` or ``lower``)."""
    rows: Sequence[Mapping[str, Any]]
    sentences: Sequence[str] = field(default_factory=list)


def sweep_section(trials: SweepTrials | None, assets: AssetWriter) -> dict[str, Any] | None:
    """Return the page's section about a sweep; its table is added to the files next to the page."""
    if trials is None:
        return None
    _add_trial_table(trials, assets)
    return {
        "dimensions": trials.dimensions,
        "objectives": trials.objectives,
        "has_ties": sum(bool(row["best"]) for row in trials.rows) > 1,
        "rows": [_display_row(row, trials) for row in trials.rows],
        "sentences": [with_minus_signs(sentence) for sentence in trials.sentences],
        "figures": _figures(trials, assets),
    }


def _add_trial_table(trials: SweepTrials, assets: AssetWriter) -> None:
    """Add the trials, unrounded: one row a trial, a column for each setting and three for each objective."""
    objectives = [str(objective["name"]) for objective in trials.objectives]
    columns = dict(STATE_COLUMNS) | {f"set {name}": name for name in trials.dimensions}
    for name in objectives:
        columns |= estimate_columns(name, name)
    rows = []
    for trial in trials.rows:
        row = {name: trial[name] for name in (*STATE_COLUMNS, *END_COLUMNS)}
        row |= {f"set {name}": value for name, value in trial["draw"].items()}
        for name in objectives:
            low, high = trial["intervals"].get(name) or (None, None)
            row |= estimate_cells(name, {"value": trial["values"].get(name), "low": low, "high": high})
        rows.append(row)
    assets.add_table("trials", "Trials of the sweep", columns | END_COLUMNS, rows)


def _display_row(row: Mapping[str, Any], trials: SweepTrials) -> dict[str, Any]:
    """Return a trial with its numbers as text."""
    cells = []
    for objective in trials.objectives:
        low, high = row["intervals"].get(objective["name"]) or (None, None)
        bounds = interval({"low": low, "high": high}) if low is not None and high is not None else ""
        cells.append({"value": number(row["values"].get(objective["name"])), "interval": bounds})
    return {
        **{key: row[key] for key in ("number", "run", "state", "best", "note")},
        "draw": [_setting_text(row["draw"].get(name)) for name in trials.dimensions],
        "cells": cells,
        "seconds": MISSING if row["seconds"] is None else duration(row["seconds"]),
    }


def _setting_text(value: Any) -> str:
    if value is None:
        return MISSING
    if isinstance(value, float):
        return with_minus_signs(f"{value:g}")
    return value if isinstance(value, str) else json.dumps(value)


def _figures(trials: SweepTrials, assets: AssetWriter) -> list[Figure]:
    """Return each objective against each setting that varies, one point per finished trial."""
    finished = [row for row in trials.rows if row["values"]]
    figures: list[Figure] = []
    for objective in trials.objectives:
        title = str(objective["name"])
        for name in trials.dimensions:
            rows = [row for row in finished if name in row["draw"]]
            # A setting with one value in all finished trials has no visible effect on the objective.
            is_varied = len({str(row["draw"][name]) for row in rows}) > 1
            if not is_varied or len(figures) >= MAX_FIGURES:
                continue
            caption = f"{title} ({objective['better']} is better) against {name}, one point per trial"
            figures.append(assets.add_figure(f"sweep-{title}-{name}", slice_plot(rows, title, name), caption))
    return figures


@styled
def slice_plot(rows: Sequence[Mapping[str, Any]], objective: str, name: str) -> Markup:
    """Draw an objective against one setting with 95 % intervals; rings mark trials that no other beats."""
    panel = Panel(3.9, 2.6)
    axes = panel.axes
    settings = [row["draw"][name] for row in rows]
    # Settings that are not all numbers get one position each, in the order of their first trial.
    is_numeric = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in settings)
    labels = list(dict.fromkeys(str(value) for value in settings))
    positions = [float(value) if is_numeric else float(labels.index(str(value))) for value in settings]
    for position, row in zip(positions, rows, strict=True):
        low, high = row["intervals"].get(objective) or (None, None)
        estimate = {"value": row["values"][objective], "low": low, "high": high}
        axes.errorbar(
            position,
            estimate["value"],
            yerr=error_bars(estimate),
            marker="o",
            markersize=5,
            color=COLORS[0],
            capsize=2,
            linewidth=0.9,
        )
        if row["best"]:
            axes.plot(
                position,
                estimate["value"],
                marker="o",
                markersize=12,
                markerfacecolor="none",
                markeredgecolor=INK,
                linestyle="none",
            )
    if not is_numeric:
        axes.set_xticks(range(len(labels)), [legend_name(label) for label in labels], fontsize=7.5)
        axes.set_xlim(-0.5, len(labels) - 0.5)
    elif min(positions) > 0 and max(positions) / min(positions) >= LOG_SCALE_RATIO:
        # Learning rates and the like are searched over orders of magnitude.
        axes.set_xscale("log")
    axes.set_xlabel(printable(name))
    axes.set_ylabel(printable(objective))
    return panel.svg(f"{objective} against {name}, {len(rows)} trials")
