"""Comparison of tuning methods: cost and results of each trained checkpoint, and which was best. Torch-free.

Each checkpoint of the scorecard from a training stage of this run is a row: how it was tuned, the share of weights that
was trained, time and memory of that stage alone, and the scorecard's numbers. The best by the primary metric is
compared with every other one on the items that both answered. Earlier stages, and systems that use a checkpoint in
another way, are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from align.config.tuning import Tuning
from align.evaluation.comparisons import Resampling, correct
from align.evaluation.prompt_metrics import program_metrics
from align.report.compare.merged_scorecard import EvaluatedRun, paired_difference
from align.report.page.assets import AssetWriter
from align.report.page.number_format import MISSING, duration, interval, number, size
from align.store.artifacts import Artifact, Kind

Card = dict[str, Any]

MIN_ROWS = 2
METRICS = ("reward", "heldout_loss", "kl", "length")
"""Metrics of the prompt set that have a column where they were measured; the primary metric comes first."""
TUNINGS: TypeAdapter[Any] = TypeAdapter(Tuning)
TABLE_COLUMNS = {
    "stage": "Stage",
    "fitting": "Fitted by",
    "learning_rate": "Learning rate",
    "trainable_parameters": "Trained parameters",
    "share": "Share trained",
    "seconds": "Seconds",
    "peak_memory_bytes": "Peak memory, bytes",
}


@dataclass(frozen=True)
class Best:
    """The system with the best primary value, and the paired difference of every other one to it, by system."""

    name: str | None
    differences: Mapping[str, Mapping[str, Any]]


def methods_section(artifacts: Sequence[Artifact], card: Card, assets: AssetWriter) -> dict[str, Any] | None:
    """Return rows, columns and a sentence for the page; None with fewer than two trained checkpoints.

    The unrounded numbers are added to the files next to the page.
    """
    records = {artifact.stage: artifact.record for artifact in artifacts}
    # Only checkpoints whose training stage belongs to this run: the cost of others is not known.
    trained = {
        system["name"]: records[system["of"]]
        for system in card["systems"]
        if system["role"] == "checkpoint" and _was_trained(records.get(system["of"], {}))
    }
    if len(trained) < MIN_ROWS or card["primary"] not in card["metrics"]:
        return None
    metrics = [
        metric
        for metric in dict.fromkeys((card["primary"], *program_metrics(card["metrics"]), *METRICS))
        if any(metric in card["estimates"][name] for name in trained)
    ]
    best = find_best(artifacts, card, list(trained))
    rows = [_row(name, record, card, metrics, best) for name, record in trained.items()]
    table = [_table_row(name, record, card, metrics, best) for name, record in trained.items()]
    assets.add_table("methods", "Ways of fitting", _table_columns(card, metrics), table)
    return {
        "columns": [card["metrics"][metric]["title"] for metric in metrics],
        "rows": rows,
        "sentence": _sentence(card, best, list(trained)),
    }


def _was_trained(record: Mapping[str, Any]) -> bool:
    return "trainable_parameters" in (record.get("metrics") or {})


def describe_tuning(record: Mapping[str, Any]) -> str:
    """Return how a stage tuned its weights, in a few words: ``dpo, ipo, lora r16 DoRA``."""
    config = record.get("config") or {}
    parts = [str(record.get("kind", ""))]
    losses = config.get("losses") or {}
    loss = " + ".join(map(str, losses)) if losses else config.get("loss")
    if isinstance(loss, str):
        parts.append(loss)
    return ", ".join([*parts, _tuning_label(config.get("tuning") or {})])


def _tuning_label(tuning: Mapping[str, Any]) -> str:
    """Return a tuning's own short name; the method alone for a block that another version of align wrote."""
    try:
        return str(TUNINGS.validate_python({"method": "full", **tuning}).label)
    except ValidationError:
        return str(tuning.get("method"))


def find_best(artifacts: Sequence[Artifact], card: Card, names: Sequence[str]) -> Best:
    """Return the system with the best primary value among ``names``; none where the metric has no better side.

    A difference is missing where the scorecard's folder has no items of both. P-values are Holm-corrected.
    """
    primary = card["primary"]
    better = card["metrics"][primary]["better"]
    values = {name: estimate["value"] for name in names if (estimate := card["estimates"][name].get(primary))}
    if better is None or not values:
        return Best(None, {})
    # Turned so that more is better in either case.
    sign = -1 if better == "lower" else 1
    best = max(values, key=lambda name: sign * values[name])
    folder = next((artifact.path for artifact in reversed(artifacts) if artifact.kind == Kind.SCORECARD), None)
    if folder is None:
        return Best(best, {})
    # The folder's items, under the systems' own names: there is only one run here.
    items = EvaluatedRun("", card, folder, {name: name for name in names}).items
    settings = card["settings"]
    resampling = Resampling(int(settings.get("bootstrap", 10_000)), int(settings.get("seed", 0)))
    rows = {}
    for name in names:
        if name == best:
            continue
        # Paired over the items that both answered, as in the scorecard itself.
        first = items.get(name, {}).get(primary, {})
        second = items.get(best, {}).get(primary, {})
        row = paired_difference(first, second, resampling)
        if row is not None:
            rows[name] = {**row, "metric": primary}
    # The best of several was picked by its number, so all comparisons with it are corrected together.
    correct(list(rows.values()), card["metrics"])
    return Best(best, rows)


def _trained_share(record: Mapping[str, Any]) -> float | None:
    """Return the share of the weights that was trained; None where the record does not say."""
    parameters = record["metrics"].get("parameters")
    return record["metrics"]["trainable_parameters"] / parameters if parameters else None


def _row(name: str, record: Mapping[str, Any], card: Card, metrics: Sequence[str], best: Best) -> dict[str, Any]:
    """Return a checkpoint's row on the page, as text."""
    share = _trained_share(record)
    cells = []
    for metric in metrics:
        estimate = card["estimates"][name].get(metric)
        if estimate:
            cells.append({"value": number(estimate["value"]), "interval": interval(estimate)})
        else:
            cells.append({"value": MISSING, "interval": ""})
    return {
        "name": name,
        "fitting": describe_tuning(record),
        "rate": number((record.get("config") or {}).get("learning_rate")),
        "share": MISSING if share is None else f"{number(100 * share)} %",
        "time": duration(record.get("seconds")),
        "memory": size(record.get("peak_memory_bytes")),
        "cells": cells,
        "verdict": _verdict(name, best),
    }


def _verdict(name: str, best: Best) -> str:
    if name == best.name:
        return "best"
    row = best.differences.get(name)
    if row is None:
        return ""
    return "below the best" if row["verdict"] == "worse" else "not told apart from the best"


def _sentence(card: Card, best: Best, names: Sequence[str]) -> str:
    """Return which system was best, and which ones are not clearly below it."""
    if best.name is None:
        return "The primary metric has no better side, so none is called best."
    title = str(card["metrics"][card["primary"]]["title"])
    estimate = card["estimates"][best.name][card["primary"]]
    head = f"{title} is best for {best.name}: {number(estimate['value'])} ({interval(estimate)})."
    if not best.differences:
        return f"{head} The items of the others are not here, so it is not known which are really below it."
    close = [name for name in names if name in best.differences and best.differences[name]["verdict"] != "worse"]
    below = len(best.differences) - len(close)
    tail = f"; not told apart from it: {', '.join(close)}." if close else "."
    return f"{head} {below} of {len(names) - 1} others are clearly below it{tail}"


# ---- files next to the page ---------------------------------------------------------------------------------------


def _table_columns(card: Card, metrics: Sequence[str]) -> dict[str, str]:
    columns = dict(TABLE_COLUMNS)
    for metric in metrics:
        title = card["metrics"][metric]["title"]
        columns |= {metric: title, f"{metric}_low": f"{title}, low", f"{metric}_high": f"{title}, high"}
    return columns | {"to_best": "Difference to the best", "to_best_p": "p (Holm)"}


def _table_row(name: str, record: Mapping[str, Any], card: Card, metrics: Sequence[str], best: Best) -> dict[str, Any]:
    """Return a checkpoint's row for the files next to the page, unrounded."""
    row = {
        "stage": name,
        "fitting": describe_tuning(record),
        "learning_rate": (record.get("config") or {}).get("learning_rate"),
        "trainable_parameters": record["metrics"]["trainable_parameters"],
        "share": _trained_share(record),
        "seconds": record.get("seconds"),
        "peak_memory_bytes": record.get("peak_memory_bytes"),
    }
    for metric in metrics:
        estimate = card["estimates"][name].get(metric) or {}
        row[metric] = estimate.get("value")
        row[f"{metric}_low"] = estimate.get("low")
        row[f"{metric}_high"] = estimate.get("high")
    difference_to_best = best.differences.get(name) or {}
    row["to_best"] = difference_to_best.get("value")
    row["to_best_p"] = difference_to_best.get("p_holm")
    return row
