"""Win rates by a judge: a matrix and a figure for each task and judge, and how consistent the judge was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from align.errors import printable
from align.report.page.assets import AssetWriter
from align.report.page.number_format import MARKS, MISSING, interval, number
from align.report.page.panels import COLORS, INK, Panel, error_bars, legend_name, styled

Card = Mapping[str, Any]
Row = Mapping[str, Any]
"""A comparison of two systems (``one`` and ``other``) in a scorecard."""

EVEN = 0.5
BOUNDS = ("value", "low", "high")
TABLE_COLUMNS = {
    "task": "Task",
    "judge": "Judge",
    "one": "System",
    "other": "Against",
    "n": "Compared",
    "wins": "Won",
    "ties": "Tied",
    "losses": "Lost",
    "disagreements": "Contradicted when swapped",
    "unreadable": "Unreadable",
    "value": "Win rate",
    "low": "95 % low",
    "high": "95 % high",
    "lc_value": "Length-controlled",
    "lc_low": "95 % low, length-controlled",
    "lc_high": "95 % high, length-controlled",
}


def matrices(card: Card, assets: AssetWriter) -> list[dict[str, Any]]:
    """Return for each task and judge: ``names`` of the columns, ``rows`` of cells, ``counts`` and a ``figure``."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in card["win_rates"]:
        groups.setdefault((row["task"], row["judge"]), []).append(row)
    sections = []
    for (task, judge), rows in groups.items():
        compared = {row[side] for row in rows for side in ("one", "other")}
        names = [name for name in card["policies"] if name in compared]
        names += sorted(compared - set(names))  # opponents that are a benchmark's texts, not systems
        title = str(card["tasks"][task]["title"]) if task in card["tasks"] else task
        plot = win_rate_plot(rows, f"{title}, judged by {judge}")
        sections.append(
            {
                "title": title,
                "judge": judge,
                "names": names,
                "rows": [
                    {"name": name, "cells": [_cell(rows, name, opponent) for opponent in names]} for name in names
                ],
                "counts": [_counts(row) for row in rows],
                "controlled": any(row.get("length_controlled") for row in rows),
                "figure": assets.add_figure(f"win-rates-{task}", plot),
            }
        )
    if card["win_rates"]:
        _add_table(card, assets)
    return sections


@styled
def win_rate_plot(rows: Sequence[Row], label: str) -> Markup:
    """Draw every comparison's win rate with its 95 % interval.

    A hollow square is the length-controlled rate, without the judge's preference for long answers.
    """
    panel = Panel(4.6, 0.95 + 0.34 * max(2, len(rows)))
    xlabel = "win rate (ties and contradictions: half)"
    for y, row in enumerate(rows):
        rate = row["win_rate"]
        if rate and rate["value"] is not None:
            panel.axes.errorbar(
                rate["value"],
                y - 0.12,
                xerr=error_bars(rate),
                marker="o",
                color=COLORS[0],
                markerfacecolor=COLORS[0],
                markersize=6,
                capsize=2,
                linewidth=1.2,
            )
        controlled = row.get("length_controlled")
        if controlled and controlled["value"] is not None:
            xlabel = "win rate (ties and contradictions: half)\nhollow square: length-controlled"
            panel.axes.errorbar(
                controlled["value"],
                y + 0.14,
                xerr=error_bars(controlled),
                marker="s",
                color=COLORS[1],
                markerfacecolor="white",
                markersize=6,
                capsize=2,
                linewidth=1.2,
            )
    panel.axes.axvline(EVEN, color=INK, linestyle=":", linewidth=1.2)
    panel.axes.set_xlim(-0.03, 1.03)
    pairs = [f"{legend_name(row['one'])} over {legend_name(row['other'])}" for row in rows]
    panel.name_rows(pairs)
    panel.axes.set_xlabel(xlabel)
    return panel.svg(f"Win rates: {printable(label)}")


def _cell(rows: Sequence[Row], name: str, opponent: str) -> dict[str, Any] | None:
    """Return the cell with the win rate of ``name`` over ``opponent``; None if they were not compared."""
    for row in rows:
        controlled = row.get("length_controlled")
        if (row["one"], row["other"]) == (name, opponent):
            return _cell_text(row["win_rate"], row, controlled, (row["wins"], row["losses"]))
        # The scorecard has each pair once; the mirrored cell shows the same comparison from the other side.
        if (row["one"], row["other"]) == (opponent, name):
            swapped = _swap_sides(row["win_rate"])
            return _cell_text(swapped, row, controlled and _swap_sides(controlled), (row["losses"], row["wins"]))
    return None


def _cell_text(estimate: Row, row: Row, controlled: Row | None, wins_and_losses: tuple[float, float]) -> dict[str, Any]:
    wins, losses = wins_and_losses
    return {
        "value": number(estimate["value"]),
        "interval": interval(dict(estimate)),
        "counts": f"{wins:g} won · {row['ties']:g} tied · {losses:g} lost · {row['disagreements']:g} contradicted",
        "controlled": _with_interval(controlled) if controlled else "",
        "verdict": verdict(estimate),
        "mark": MARKS[verdict(estimate)],
    }


def _with_interval(estimate: Row) -> str:
    return f"{number(estimate['value'])} ({interval(dict(estimate))})"


def verdict(estimate: Row) -> str:
    """Return ``better`` or ``worse`` if the interval is clear of one half, else ``unclear``."""
    low, high = estimate.get("low"), estimate.get("high")
    # Copies of a system have no interval, because they were not measured.
    if low is None or high is None or low <= EVEN <= high:
        return "unclear"
    return "better" if low > EVEN else "worse"


def _swap_sides(estimate: Row) -> dict[str, Any]:
    """Return the same rate from the opponent's side."""
    flipped = {key: None if estimate.get(key) is None else 1 - estimate[key] for key in BOUNDS}
    return {**estimate, "value": flipped["value"], "low": flipped["high"], "high": flipped["low"]}


def _counts(row: Row) -> dict[str, Any]:
    """Return a comparison's counts, with how often the judge contradicted itself and how often it was unreadable."""
    share = f"{row['disagreements'] / row['n']:.0%}" if row["n"] else MISSING
    controlled = row.get("length_controlled")
    return {
        "pair": f"{row['one']} over {row['other']}",
        **{key: f"{row[key]:,}" for key in ("n", "wins", "ties", "losses", "unreadable")},
        "disagreements": f"{row['disagreements']:,} ({share})",
        "win_rate": _with_interval(row["win_rate"]),
        "controlled": _with_interval(controlled) if controlled else MISSING,
    }


def _add_table(card: Card, assets: AssetWriter) -> None:
    rows = []
    for row in card["win_rates"]:
        controlled = row.get("length_controlled") or {}
        rate = {name: row["win_rate"].get(name) for name in BOUNDS}
        rows.append({**row, **rate, **{f"lc_{name}": controlled.get(name) for name in BOUNDS}})
    assets.add_table("win-rates", "Win rates", TABLE_COLUMNS, rows)
