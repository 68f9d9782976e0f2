"""Tables of runs: changed settings, results and costs of each run, and the trials of a sweep. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from align.errors import printable
from align.evaluation.scorecard import program_metrics
from align.report.compare.merged_scorecard import Card, EvaluatedRun
from align.report.page.assets import AssetWriter, Figure, estimate_cells, estimate_columns
from align.report.page.number_format import (
    MISSING,
    difference_text,
    duration,
    estimate_text,
    shorten,
    size,
    with_minus_signs,
)
from align.report.page.panels import INK, Panel, legend_name, styled
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
MAX_FIGURES = 12
LOG_SCALE_RATIO = 30.0
"""Ratio of the largest to the smallest value from which an axis is logarithmic."""


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
        for name in differing_fields(settings.values()):
            changed[f"{stage}.{name}"] = {run: fields.get(name) for run, fields in settings.items()}
    return changed


def differing_fields(settings: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the fields that are not the same in all ``settings``; a field that some lack is None there."""
    settings = list(settings)
    differing = []
    for name in dict.fromkeys(name for fields in settings for name in fields):
        # JSON makes lists and blocks comparable, and equal whatever the order of keys.
        values = {json.dumps(fields.get(name), sort_keys=True, default=str) for fields in settings}
        if len(values) > 1:
            differing.append(name)
    return differing


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
        estimates = {} if run is None or card is None else card["estimates"][run.subject_label]
        seconds = sum(float(artifact.record.get("seconds") or 0) for artifact in artifacts.values())
        about = {"run": name, "note": notes.get(name, "")}
        line = {**about, "system": "" if run is None else run.subject, "seconds": seconds}
        for field_name, values in changed.items():
            value = values[name]
            is_scalar = isinstance(value, (int, float, str)) or value is None
            line[f"set {field_name}"] = value if is_scalar else json.dumps(value)
        for metric in metrics:
            line |= estimate_cells(metric, estimates.get(metric))
        table.append(line)
        texts = [setting_text(values[name]) for values in changed.values()]
        cells = [_result_cell(card, evaluated[0], run, metric) for metric in metrics]
        subject = "" if run is None else run.subject
        rows.append({**about, "subject": subject, "values": texts, "cells": cells, "seconds": duration(seconds)})
    columns = {f"set {name}": name for name in changed} | {"system": "System"} | estimate_columns(metrics)
    assets.add_table("runs", table, columns)
    descriptions = [{"name": name, **card["metrics"][name]} for name in metrics] if card is not None else []
    return {"fields": list(changed), "metrics": descriptions, "rows": rows}


def setting_text(value: Any) -> str:
    """Return a setting's value for a table, shortened to :data:`MAX_VALUE_LENGTH` characters."""
    if value is None:
        return MISSING
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return shorten(text, MAX_VALUE_LENGTH)


def _result_cell(card: Card | None, first: EvaluatedRun, run: EvaluatedRun | None, metric: str) -> dict[str, Any]:
    """Return the metric of the checkpoint that the run is about, and its difference to the first run's metric."""
    estimate = None if card is None or run is None else card["estimates"][run.subject_label].get(metric)
    if card is None or run is None or estimate is None or estimate["value"] is None:
        return {**estimate_text(None), "change": None}
    row = find_difference(card, run.subject_label, first.subject_label, metric)
    return {**estimate_text(estimate), "change": None if row is None else difference_text(row)}


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
            memory = size(record.get("peak_memory_bytes"))
            cells.append({"time": duration(record.get("seconds")), "memory": memory, "shared": is_shared})
            table.append({**record, "run": run, "stage": stage, "shared": is_shared, "cost": endpoint_cost(record)})
        rows.append({"stage": stage, "cells": cells})
    assets.add_table("costs", table)
    return rows


# ---- trials of a sweep --------------------------------------------------------------------------------------------


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
    objectives = [str(objective["name"]) for objective in trials.objectives]
    table = []
    for row in trials.rows:
        line = {**row, **{f"set {name}": value for name, value in row["draw"].items()}}
        for name in objectives:
            line |= estimate_cells(name, _estimate(row, name))
        table.append(line)
    assets.add_table(
        "trials", table, {f"set {name}": name for name in trials.dimensions} | estimate_columns(objectives)
    )
    return {
        "dimensions": trials.dimensions,
        "objectives": trials.objectives,
        "has_ties": sum(bool(row["best"]) for row in trials.rows) > 1,
        "rows": [_trial_row(row, trials) for row in trials.rows],
        "sentences": [with_minus_signs(sentence) for sentence in trials.sentences],
        "figures": _trial_figures(trials, assets),
    }


def _estimate(row: Mapping[str, Any], objective: str) -> dict[str, Any]:
    low, high = row["intervals"].get(objective) or (None, None)
    return {"value": row["values"].get(objective), "low": low, "high": high}


def _trial_row(row: Mapping[str, Any], trials: SweepTrials) -> dict[str, Any]:
    """Return a trial with its numbers as text."""
    cells = []
    for objective in trials.objectives:
        estimate = _estimate(row, objective["name"])
        cell = estimate_text(estimate)
        if estimate["low"] is None or estimate["high"] is None:
            cell["interval"] = ""
        cells.append(cell)
    settings = []
    for name in trials.dimensions:
        value = row["draw"].get(name)
        settings.append(with_minus_signs(f"{value:g}") if isinstance(value, float) else setting_text(value))
    return {**row, "draw": settings, "cells": cells, "seconds": duration(row["seconds"])}


def _trial_figures(trials: SweepTrials, assets: AssetWriter) -> list[Figure]:
    """Return each objective against each setting that varies, one point per finished trial."""
    figures: list[Figure] = []
    finished_rows = [row for row in trials.rows if row["values"]]
    for objective in trials.objectives:
        title = str(objective["name"])
        for name in trials.dimensions:
            rows = [row for row in finished_rows if name in row["draw"]]
            # A setting with one value in all finished trials has no visible effect on the objective.
            is_varied = len({str(row["draw"][name]) for row in rows}) > 1
            if not is_varied or len(figures) >= MAX_FIGURES:
                continue
            caption = f"{title} ({objective['better']} is better) against {name}, one point per trial"
            figures.append(assets.add_figure(f"sweep-{title}-{name}", _trial_plot(rows, title, name), caption))
    return figures


@styled
def _trial_plot(rows: Sequence[Mapping[str, Any]], objective: str, name: str) -> Markup:
    """Draw an objective against one setting with 95 % intervals; rings mark trials that no other beats."""
    panel = Panel(3.9, 2.6)
    axes = panel.axes
    settings = [row["draw"][name] for row in rows]
    # Settings that are not all numbers get one position each, in the order of their first trial.
    is_numeric = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in settings)
    labels = list(dict.fromkeys(str(value) for value in settings))
    positions = [float(value) if is_numeric else float(labels.index(str(value))) for value in settings]
    ring = {"marker": "o", "markersize": 12, "markerfacecolor": "none", "markeredgecolor": INK, "linestyle": "none"}
    for position, row in zip(positions, rows, strict=True):
        estimate = _estimate(row, objective)
        panel.add_point(position, estimate, markersize=5, linewidth=0.9)
        if row["best"]:
            axes.plot(position, estimate["value"], **ring)
    if not is_numeric:
        axes.set_xticks(range(len(labels)), [legend_name(label) for label in labels], fontsize=7.5)
        axes.set_xlim(-0.5, len(labels) - 0.5)
    elif min(positions) > 0 and max(positions) / min(positions) >= LOG_SCALE_RATIO:
        # Learning rates and the like are searched over orders of magnitude.
        axes.set_xscale("log")
    axes.set_xlabel(printable(name))
    axes.set_ylabel(printable(objective))
    return panel.svg(f"{objective} against {name}, {len(rows)} trials")
