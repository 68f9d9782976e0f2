"""Who wins against whom by a judge: a matrix for each task and judge, a figure, and what the judge's word is worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from align.errors import printable
from align.report.assets import Beside
from align.report.figures import COLORS, INK, Panel, bars, legend_name, styled
from align.report.wording import MARKS, interval, number

Card = Mapping[str, Any]
Row = Mapping[str, Any]

EVEN = 0.5
ENDS = ("value", "low", "high", "n")


def matrices(card: Card, beside: Beside) -> list[dict[str, Any]]:
    """For each task and judge: ``names`` of the columns, ``rows`` of cells, ``counts`` and a ``figure``."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in card["win_rates"]:
        groups.setdefault((row["task"], row["judge"]), []).append(row)
    found = []
    for (task, judge), rows in groups.items():
        seen = {name for row in rows for name in (row["one"], row["other"])}
        names = [name for name in card["policies"] if name in seen]
        names += sorted(seen - set(names))  # opponents that are texts of a benchmark, no systems
        title = str(card["tasks"][task]["title"]) if task in card["tasks"] else task
        figure = beside.figure(f"win-rates-{task}", figure_of(rows, f"{title}, judged by {judge}"))
        found.append(
            {
                "title": title,
                "judge": judge,
                "names": names,
                "rows": [{"name": name, "cells": [_cell(rows, name, other) for other in names]} for name in names],
                "counts": [_counts(row) for row in rows],
                "controlled": any(row.get("length_controlled") for row in rows),
                "figure": figure,
            }
        )
    if card["win_rates"]:
        _keep_table(card, beside)
    return found


@styled
def figure_of(rows: Sequence[Row], label: str) -> Markup:
    """Every comparison's win rate with its 95 % interval; hollow: with the judge's taste for length taken out."""
    panel = Panel(4.6, 0.95 + 0.34 * max(2, len(rows)))
    controlled = False
    for place, row in enumerate(rows):
        for key, shift, face in (("win_rate", -0.12, COLORS[0]), ("length_controlled", 0.14, "white")):
            estimate = row.get(key)
            if not estimate or estimate["value"] is None:
                continue
            controlled = controlled or key == "length_controlled"
            panel.axes.errorbar(
                estimate["value"], place + shift, xerr=bars(estimate), marker="o" if key == "win_rate" else "s",
                color=COLORS[0] if key == "win_rate" else COLORS[1], markerfacecolor=face, markersize=6, capsize=2,
                linewidth=1.2,
            )  # fmt: skip
    panel.axes.axvline(EVEN, color=INK, linestyle=":", linewidth=1.2)
    panel.axes.set_xlim(-0.03, 1.03)
    panel.axes.set_yticks(range(len(rows)), [f"{legend_name(r['one'])} over {legend_name(r['other'])}" for r in rows])
    panel.axes.set_ylim(len(rows) - 0.5, -0.5)
    panel.axes.grid(axis="y", visible=False)
    panel.axes.set_xlabel(
        "win rate (ties and contradictions: half)" + ("\nhollow square: length-controlled" if controlled else "")
    )
    return panel.svg(f"Win rates: {printable(label)}")


def _cell(rows: Sequence[Row], name: str, other: str) -> dict[str, Any] | None:
    """How often ``name`` wins over ``other``; None where they were not compared."""
    for row in rows:
        if (row["one"], row["other"]) == (name, other):
            return _shown(row["win_rate"], row, row.get("length_controlled"), (row["wins"], row["losses"]))
        if (row["one"], row["other"]) == (other, name):
            swapped, controlled = _swapped(row["win_rate"]), row.get("length_controlled")
            return _shown(swapped, row, controlled and _swapped(controlled), (row["losses"], row["wins"]))
    return None


def _shown(estimate: Row, row: Row, controlled: Row | None, wins_and_losses: tuple[float, float]) -> dict[str, Any]:
    wins, losses = wins_and_losses
    return {
        "value": number(estimate["value"]),
        "interval": interval(dict(estimate)),
        "counts": f"{wins:g} won · {row['ties']:g} tied · {losses:g} lost · {row['disagreements']:g} contradicted",
        "controlled": "" if not controlled else f"{number(controlled['value'])} ({interval(dict(controlled))})",
        "verdict": verdict(estimate),
        "mark": MARKS[verdict(estimate)],
    }


def verdict(estimate: Row) -> str:
    """``better`` or ``worse`` where the interval is clear of one half."""
    low, high = estimate.get("low"), estimate.get("high")
    if low is None or high is None or low <= EVEN <= high:
        return "unclear"
    return "better" if low > EVEN else "worse"


def _swapped(estimate: Row) -> dict[str, Any]:
    """The same rate seen from the other side."""
    flip = {key: None if estimate.get(key) is None else 1 - estimate[key] for key in ("value", "low", "high")}
    return {**estimate, "value": flip["value"], "low": flip["high"], "high": flip["low"]}


def _counts(row: Row) -> dict[str, Any]:
    """What the judge's word is worth: how often it contradicts itself, and how often it said nothing readable."""
    share = f"{row['disagreements'] / row['n']:.0%}" if row["n"] else "–"
    return {
        "pair": f"{row['one']} over {row['other']}",
        **{key: f"{row[key]:,}" for key in ("n", "wins", "ties", "losses", "unreadable")},
        "disagreements": f"{row['disagreements']:,} ({share})",
        "win_rate": f"{number(row['win_rate']['value'])} ({interval(dict(row['win_rate']))})",
        "controlled": "–"
        if not row.get("length_controlled")
        else f"{number(row['length_controlled']['value'])} ({interval(dict(row['length_controlled']))})",
    }


def _keep_table(card: Card, beside: Beside) -> None:
    heads = {"task": "Task", "judge": "Judge", "one": "System", "other": "Against", "n": "Compared", "wins": "Won",
             "ties": "Tied", "losses": "Lost", "disagreements": "Contradicted when swapped", "unreadable": "Unreadable",
             "value": "Win rate", "low": "95 % low", "high": "95 % high", "lc_value": "Length-controlled",
             "lc_low": "95 % low, length-controlled", "lc_high": "95 % high, length-controlled"}  # fmt: skip
    rows = []
    for row in card["win_rates"]:
        controlled = row.get("length_controlled") or {}
        ends = {name: row["win_rate"].get(name) for name in ENDS[:3]}
        rows.append({**row, **ends, **{f"lc_{name}": controlled.get(name) for name in ENDS[:3]}})
    beside.table("win-rates", "Win rates", heads, rows)
