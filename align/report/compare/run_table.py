"""Differences between runs: changed settings, results and costs, one row for each run. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from align.evaluation.scorecard import program_metrics
from align.report.compare.merged_scorecard import Card, EvaluatedRun
from align.report.page.assets import AssetWriter, estimate_cells, estimate_columns
from align.report.page.number_format import MARKS, MISSING, WORDS, duration, interval, number, signed, size
from align.report.run.stage_costs import endpoint_cost
from align.report.scorecard.conclusions import find_difference
from align.store.artifacts import Artifact, Kind

Runs = Mapping[str, Mapping[str, Artifact]]
"""Run → stage → artifact."""

MAX_VALUE_LENGTH = 60
"""Characters of a setting's value in the table; the files next to the page have the full value."""
DIGEST_LENGTH = 12
RESULTS = ("reward", "kl", "length", "finished", "heldout_loss")
"""Metrics of the prompt set that are results if they were measured, in addition to the metrics of programs."""
COST_COLUMNS = {
    "run": "Run",
    "stage": "Stage",
    "kind": "Kind",
    "seconds": "Seconds",
    "peak_memory_bytes": "Peak memory, bytes",
    "tokens": "Tokens",
    "cost": "Cost",
    "shared": "Shared with another run",
    "key": "Key",
}


def changed_fields(runs: Runs) -> dict[str, dict[str, Any]]:
    """Return ``stage.field`` → run → value, for the settings that are not the same in all runs.

    If runs have different stages, their names are one field, ``stages``. Inputs of a stage are skipped, because
    differences in them are shown at their own stages. A seed that each run uses throughout is one field, ``seed``.
    """
    changed: dict[str, dict[str, Any]] = {}
    stage_names = {
        run: [name for name, artifact in artifacts.items() if artifact.kind != Kind.REPORT]
        for run, artifacts in runs.items()
    }
    # Runs with other stages differ in more than settings, so this field comes first.
    if len({tuple(names) for names in stage_names.values()}) > 1:
        changed["stages"] = {run: ", ".join(names) for run, names in stage_names.items()}
    first_run: Mapping[str, Artifact] = next(iter(runs.values()), {})
    # Settings can only be compared for stages that all runs have.
    common = [stage for stage in first_run if all(stage in artifacts for artifacts in runs.values())]
    seeds = {run: {artifacts[stage].record.get("seed") for stage in common} for run, artifacts in runs.items()}
    # A run usually has a single seed. It gets one row instead of a row for every stage.
    has_single_seeds = all(len(run_seeds) == 1 for run_seeds in seeds.values())
    if has_single_seeds and len(set().union(*seeds.values())) > 1:
        changed["seed"] = {run: next(iter(run_seeds)) for run, run_seeds in seeds.items()}
    for stage in common:
        settings = {
            run: stage_settings(artifacts[stage].record, with_seed=not has_single_seeds)
            for run, artifacts in runs.items()
        }
        for field in dict.fromkeys(name for fields in settings.values() for name in fields):
            values = {run: fields.get(field) for run, fields in settings.items()}
            # JSON makes lists and blocks comparable, and equal whatever the order of keys.
            if len({json.dumps(value, sort_keys=True, default=str) for value in values.values()}) > 1:
                changed[f"{stage}.{field}"] = values
    return changed


def stage_settings(record: Mapping[str, Any], with_seed: bool) -> dict[str, Any]:
    """Return a stage's settings with dotted names, and identities of its inputs from outside the store."""
    inputs = record.get("inputs") or {}
    settings = _flatten({name: value for name, value in (record.get("config") or {}).items() if name not in inputs})
    settings |= {"kind": record.get("kind"), "stage version": record.get("version")}
    if settings.get("precision") == "auto" and record.get("precision"):
        # The setting is the same on every machine, but its value may differ.
        settings["precision"] = f"auto ({record['precision']})"
    if with_seed:
        settings["seed"] = record.get("seed")
    for name, value in (record.get("identities") or {}).items():
        if not str(value).startswith("{"):  # an identity in braces is the settings of tasks, which the config has
            settings[f"content of {name}"] = str(value)[:DIGEST_LENGTH]
    return settings


def _flatten(value: Any, path: str = "") -> dict[str, Any]:
    """Return nested ``value`` as dotted path → leaf; an empty block is a leaf."""
    if not isinstance(value, dict) or not value:
        return {path: value}
    leaves: dict[str, Any] = {}
    for key, item in value.items():
        leaves |= _flatten(item, f"{path}.{key}" if path else str(key))
    return leaves


def result_metrics(card: Card) -> list[str]:
    """Return the metrics in the table of runs: the primary one, the prompt set's, and each task's primary one."""
    programs = program_metrics(card["metrics"])
    names = [card["primary"], *programs, *RESULTS, *(task["primary"] for task in card["tasks"].values())]
    return [name for name in dict.fromkeys(names) if name in card["metrics"]]


def run_table(
    runs: Runs, evaluated: Sequence[EvaluatedRun], card: Card | None, notes: Mapping[str, str], assets: AssetWriter
) -> dict[str, Any]:
    """Return the table of runs: its columns ``fields`` and ``metrics``, and ``rows``.

    The unrounded numbers are added to the files next to the page.
    """
    changed = changed_fields(runs)
    metrics = result_metrics(card) if card is not None else []
    by_run = {run.name: run for run in evaluated}
    rows: list[dict[str, Any]] = []
    table: list[dict[str, Any]] = []
    for name, artifacts in runs.items():
        run = by_run.get(name)
        settings, results = _settings_columns(changed, name), _result_columns(card, run, metrics)
        table.append(
            {"run": name, "note": notes.get(name, ""), "seconds": _total_seconds(artifacts), **settings, **results}
        )
        rows.append(
            {
                "run": name,
                "note": notes.get(name, ""),
                "subject": "" if run is None else run.subject,
                "values": [setting_text(values[name]) for values in changed.values()],
                "cells": [_result_cell(card, evaluated, run, metric) for metric in metrics],
                "seconds": duration(_total_seconds(artifacts)),
            }
        )
    assets.add_table("runs", "Runs: changed settings and results", _table_columns(changed, metrics), table)
    return {
        "fields": list(changed),
        "metrics": [{"name": name, **card["metrics"][name]} for name in metrics] if card is not None else [],
        "rows": rows,
    }


def setting_text(value: Any) -> str:
    if value is None:
        return MISSING
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= MAX_VALUE_LENGTH else f"{text[: MAX_VALUE_LENGTH - 1]}…"


def _result_cell(
    card: Card | None, evaluated: Sequence[EvaluatedRun], run: EvaluatedRun | None, metric: str
) -> dict[str, Any]:
    """Return the metric of the checkpoint that the run is about, and its difference to the first run's metric."""
    empty = {"value": MISSING, "interval": "", "change": None}
    if card is None or run is None:
        return empty
    label = run.subject_label
    first = evaluated[0].subject_label
    estimate = card["estimates"][label].get(metric)
    if estimate is None or estimate["value"] is None:
        return empty
    row = find_difference(card, label, first, metric) if label != first else None
    change = None
    if row is not None:
        change = {
            "verdict": row["verdict"],
            "mark": MARKS[row["verdict"]],
            "words": WORDS[row["verdict"]],
            "change": signed(row["value"]),
            "interval": interval(row, True),
        }
    return {"value": number(estimate["value"]), "interval": interval(estimate), "change": change}


def _total_seconds(artifacts: Mapping[str, Artifact]) -> float:
    return sum(float(artifact.record.get("seconds") or 0) for artifact in artifacts.values())


def _table_columns(changed: Mapping[str, Any], metrics: Sequence[str]) -> dict[str, str]:
    """Return the columns of the table next to the page: settings, and each metric with its interval."""
    columns = {"run": "Run", "note": "State", **{f"set {field}": field for field in changed}, "system": "System"}
    for metric in metrics:
        columns |= estimate_columns(metric, metric)
    return columns | {"seconds": "Seconds"}


def _settings_columns(changed: Mapping[str, Mapping[str, Any]], run: str) -> dict[str, Any]:
    """Return the changed settings of a run with their full values."""
    row = {}
    for field, values in changed.items():
        value = values[run]
        is_plain = isinstance(value, (int, float, str)) or value is None
        row[f"set {field}"] = value if is_plain else json.dumps(value)
    return row


def _result_columns(card: Card | None, run: EvaluatedRun | None, metrics: Sequence[str]) -> dict[str, Any]:
    """Return the unrounded metrics of the checkpoint that the run is about; empty for a run without a scorecard."""
    if card is None or run is None:
        return {}
    row: dict[str, Any] = {"system": run.subject}
    for metric in metrics:
        row |= estimate_cells(metric, card["estimates"][run.subject_label].get(metric))
    return row


def cost_rows(runs: Runs, assets: AssetWriter) -> list[dict[str, Any]]:
    """Return time and peak memory by stage with a cell for each run; a stage that runs share is marked.

    The unrounded numbers are added to the files next to the page.
    """
    rows: list[dict[str, Any]] = []
    table: list[dict[str, Any]] = []
    for stage in dict.fromkeys(stage for artifacts in runs.values() for stage in artifacts):
        # Stages are matched by name, and runs may lack some.
        keys = [artifacts[stage].record.get("key") if stage in artifacts else None for artifacts in runs.values()]
        cells = []
        for run, artifacts in runs.items():
            if stage not in artifacts:
                cells.append({"time": MISSING, "memory": "", "shared": False})
                continue
            record = artifacts[stage].record
            # Runs share a stage if they have the same key: it ran once and was reused.
            is_shared = keys.count(record.get("key")) > 1
            cells.append(
                {
                    "time": duration(record.get("seconds")),
                    "memory": size(record.get("peak_memory_bytes")),
                    "shared": is_shared,
                }
            )
            row = {name: record.get(name) for name in COST_COLUMNS}
            table.append({**row, "run": run, "stage": stage, "shared": is_shared, "cost": endpoint_cost(record)})
        rows.append({"stage": stage, "cells": cells})
    assets.add_table("costs", "Cost of every stage of every run", COST_COLUMNS, table)
    return rows
