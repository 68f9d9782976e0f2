"""Comparison of tuning methods: cost and results of each trained checkpoint, and which was best. Torch-free.

Each checkpoint of the scorecard from a training stage of this run is a row: how it was tuned, the share of weights that
was trained, time and memory of only that stage, and the scorecard's numbers. The best by the primary metric is compared
with every other row on the items that both answered. Earlier stages, and systems that use a checkpoint in another way,
are skipped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import TypeAdapter, ValidationError

from align.config.tuning import Tuning
from align.evaluation.scorecard import program_metrics
from align.report.page.assets import AssetWriter
from align.report.page.number_format import MISSING, duration, estimate_text, number, size, value_with_interval
from align.report.scorecard.decision import Best, find_best, item_columns, join_names
from align.store.artifacts import Artifact

Card = dict[str, Any]

MIN_ROWS = 2
METRICS = ("reward", "heldout_loss", "kl", "length")
"""Metrics of the prompt set that have a column if they were measured; the primary metric comes first."""
TUNINGS: TypeAdapter[Any] = TypeAdapter(Tuning)


def methods_section(artifacts: Sequence[Artifact], card: Card, assets: AssetWriter) -> dict[str, Any] | None:
    """Return rows, columns and a sentence for the page; None with fewer than two trained checkpoints.

    The unrounded numbers are added to the files next to the page.
    """
    records = {artifact.stage: artifact.record for artifact in artifacts}
    # Only checkpoints whose training stage belongs to this run: the cost of others is not known.
    checkpoints = [system for system in card["systems"] if system["role"] == "checkpoint"]
    trained = {
        system["name"]: records[system["of"]] for system in checkpoints if _was_trained(records.get(system["of"], {}))
    }
    if len(trained) < MIN_ROWS or card["primary"] not in card["metrics"]:
        return None
    metrics = [
        metric
        for metric in dict.fromkeys((card["primary"], *program_metrics(card["metrics"]), *METRICS))
        if any(metric in card["estimates"][name] for name in trained)
    ]
    best = find_best(card, item_columns(artifacts, card), list(trained))
    rows = [_row(name, record, card, metrics, best) for name, record in trained.items()]
    table = [_table_row(name, record, card, metrics, best) for name, record in trained.items()]
    columns: dict[str, str] = {}
    for metric in metrics:
        title = card["metrics"][metric]["title"]
        columns |= {metric: title, f"{metric}_low": f"{title}, low", f"{metric}_high": f"{title}, high"}
    assets.add_table("methods", table, columns)
    return {
        "columns": [card["metrics"][metric]["title"] for metric in metrics],
        "rows": rows,
        "sentence": _sentence(card, best, list(trained)),
    }


def _was_trained(record: Mapping[str, Any]) -> bool:
    return "trainable_parameters" in (record.get("metrics") or {})


def describe_tuning(record: Mapping[str, Any]) -> str:
    """Return a short description of a stage's tuning: ``dpo, ipo, lora r16 DoRA``."""
    config = record.get("config") or {}
    parts = [str(record.get("kind", ""))]
    losses = config.get("losses") or {}
    loss = " + ".join(map(str, losses)) if losses else config.get("loss")
    if isinstance(loss, str):
        parts.append(loss)
    return ", ".join([*parts, _tuning_label(config.get("tuning") or {})])


def _tuning_label(tuning: Mapping[str, Any]) -> str:
    """Return a tuning's own short name; only the method for a block that another version of align wrote."""
    try:
        return str(TUNINGS.validate_python({"method": "full", **tuning}).label)
    except ValidationError:
        return str(tuning.get("method"))


def _trained_share(record: Mapping[str, Any]) -> float | None:
    """Return the share of the weights that was trained; None if the record does not have it."""
    parameters = record["metrics"].get("parameters")
    return record["metrics"]["trainable_parameters"] / parameters if parameters else None


def _row(name: str, record: Mapping[str, Any], card: Card, metrics: Sequence[str], best: Best) -> dict[str, Any]:
    """Return a checkpoint's row on the page, as text."""
    share = _trained_share(record)
    return {
        "name": name,
        "fitting": describe_tuning(record),
        "rate": number((record.get("config") or {}).get("learning_rate")),
        "share": MISSING if share is None else f"{number(100 * share)} %",
        "time": duration(record.get("seconds")),
        "memory": size(record.get("peak_memory_bytes")),
        "cells": [estimate_text(card["estimates"][name].get(metric)) for metric in metrics],
        "verdict": _verdict(name, best),
    }


def _verdict(name: str, best: Best) -> str:
    if name == best.name:
        # A best row that is not clearly above any other is not a winner: its number may be the highest by chance.
        is_winner = not best.differences or len(best.ties) < len(best.differences)
        return "best" if is_winner else "not told apart"
    row = best.differences.get(name)
    if row is None:
        return ""
    if row["verdict"] == "worse":
        return "below the best"
    return "not told apart from the best" if len(best.ties) < len(best.differences) else "not told apart"


def _sentence(card: Card, best: Best, names: Sequence[str]) -> str:
    """Return which system was best, and which systems are not clearly below it."""
    if best.name is None:
        return "The primary metric has no better side, so none is called best."
    title = str(card["metrics"][card["primary"]]["title"])
    estimate = card["estimates"][best.name][card["primary"]]
    head = f"{title} is best for {best.name}: {value_with_interval(estimate)}."
    if not best.differences:
        return f"{head} The items of the others are not here, so it is not known which are really below it."
    below = len(best.differences) - len(best.ties)
    if not below:
        return f"{title} tells none of them apart: {join_names(list(names))}."
    tail = f"; not told apart from it: {', '.join(best.ties)}." if best.ties else "."
    return f"{head} {below} of {len(names) - 1} others are clearly below it{tail}"


def _table_row(name: str, record: Mapping[str, Any], card: Card, metrics: Sequence[str], best: Best) -> dict[str, Any]:
    """Return a checkpoint's row for the files next to the page, unrounded."""
    row = {
        **record,
        "stage": name,
        "fitting": describe_tuning(record),
        "learning_rate": (record.get("config") or {}).get("learning_rate"),
        "trainable_parameters": record["metrics"]["trainable_parameters"],
        "share": _trained_share(record),
    }
    for metric in metrics:
        estimate = card["estimates"][name].get(metric) or {}
        row[metric] = estimate.get("value")
        row[f"{metric}_low"] = estimate.get("low")
        row[f"{metric}_high"] = estimate.get("high")
    difference = best.differences.get(name) or {}
    return row | {"to_best": difference.get("value"), "to_best_p": difference.get("p_holm")}
