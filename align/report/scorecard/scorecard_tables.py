"""Tables of a scorecard: numbers by task and system, all paired differences, numbers by source, gates. Torch-free.

Rows for the page are text; rows for the files next to the page are plain values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from align.report.page.assets import AssetWriter
from align.report.page.number_format import MARKS, MISSING, WORDS, interval, number, p_value, signed
from align.report.scorecard.conclusions import baseline_of, find_difference, role, setup

Card = dict[str, Any]

TESTS = {"mcnemar": "exact McNemar", "sign-flip": "sign-flip permutation"}
PROMPTS = "prompts"
"""Name of the prompt set among a scorecard's tasks."""
ESTIMATE_COLUMNS = {"value": "Value", "low": "95 % low", "high": "95 % high", "n": "n"}
GATE_COLUMNS = {
    "name": "Gate",
    "system": "System",
    "metric": "Metric",
    "expression": "Bound",
    "value": "Value",
    "low": "95 % low",
    "high": "95 % high",
    "bound": "Bound's value",
    "level": "Level",
    "passed": "Passed",
    "clear": "Clear of the bound",
    "text": "In words",
}


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
        return {"value": MISSING, "interval": "", "n": "", "changes": []}
    # The baseline may be the base itself: show that difference once.
    baselines = [name for name in dict.fromkeys((baseline_of(card, policy), card["base"])) if name is not None]
    rows = [row for name in baselines if (row := find_difference(card, policy, name, metric)) is not None]
    is_bound = estimate.get("method") == "upper bound"
    value = number(estimate["value"])
    return {
        "value": f"≤ {value}" if is_bound else value,
        "interval": "an upper bound" if is_bound else interval(estimate),
        "n": f"n {estimate['n']:,}" if with_n else "",
        "changes": [{**_change(row), "against": row["against"]} for row in rows],
    }


def _change(row: Mapping[str, Any]) -> dict[str, str]:
    """Return a paired difference as text."""
    return {
        "change": signed(row["value"]),
        "interval": interval(dict(row), True),
        "p": p_value(row["p_holm"]),
        "verdict": row["verdict"],
        "mark": MARKS[row["verdict"]],
        "words": WORDS[row["verdict"]],
    }


def difference_rows(card: Card) -> list[dict[str, Any]]:
    """Return every paired difference of the scorecard, in its order."""
    return [
        {
            **_change(row),
            "policy": row["policy"],
            "against": row["against"],
            "title": card["metrics"][row["metric"]]["title"],
            "task": task_title(card, card["metrics"][row["metric"]]["task"]),
            "n": row["n"],
            "p_raw": p_value(row["p"]),
            "test": TESTS.get(row["test"], row["test"]),
        }
        for row in card["differences"]
    ]


def task_title(card: Card, task: str) -> str:
    """Return a task's title for use in a sentence."""
    return str(card["tasks"][task]["title"]) if task in card["tasks"] else "held-out prompts"


def family_rows(card: Card) -> list[dict[str, Any]]:
    """Return the primary metric in every source of the prompt set, with verdicts against the reference."""
    differences = {
        (row["family"], row["policy"]): row for row in card["family_differences"] if row["against"] == card["reference"]
    }
    rows = []
    for name, family in card["families"].items():
        cells = []
        for policy in card["policies"]:
            cell = source_cell(family["estimates"].get(policy, {}).get(card["primary"]))
            row = differences.get((name, policy))
            if row is not None:
                # The cell keeps the interval of its value; the interval of the difference is in the table of
                # differences.
                cell = cell | _change(row) | {"interval": cell["interval"]}
            cells.append(cell)
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
        rows = [
            {
                "family": name,
                "n": family["n"],
                "cells": [source_cell(family["estimates"].get(policy, {}).get(metric)) for policy in card["policies"]],
            }
            for name, family in families.items()
        ]
        title = f"{card['tasks'][task]['title']}: {card['metrics'][metric]['title']}"
        tables.append({"title": title, "task": task, "metric": metric, "rows": rows})
    return tables


def _metrics_of(families: Mapping[str, Any]) -> list[str]:
    """Return the names of all metrics in ``families``, in order."""
    estimates = [estimates for family in families.values() for estimates in family["estimates"].values()]
    return list(dict.fromkeys(name for metrics in estimates for name in metrics))


def source_cell(estimate: Mapping[str, Any] | None) -> dict[str, str]:
    """Return a cell with a value and its interval, and no verdict; a dash if it was not measured."""
    cell = {"value": MISSING, "interval": "", "change": "", "verdict": "", "mark": "", "words": ""}
    if estimate is None or not estimate["n"]:
        return cell
    return cell | {"value": number(estimate["value"]), "interval": interval(dict(estimate))}


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
    metric_columns = {"task": "Task", "metric": "Metric", "title": "Title", "unit": "Unit", "better": "Better"}
    system_columns = {"system": "System", "role": "Role", **ESTIMATE_COLUMNS, "method": "Method"}
    assets.add_table("scorecard", "Scorecard", metric_columns | system_columns, list(_estimate_rows(card)))
    pair_columns = {"metric": "Metric", "policy": "System", "against": "Against"}
    test_columns = {"p": "p", "p_holm": "p (Holm)", "test": "Test", "verdict": "Verdict"}
    difference_columns = {**pair_columns, **ESTIMATE_COLUMNS, **test_columns}
    assets.add_table("differences", "Paired differences", difference_columns, card["differences"])
    source_columns = {"task": "Task", "source": "Source", "metric": "Metric", "system": "System", **ESTIMATE_COLUMNS}
    assets.add_table("sources", "By source", source_columns, list(_source_rows(card)))
    if card["gates"]:
        assets.add_table("gates", "Gates", GATE_COLUMNS, card["gates"])


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
