"""Tables of a scorecard: numbers by task and system, all paired differences, numbers by source, gates. Torch-free.

Rows for the page are text; rows for the files next to the page are plain values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from align.report.page.assets import AssetWriter
from align.report.page.number_format import difference_text, estimate_text, p_value
from align.report.scorecard.conclusions import baseline_of, find_difference, role, setup

Card = dict[str, Any]

TESTS = {"mcnemar": "exact McNemar", "sign-flip": "sign-flip permutation"}
PROMPTS = "prompts"
"""Name of the prompt set among a scorecard's tasks."""


def columns(card: Card) -> list[dict[str, str]]:
    """Return the heads of the scorecard's columns, a head for each system."""
    return [{"name": name, "role": role(card, name), "setup": setup(card, name)} for name in card["policies"]]


def task_groups(card: Card) -> list[dict[str, Any]]:
    """Return the scorecard by task, the prompt set first; each metric is a row with a cell for each system."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for name, metric in card["metrics"].items():
        groups.setdefault(metric["task"], []).append(_metric_row(card, name, metric))
    return [{"task": name, **_task_heading(card, name), "rows": rows} for name, rows in groups.items()]


def _task_heading(card: Card, name: str) -> dict[str, Any]:
    task = card["tasks"].get(name)
    if task is None:
        return {"title": "Held-out prompts", "kind": "", "n": card["settings"].get("prompts", 0)}
    return {"title": task["title"], "kind": "" if task["kind"] == name else task["kind"], "n": task["n"]}


def _metric_row(card: Card, name: str, metric: Mapping[str, Any]) -> dict[str, Any]:
    estimates = [card["estimates"][policy].get(name) for policy in card["policies"]]
    sizes = {estimate["n"] for estimate in estimates if estimate is not None}
    task = card["tasks"].get(metric["task"])
    details = [metric["unit"]]
    if metric["better"]:
        details.append(f"{metric['better']} is better")
    if len(sizes) == 1:
        details.append(f"n {next(iter(sizes)):,}")
    return {
        "metric": name,
        **metric,
        "primary": name == card["primary"],
        "main": task is not None and task["primary"] == name,
        "about": [detail for detail in details if detail],
        "cells": [_cell(card, policy, name, with_n=len(sizes) > 1) for policy in card["policies"]],
    }


def _cell(card: Card, policy: str, metric: str, with_n: bool) -> dict[str, Any]:
    """Return a system's number with its interval, and its differences to the baseline and the base."""
    estimate = card["estimates"][policy].get(metric)
    if estimate is None:
        return {**estimate_text(None), "n": "", "changes": []}
    # The baseline may be the base itself: show that difference once.
    baselines = [name for name in dict.fromkeys((baseline_of(card, policy), card["base"])) if name is not None]
    rows = [row for name in baselines if (row := find_difference(card, policy, name, metric)) is not None]
    cell = estimate_text(estimate)
    if estimate.get("method") == "upper bound":
        cell = {"value": f"≤ {cell['value']}", "interval": "an upper bound"}
    changes = [{**difference_text(row), "against": row["against"]} for row in rows]
    return {**cell, "n": f"n {estimate['n']:,}" if with_n else "", "changes": changes}


def difference_rows(card: Card) -> list[dict[str, Any]]:
    """Return every paired difference of the scorecard, in its order."""
    rows = []
    for row in card["differences"]:
        metric = card["metrics"][row["metric"]]
        about = {"title": metric["title"], "task": task_title(card, metric["task"])}
        test = TESTS.get(row["test"], row["test"])
        rows.append({**row, **difference_text(row), **about, "p_raw": p_value(row["p"]), "test": test})
    return rows


def task_title(card: Card, task: str) -> str:
    """Return a task's title for use in a sentence."""
    return str(card["tasks"][task]["title"]) if task in card["tasks"] else "held-out prompts"


def family_rows(card: Card) -> list[dict[str, Any]]:
    """Return the primary metric in every source of the prompt set, with verdicts against the reference."""
    rows = _source_cells(card, card["families"], card["primary"])
    cells = {(row["family"], name): cell for row in rows for name, cell in row["cells"].items()}
    for row in card["family_differences"]:
        cell = cells.get((row["family"], row["policy"]))
        if cell is not None and row["against"] == card["reference"]:
            # The cell keeps the interval of its value; the interval of the difference is in the table of differences.
            cell |= difference_text(row) | {"interval": cell["interval"]}
    return rows


def _source_cells(card: Card, families: Mapping[str, Any], metric: str) -> list[dict[str, Any]]:
    """Return a row for each source, with a cell for each system; a dash if the metric was not measured there."""
    rows = []
    for name, family in families.items():
        cells = {}
        for policy in card["policies"]:
            estimate = family["estimates"].get(policy, {}).get(metric)
            cells[policy] = estimate_text(estimate if estimate is not None and estimate["n"] else None)
        rows.append({"family": name, "n": family["n"], "cells": cells})
    return rows


def source_tables(card: Card) -> list[dict[str, Any]]:
    """Return for each task with several sources its primary metric in each of them, with a cell for each system.

    A task whose sources lack the primary metric is shown by their first metric.
    """
    tables = []
    for task, families in card["task_families"].items():
        metrics = _metrics_of(families)
        primary = card["tasks"][task]["primary"]
        metric = primary if primary in metrics else next(iter(metrics), None)
        if metric is None:
            continue
        title = f"{card['tasks'][task]['title']}: {card['metrics'][metric]['title']}"
        rows = _source_cells(card, families, metric)
        tables.append({"title": title, "task": task, "metric": metric, "rows": rows})
    return tables


def _metrics_of(families: Mapping[str, Any]) -> list[str]:
    """Return the names of all metrics in ``families``, in order."""
    estimates = [estimates for family in families.values() for estimates in family["estimates"].values()]
    return list(dict.fromkeys(name for metrics in estimates for name in metrics))


def task_settings(card: Card) -> list[dict[str, Any]]:
    """Return each task's settings as YAML, to reproduce its numbers, and the notes on each system."""
    return [
        {
            "name": name,
            "title": task["title"],
            "kind": task["kind"],
            "n": task["n"],
            "settings": as_yaml(task.get("settings") or {}),
            "notes": [(system, as_yaml(notes)) for system, notes in (task.get("notes") or {}).items()],
        }
        for name, task in card["tasks"].items()
    ]


def as_yaml(value: Any) -> str:
    """Return nested values as YAML."""
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100).strip()


# ---- files next to the page ---------------------------------------------------------------------------------------


def add_scorecard_tables(card: Card, assets: AssetWriter) -> None:
    """Add the scorecard's unrounded numbers to the files next to the page."""
    assets.add_table("scorecard", list(_estimate_rows(card)))
    assets.add_table("differences", card["differences"])
    assets.add_table("sources", list(_source_rows(card)))
    if card["gates"]:
        assets.add_table("gates", card["gates"])


def _estimate_rows(card: Card) -> Iterator[dict[str, Any]]:
    """Yield a row for each metric and system that has it."""
    for name, metric in card["metrics"].items():
        for policy in card["policies"]:
            estimate = card["estimates"][policy].get(name)
            if estimate is not None:
                yield {"metric": name, **metric, "system": policy, "role": role(card, policy), **estimate}


def _source_rows(card: Card) -> Iterator[dict[str, Any]]:
    """Yield a row for each task, source, system and metric."""
    for task, families in {PROMPTS: card["families"], **card["task_families"]}.items():
        for source, family in families.items():
            for policy, estimates in family["estimates"].items():
                for metric, estimate in estimates.items():
                    yield {"task": task, "source": source, "metric": metric, "system": policy, **estimate}
