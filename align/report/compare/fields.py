"""What differs between runs, and what came of it: changed settings, results and cost, a run a row. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from align.report.assets import Beside
from align.report.compare.cards import Card, Evaluated
from align.report.costs import money
from align.report.summary import find
from align.report.wording import MARKS, MISSING, WORDS, duration, interval, number, signed, size
from align.store.artifacts import Artifact, Kind

Runs = Mapping[str, Mapping[str, Artifact]]

LONGEST = 60
"""Characters of a setting's value in the table; the files beside the page have all of it."""
SHORT = 12
RESULTS = ("gold", "reward", "kl", "length", "finished", "heldout_loss")
"""Metrics of the prompt set among the results, where they were measured."""


def changed_fields(runs: Runs) -> dict[str, dict[str, Any]]:
    """``stage.field`` → run → value, for settings that are not the same in all runs.

    Stages that only some runs have are one field, ``stages``. Names of the stages that a stage reads are left out:
    what differs in those is shown there.
    """
    changed: dict[str, dict[str, Any]] = {}
    common = [
        stage for stage in next(iter(runs.values()), {}) if all(stage in artifacts for artifacts in runs.values())
    ]
    names = {
        run: [name for name, one in artifacts.items() if one.kind != Kind.REPORT] for run, artifacts in runs.items()
    }
    if len({tuple(each) for each in names.values()}) > 1:
        changed["stages"] = {run: ", ".join(each) for run, each in names.items()}
    seeds = {run: {artifacts[stage].record.get("seed") for stage in common} for run, artifacts in runs.items()}
    one_each = all(len(each) == 1 for each in seeds.values())
    if one_each and len(set().union(*seeds.values())) > 1:
        changed["seed"] = {run: next(iter(each)) for run, each in seeds.items()}
    for stage in common:
        flat = {run: _settings(artifacts[stage].record, with_seed=not one_each) for run, artifacts in runs.items()}
        for field in dict.fromkeys(name for each in flat.values() for name in each):
            values = {run: each.get(field) for run, each in flat.items()}
            if len({json.dumps(value, sort_keys=True, default=str) for value in values.values()}) > 1:
                changed[f"{stage}.{field}"] = values
    return changed


def _settings(record: Mapping[str, Any], with_seed: bool) -> dict[str, Any]:
    """A stage's settings with dotted names, and what it read outside the store."""
    inputs = record.get("inputs") or {}
    found = _flat({name: value for name, value in (record.get("config") or {}).items() if name not in inputs})
    found |= {"kind": record.get("kind"), "stage version": record.get("version")}
    if with_seed:
        found["seed"] = record.get("seed")
    for name, value in (record.get("identities") or {}).items():
        if not str(value).startswith("{"):  # settings of tasks, which the config has in full
            found[f"content of {name}"] = str(value)[:SHORT]
    return found


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    if isinstance(value, dict) and value:
        below: dict[str, Any] = {}
        for key, item in value.items():
            below |= _flat(item, f"{path}.{key}" if path else str(key))
        return below
    return {path: value}


def result_metrics(card: Card) -> list[str]:
    """What the table of runs shows of a scorecard: what decides, the prompt set's numbers, each task's own."""
    names = [card["primary"], *RESULTS, *(about["primary"] for about in card["tasks"].values())]
    return [name for name in dict.fromkeys(names) if name in card["metrics"]]


def run_rows(
    runs: Runs, found: Sequence[Evaluated], card: Card | None, notes: Mapping[str, str], beside: Beside
) -> dict[str, Any]:
    """The table of runs: ``fields`` and ``metrics``, its columns, and ``rows``; all of it unrounded beside the page."""
    changed = changed_fields(runs)
    metrics = result_metrics(card) if card is not None else []
    by_run = {one.run: one for one in found}
    rows = []
    for run, artifacts in runs.items():
        one = by_run.get(run)
        rows.append(
            {
                "run": run,
                "note": notes.get(run, ""),
                "subject": "" if one is None else one.subject,
                "values": [_shown(changed[field][run]) for field in changed],
                "cells": [_result(card, found, one, metric) for metric in metrics],
                "seconds": duration(_seconds(artifacts)),
            }
        )
    _keep(runs, changed, metrics, by_run, card, notes, beside)
    return {
        "fields": list(changed),
        "metrics": [{"name": name, **card["metrics"][name]} for name in metrics] if card is not None else [],
        "rows": rows,
    }


def _shown(value: Any) -> str:
    if value is None:
        return MISSING
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def _result(card: Card | None, found: Sequence[Evaluated], one: Evaluated | None, metric: str) -> dict[str, Any]:
    """A number of the run's own checkpoint, and its difference to that of the first run."""
    if card is None or one is None:
        return {"value": MISSING, "interval": "", "change": None}
    label, first = one.labels[one.subject], found[0].labels[found[0].subject]
    estimate = card["estimates"][label].get(metric)
    if estimate is None or estimate["value"] is None:
        return {"value": MISSING, "interval": "", "change": None}
    row = find(card, label, first, metric) if label != first else None
    change = None
    if row is not None:
        change = {
            "verdict": row["verdict"], "mark": MARKS[row["verdict"]], "words": WORDS[row["verdict"]],
            "change": signed(row["value"]), "interval": interval(row, True),
        }  # fmt: skip
    return {"value": number(estimate["value"]), "interval": interval(estimate), "change": change}


def _seconds(artifacts: Mapping[str, Artifact]) -> float:
    return sum(float(one.record.get("seconds") or 0) for one in artifacts.values())


def _keep(
    runs: Runs,
    changed: Mapping[str, Mapping[str, Any]],
    metrics: Sequence[str],
    by_run: Mapping[str, Evaluated],
    card: Card | None,
    notes: Mapping[str, str],
    beside: Beside,
) -> None:
    columns = {"run": "Run", "note": "State", **{f"set {field}": field for field in changed}, "system": "System"}
    for metric in metrics:
        columns |= {metric: metric, f"{metric} low": f"{metric} 95 % low", f"{metric} high": f"{metric} 95 % high"}
    columns["seconds"] = "Seconds"
    rows = []
    for run, artifacts in runs.items():
        one = by_run.get(run)
        row: dict[str, Any] = {"run": run, "note": notes.get(run, ""), "seconds": _seconds(artifacts)}
        for field, values in changed.items():
            value = values[run]
            row[f"set {field}"] = value if isinstance(value, (int, float, str)) or value is None else json.dumps(value)
        if one is not None and card is not None:
            row["system"] = one.subject
            own = card["estimates"][one.labels[one.subject]]
            for metric in metrics:
                estimate = own.get(metric) or {}
                row |= {metric: estimate.get("value"), f"{metric} low": estimate.get("low"),
                        f"{metric} high": estimate.get("high")}  # fmt: skip
        rows.append(row)
    beside.table("runs", "Runs: changed settings and results", columns, rows)


def cost_rows(runs: Runs, beside: Beside) -> list[dict[str, Any]]:
    """Time and memory by stage, a run a column; what runs share says so."""
    stages = list(dict.fromkeys(stage for artifacts in runs.values() for stage in artifacts))
    plain, rows = [], []
    for stage in stages:
        keys = [artifacts[stage].record.get("key") if stage in artifacts else None for artifacts in runs.values()]
        cells = []
        for run, artifacts in runs.items():
            record = artifacts[stage].record if stage in artifacts else None
            if record is None:
                cells.append({"time": MISSING, "memory": "", "shared": False})
                continue
            cells.append(
                {
                    "time": duration(record.get("seconds")),
                    "memory": size(record.get("peak_memory_bytes")),
                    "shared": keys.count(record.get("key")) > 1,
                }
            )
            plain.append(
                {"run": run, "stage": stage, "shared": keys.count(record.get("key")) > 1, "cost": money(record)}
                | {name: record.get(name) for name in ("kind", "seconds", "peak_memory_bytes", "tokens", "key")}
            )
        rows.append({"stage": stage, "cells": cells})
    beside.table(
        "costs",
        "Cost of every stage of every run",
        {"run": "Run", "stage": "Stage", "kind": "Kind", "seconds": "Seconds",
         "peak_memory_bytes": "Peak memory, bytes", "tokens": "Tokens", "cost": "Cost",
         "shared": "Shared with another run", "key": "Key"},
        plain,
    )  # fmt: skip
    return rows
