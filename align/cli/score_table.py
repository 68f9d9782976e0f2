"""A scorecard as a table in the terminal: every number with its interval, every clear difference marked."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from align.errors import printable
from align.report.page.number_format import ACCURACIES, MARKS, interval, number

STYLES = {"better": "green", "worse": "red"}
PLAIN_WIDTH = 400
"""Columns if output is not a terminal: a table in a file is not folded."""

Card = dict[str, Any]


def print_scorecard(path: Path, console: Console | None = None) -> None:
    """Print the scorecard in ``path``: metrics down, systems across, then its gates and flags."""
    card: Card = json.loads(path.read_text(encoding="utf-8"))
    if console is None:
        console = Console(highlight=False)
        if not console.is_terminal:
            console = Console(highlight=False, width=PLAIN_WIDTH)
    systems, models = score_table(card), reward_table(card)
    if systems.row_count:
        console.print(systems)
    if models.row_count:
        console.print(models)
    console.print(_text(legend(card)), style="dim", soft_wrap=True)
    for line, style in findings(card):
        console.print(_text(line), style=style, soft_wrap=True)


def score_table(card: Card) -> Table:
    """Return the table of metrics by system. Its text has no markup and no control characters."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for system in card["policies"]:
        tag = _tag(card, system)
        table.add_column(_text(f"{system} ({tag})" if tag else system))
    task = None
    for name, metric in card["metrics"].items():
        cells = [_cell(card, system, name) for system in card["policies"]]
        if not any(cell.plain for cell in cells):
            continue
        # A line between the metrics of different tasks.
        if metric.get("task") != task and task is not None:
            table.add_section()
        task = metric.get("task")
        table.add_row(_title(name, metric), *cells, style="bold" if name == card["primary"] else "")
    return table


def reward_table(card: Card) -> Table:
    """Return the table of reward models: numbers down, a column for each model and set of pairs."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    reports = card.get("reward_models") or []
    table.add_column(_text("reward models"))
    for report in reports:
        task = str(report.get("task", "pairs"))
        title = str(card["tasks"][task]["title"]) if task in card["tasks"] else "held-out pairs"
        column = _text(f"{report.get('stage', 'reward model')} on {title}")
        column.append(f"\n{printable(task)}", style="dim not bold")
        table.add_column(column)
    if reports:
        for key, title in {"pairs": "pairs", "ties": "ties of its scores"}.items():
            table.add_row(_text(title), *(_text(number(report.get(key))) for report in reports))
    names = {key: f"ordered right, {title}" for key, title in ACCURACIES.items()} | {"margin": "mean score difference"}
    for key, title in names.items():
        cells = [_estimate(report.get(key)) for report in reports]
        if any(cell.plain for cell in cells):
            table.add_row(_text(title), *cells, style="bold" if key == "as_labeled" else "")
    return table


def _estimate(estimate: Any) -> Text:
    """Return a number above its interval; empty without a number."""
    row = estimate if isinstance(estimate, dict) else {"value": estimate}
    if row.get("value") is None:
        return Text()
    text = Text(number(row["value"]))
    if isinstance(row.get("low"), (int, float)):
        text.append(f"\n{interval(row)}", style="dim not bold")
    return text


def _title(name: str, metric: dict[str, Any]) -> Text:
    """Return a metric's title above its name, which gates and ``--set`` use; only the name if they are equal."""
    text = _text(str(metric["title"]))
    if metric["title"] == name:
        return text
    text.append(f"\n{printable(name)}", style="dim not bold")
    return text


def _tag(card: Card, system: str) -> str:
    if system == card["base"]:
        return "base"
    return "reference" if system == card["reference"] else ""


def _cell(card: Card, system: str, metric: str) -> Text:
    """Return ``0.412 ▲`` above its interval; empty if the system has no such number."""
    estimate = card["estimates"].get(system, {}).get(metric)
    if estimate is None or estimate.get("value") is None:
        return Text()
    verdict = _verdict(card, system, metric)
    mark = f" {MARKS[verdict]}" if verdict in MARKS and verdict != "unclear" else ""
    text = Text(f"{number(estimate['value'])}{mark}", style=STYLES.get(verdict, ""))
    if isinstance(estimate.get("low"), (int, float)) and math.isfinite(estimate["low"]):
        text.append(f"\n{interval(estimate)}", style="dim not bold")
    return text


def _verdict(card: Card, system: str, metric: str) -> str:
    """Return a system's verdict against the reference; the reference's verdict is against the base."""
    # The reference is not compared with itself, so it shows whether training helped at all.
    against = card["base"] if system == card["reference"] else card["reference"]
    for row in card["differences"]:
        if (row["policy"], row["against"], row["metric"]) == (system, against, metric):
            return str(row["verdict"])
    return ""


def legend(card: Card) -> str:
    """Return the explanation of numbers and marks."""
    if len(card["policies"]) == 1:
        return "Below each number its 95 % interval."
    with_base = card["base"] is not None and card["base"] != card["reference"]
    base = f", {card['reference']} with {card['base']}" if with_base else ""
    return (
        f"Below each number its 95 % interval. ▲ better, ▼ worse, ↑ ↓ higher or lower: clear of zero in a paired "
        f"comparison with {card['reference']}{base} and after Holm's correction; no mark: no clear difference."
    )


def findings(card: Card) -> list[tuple[str, str]]:
    """Return gates and flags as lines, each with its style."""
    lines = []
    for gate in card.get("gates") or []:
        mark, style = _gate_mark(gate)
        lines.append((f"{mark} {gate['text']}", style))
    return lines + [(f"! {flag['text']}", "yellow") for flag in card["flags"]]


def _gate_mark(gate: dict[str, Any]) -> tuple[str, str]:
    """Return a gate's mark and style."""
    if gate["passed"] is None:
        return "?", "yellow"
    if gate["passed"]:
        return "✓", "dim"
    return ("!", "yellow") if gate["level"] == "warning" else ("✗", "red")


def _text(text: str) -> Text:
    """Return plain text without markup or hidden characters."""
    return Text(printable(text.replace("\n", " ")))
