"""Win rates by a judge: a matrix and a figure for each task and judge, and how consistent the judge was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from align.errors import printable
from align.report.page.assets import AssetWriter
from align.report.page.number_format import MARKS, MISSING, estimate_text, value_with_interval
from align.report.page.panels import INK, Panel, legend_name, styled

Card = Mapping[str, Any]
Row = Mapping[str, Any]
"""A comparison of two systems (``one`` and ``other``) in a scorecard."""

EVEN = 0.5
BOUNDS = ("value", "low", "high")


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
        cells = {name: [_cell(rows, name, opponent) for opponent in names] for name in names}
        sections.append(
            {
                "title": title,
                "judge": judge,
                "names": names,
                "rows": [{"name": name, "cells": cells[name]} for name in names],
                "counts": [_counts(row) for row in rows],
                "controlled": any(row.get("length_controlled") for row in rows),
                "figure": assets.add_figure(f"win-rates-{task}", plot),
            }
        )
    table = []
    for row in card["win_rates"]:
        controlled = {f"lc_{name}": (row.get("length_controlled") or {}).get(name) for name in BOUNDS}
        table.append({**row, **{name: row["win_rate"].get(name) for name in BOUNDS}, **controlled})
    if table:
        assets.add_table("win-rates", table)
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
            panel.add_point(rate, y - 0.12)
        controlled = row.get("length_controlled")
        if controlled and controlled["value"] is not None:
            xlabel = "win rate (ties and contradictions: half)\nhollow square: length-controlled"
            panel.add_point(controlled, y + 0.14, 1, markerfacecolor="white")
    panel.axes.axvline(EVEN, color=INK, linestyle=":", linewidth=1.2)
    panel.axes.set_xlim(-0.03, 1.03)
    pairs = [f"{legend_name(row['one'])} over {legend_name(row['other'])}" for row in rows]
    panel.name_rows(pairs)
    panel.axes.set_xlabel(xlabel)
    return panel.svg(f"Win rates: {printable(label)}")


def _cell(rows: Sequence[Row], name: str, opponent: str) -> dict[str, Any] | None:
    """Return the cell with the win rate of ``name`` over ``opponent``; None if they were not compared."""
    row = next((row for row in rows if {row["one"], row["other"]} == {name, opponent}), None)
    if row is None:
        return None
    if row["one"] != name:
        # The scorecard has each pair once; the mirrored cell shows the same comparison from the other side.
        rates = {key: _swap_sides(row[key]) for key in ("win_rate", "length_controlled") if row.get(key)}
        row = {**row, **rates, "wins": row["losses"], "losses": row["wins"]}
    rate = row["win_rate"]
    counts = {"won": "wins", "tied": "ties", "lost": "losses", "contradicted": "disagreements"}
    return {
        **estimate_text(rate),
        "counts": " · ".join(f"{row[key]:g} {words}" for words, key in counts.items()),
        "controlled": value_with_interval(row["length_controlled"]) if row.get("length_controlled") else "",
        "verdict": verdict(rate),
        "mark": MARKS[verdict(rate)],
    }


def verdict(estimate: Row) -> str:
    """Return ``better`` or ``worse`` if the interval is clear of one half, else ``unclear``."""
    low = estimate.get("low")
    high = estimate.get("high")
    # Copies of a system have no interval, because they were not measured.
    if low is None or high is None or low <= EVEN <= high:
        return "unclear"
    return "better" if low > EVEN else "worse"


def _swap_sides(estimate: Row) -> dict[str, Any]:
    """Return the same rate from the opponent's side."""
    value, low, high = (None if estimate.get(key) is None else 1 - estimate[key] for key in BOUNDS)
    return {**estimate, "value": value, "low": high, "high": low}


def _counts(row: Row) -> dict[str, Any]:
    """Return a comparison's counts, with how often the judge contradicted itself and how often it was unreadable."""
    share = f"{row['disagreements'] / row['n']:.0%}" if row["n"] else MISSING
    controlled = row.get("length_controlled")
    return {
        "pair": f"{row['one']} over {row['other']}",
        **{key: f"{row[key]:,}" for key in ("n", "wins", "ties", "losses", "unreadable")},
        "disagreements": f"{row['disagreements']:,} ({share})",
        "win_rate": value_with_interval(row["win_rate"]),
        "controlled": value_with_interval(controlled) if controlled else MISSING,
    }
