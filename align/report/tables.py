"""The scorecard's tables: numbers by task and system, all paired differences, numbers by source, gates. Torch-free.

Each function gives rows for the page, as text, or for the files beside it, as plain values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from align.report.assets import Beside
from align.report.summary import compared_with, find, role, way
from align.report.wording import MARKS, WORDS, interval, number, p_value, signed

Card = dict[str, Any]

TESTS = {"mcnemar": "exact McNemar", "sign-flip": "sign-flip permutation"}
PROMPTS = "prompts"
"""The prompt set's name among the tasks, as the scorecard has it."""


def columns(card: Card) -> list[dict[str, str]]:
    """Heads of the scorecard's columns, one a system."""
    return [{"name": name, "role": role(card, name), "way": way(card, name)} for name in card["policies"]]


def task_groups(card: Card) -> list[dict[str, Any]]:
    """The scorecard by task: the prompt set first, each with its metrics as rows of cells, one a system."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for metric, about in card["metrics"].items():
        groups.setdefault(about["task"], []).append(_metric_row(card, metric, about))
    found = []
    for task, rows in groups.items():
        about = card["tasks"].get(task)
        found.append(
            {
                "task": task,
                "title": "Held-out prompts" if about is None else about["title"],
                "kind": "" if about is None or about["kind"] == task else about["kind"],
                "n": card["settings"].get("prompts", 0) if about is None else about["n"],
                "rows": rows,
            }
        )
    return found


def _metric_row(card: Card, metric: str, about: Mapping[str, Any]) -> dict[str, Any]:
    sizes = {card["estimates"][name][metric]["n"] for name in card["policies"] if metric in card["estimates"][name]}
    task = card["tasks"].get(about["task"])
    better = f"{about['better']} is better" if about["better"] else ""
    return {
        "metric": metric,
        **about,
        "primary": metric == card["primary"],
        "main": task is not None and task["primary"] == metric,
        "about": [
            part for part in (about["unit"], better, f"n {next(iter(sizes)):,}" if len(sizes) == 1 else "") if part
        ],
        "cells": [_cell(card, name, metric, len(sizes) > 1) for name in card["policies"]],
    }


def _cell(card: Card, policy: str, metric: str, with_n: bool) -> dict[str, Any]:
    estimate = card["estimates"][policy].get(metric)
    if estimate is None:
        return {"value": "–", "interval": "", "n": "", "changes": []}
    first = compared_with(card, policy)
    against = [name for name in dict.fromkeys((first, card["base"])) if name is not None]
    rows = [row for name in against if (row := find(card, policy, name, metric)) is not None]
    bound = estimate.get("method") == "upper bound"
    return {
        "value": f"≤ {number(estimate['value'])}" if bound else number(estimate["value"]),
        "interval": "an upper bound" if bound else interval(estimate),
        "n": f"n {estimate['n']:,}" if with_n else "",
        "changes": [{**_change(row), "against": row["against"]} for row in rows],
    }


def _change(row: Mapping[str, Any]) -> dict[str, str]:
    return {
        "change": signed(row["value"]),
        "interval": interval(dict(row), True),
        "p": p_value(row["p_holm"]),
        "verdict": row["verdict"],
        "mark": MARKS[row["verdict"]],
        "words": WORDS[row["verdict"]],
    }


def difference_rows(card: Card) -> list[dict[str, Any]]:
    """Every paired difference of the scorecard, regressions first within each metric's order."""
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
    """What a task is called on the page."""
    return str(card["tasks"][task]["title"]) if task in card["tasks"] else "held-out prompts"


def family_rows(card: Card) -> list[dict[str, Any]]:
    """The primary metric of every source of the prompt set; regressions and gains against the reference marked."""
    verdicts = {
        (row["family"], row["policy"]): row for row in card["family_differences"] if row["against"] == card["reference"]
    }
    rows = []
    for family, about in card["families"].items():
        cells = []
        for policy in card["policies"]:
            cell = source_cell(about["estimates"].get(policy, {}).get(card["primary"]))
            row = verdicts.get((family, policy))
            cells.append(cell | ({} if row is None else _change(row) | {"interval": cell["interval"]}))
        rows.append({"family": family, "n": about["n"], "cells": cells})
    return rows


def source_tables(card: Card) -> list[dict[str, Any]]:
    """Tasks of several sources: the task's primary metric of every system in each of them."""
    tables = []
    for task, families in card["task_families"].items():
        primary = card["tasks"][task]["primary"]
        found = [name for name in _metrics_of(families) if name == primary] or _metrics_of(families)[:1]
        for metric in found:
            rows = [
                {
                    "family": family,
                    "n": about["n"],
                    "cells": [
                        source_cell(about["estimates"].get(policy, {}).get(metric)) for policy in card["policies"]
                    ],
                }
                for family, about in families.items()
            ]
            title = f"{card['tasks'][task]['title']}: {card['metrics'][metric]['title']}"
            tables.append({"title": title, "task": task, "metric": metric, "rows": rows})
    return tables


def _metrics_of(families: Mapping[str, Any]) -> list[str]:
    names = (name for about in families.values() for per in about["estimates"].values() for name in per)
    return list(dict.fromkeys(names))


def source_cell(estimate: Mapping[str, Any] | None) -> dict[str, str]:
    """A cell with a value and its interval, empty where nothing was measured."""
    shown = {"change": "", "verdict": "", "mark": "", "words": ""}
    if estimate is None or not estimate["n"]:
        return {"value": "–", "interval": "", **shown}
    return {"value": number(estimate["value"]), "interval": interval(dict(estimate)), **shown}


def task_settings(card: Card) -> list[dict[str, Any]]:
    """What a reader needs to reproduce each task's numbers, as YAML, and what was noted about each system."""
    found = []
    for name, about in card["tasks"].items():
        found.append(
            {
                "name": name,
                "title": about["title"],
                "kind": about["kind"],
                "n": about["n"],
                "settings": as_yaml(about.get("settings") or {}),
                "notes": [(system, as_yaml(notes)) for system, notes in (about.get("notes") or {}).items()],
            }
        )
    return found


def as_yaml(value: Any) -> str:
    """Nested values as a reader likes them."""
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100).strip()


# ---- files beside the page ----------------------------------------------------------------------------------------


def keep_tables(card: Card, beside: Beside) -> None:
    """Put the scorecard's numbers among the files beside the page, unrounded."""
    ends = {"value": "Value", "low": "95 % low", "high": "95 % high", "n": "n"}
    head = {"task": "Task", "metric": "Metric", "title": "Title", "unit": "Unit", "better": "Better"}
    beside.table(
        "scorecard", "Scorecard", {**head, "system": "System", "role": "Role", **ends, "method": "Method"},
        list(_estimates(card)),
    )  # fmt: skip
    beside.table(
        "differences",
        "Paired differences",
        {"metric": "Metric", "policy": "System", "against": "Against", **ends, "p": "p", "p_holm": "p (Holm)",
         "test": "Test", "verdict": "Verdict"},
        card["differences"],
    )  # fmt: skip
    beside.table(
        "sources", "By source", {"task": "Task", "source": "Source", "metric": "Metric", "system": "System", **ends},
        list(_sources(card)),
    )  # fmt: skip
    if card["gates"]:
        beside.table(
            "gates",
            "Gates",
            {"name": "Gate", "system": "System", "metric": "Metric", "expression": "Bound", "value": "Value",
             "low": "95 % low", "high": "95 % high", "bound": "Bound's value", "level": "Level", "passed": "Passed",
             "clear": "Clear of the bound", "text": "In words"},
            card["gates"],
        )  # fmt: skip


def _estimates(card: Card) -> Iterator[dict[str, Any]]:
    for metric, about in card["metrics"].items():
        for policy in card["policies"]:
            estimate = card["estimates"][policy].get(metric)
            if estimate is not None:
                yield {"metric": metric, **about, "system": policy, "role": role(card, policy), **estimate}


def _sources(card: Card) -> Iterator[dict[str, Any]]:
    for task, families in {PROMPTS: card["families"], **card["task_families"]}.items():
        for source, about in families.items():
            for policy, per in about["estimates"].items():
                for metric, estimate in per.items():
                    yield {"task": task, "source": source, "metric": metric, "system": policy, **estimate}
