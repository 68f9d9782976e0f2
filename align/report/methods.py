"""Ways of fitting side by side: what each trained checkpoint cost, what it came to, and which was best. Torch-free.

Each checkpoint of the scorecard that a training stage of this run made is a row: how it was fitted, the share of the
weights that was trained, time and memory of that stage alone, and the scorecard's numbers. The best by the primary
metric is compared with every other one on the items that both answered. Left out: what came before the stage, and
systems that are a way to use a checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import TypeAdapter, ValidationError

from align.config.tuning import Tuning
from align.evaluation.comparisons import Column, Resampling, correct, difference
from align.report.assets import Beside
from align.report.compare.cards import Evaluated
from align.report.wording import duration, interval, number, size
from align.store.artifacts import Artifact, Kind

Card = dict[str, Any]

FEWEST = 2
"""Rows from which there is something to compare."""
METRICS = ("gold", "reward", "heldout_loss", "kl", "length")
"""Metrics of the prompt set that have a column where they were measured; the primary metric comes first."""
TUNINGS: TypeAdapter[Any] = TypeAdapter(Tuning)


def section(artifacts: Sequence[Artifact], card: Card, beside: Beside) -> dict[str, Any] | None:
    """Rows, columns and a sentence for the page, the unrounded numbers beside it; None where nothing is to compare."""
    records = {artifact.stage: artifact.record for artifact in artifacts}
    fitted = [
        system["name"]
        for system in card["systems"]
        if system["role"] == "checkpoint" and _trained(records.get(system["of"], {}))
    ]
    if len(fitted) < FEWEST or card["primary"] not in card["metrics"]:
        return None
    shown = list(dict.fromkeys((card["primary"], *METRICS)))
    columns = [name for name in shown if any(name in card["estimates"][one] for one in fitted)]
    best, against = against_best(artifacts, card, fitted)
    stages = {system["name"]: records[system["of"]] for system in card["systems"] if system["name"] in fitted}
    rows = [_row(name, stages[name], card, columns, best, against.get(name)) for name in fitted]
    _keep(rows, card, columns, beside)
    return {
        "columns": [card["metrics"][name]["title"] for name in columns],
        "rows": rows,
        "sentence": _sentence(card, best, against, fitted),
    }


def _trained(record: Mapping[str, Any]) -> bool:
    return "trainable_parameters" in (record.get("metrics") or {})


def fitting(record: Mapping[str, Any]) -> str:
    """How a stage fitted its weights, in a few words: ``dpo, ipo, lora r16 DoRA``."""
    config = record.get("config") or {}
    text = _label(config.get("tuning") or {})
    losses = config.get("losses") or {}
    loss = " + ".join(map(str, losses)) if losses else config.get("loss")
    return ", ".join([str(record.get("kind", "")), *([loss] if isinstance(loss, str) else []), text])


def _label(tuning: Mapping[str, Any]) -> str:
    """A tuning's own short name; of a block that another align wrote, its method."""
    try:
        return str(TUNINGS.validate_python({"method": "full", **tuning}).label)
    except ValidationError:
        return str(tuning.get("method"))


def against_best(
    artifacts: Sequence[Artifact], card: Card, names: Sequence[str]
) -> tuple[str | None, dict[str, dict[str, Any]]]:
    """The system with the best primary value, and by every other one the paired difference to it.

    A difference is missing where the scorecard's folder has no items of both; p-values are Holm-corrected.
    """
    primary = card["primary"]
    about = card["metrics"][primary]
    sign = -1 if about["better"] == "lower" else 1
    values = {name: estimate["value"] for name in names if (estimate := card["estimates"][name].get(primary))}
    if about["better"] is None or not values:
        return None, {}
    best = max(values, key=lambda name: sign * values[name])
    folder = next((one.path for one in reversed(artifacts) if one.kind == Kind.SCORECARD), None)
    if folder is None:
        return best, {}
    items = Evaluated("", card, folder, {name: name for name in names}).items
    settings = card["settings"]
    resampling = Resampling(int(settings.get("bootstrap", 10_000)), int(settings.get("seed", 0)))
    rows = {}
    for name in names:
        first, second = (items.get(one, {}).get(primary, {}) for one in (name, best))
        common = [place for place in first if place in second]
        if name != best and common:
            row = difference(Column([first[at] for at in common]), Column([second[at] for at in common]), resampling)
            if row is not None:
                rows[name] = {**row, "metric": primary}
    correct(list(rows.values()), card["metrics"])
    return best, rows


def _row(
    name: str,
    record: Mapping[str, Any],
    card: Card,
    columns: Sequence[str],
    best: str | None,
    against: Mapping[str, Any] | None,
) -> dict[str, Any]:
    metrics = record["metrics"]
    trained, all_of = metrics["trainable_parameters"], metrics.get("parameters")
    share = trained / all_of if all_of else None
    estimates = [card["estimates"][name].get(column) for column in columns]
    return {
        "name": name,
        "fitting": fitting(record),
        "rate": number((record.get("config") or {}).get("learning_rate")),
        "share": "–" if share is None else f"{number(100 * share)} %",
        "time": duration(record.get("seconds")),
        "memory": size(record.get("peak_memory_bytes")),
        "cells": [
            {"value": number(one["value"]), "interval": interval(one)} if one else {"value": "–", "interval": ""}
            for one in estimates
        ],
        "verdict": "best" if name == best else "" if against is None else _standing(against),
        "plain": {
            "stage": name,
            "fitting": fitting(record),
            "learning_rate": (record.get("config") or {}).get("learning_rate"),
            "trainable_parameters": trained,
            "share": share,
            "seconds": record.get("seconds"),
            "peak_memory_bytes": record.get("peak_memory_bytes"),
            **{
                f"{column}{suffix}": one[key] if one else None
                for column, one in zip(columns, estimates, strict=True)
                for suffix, key in (("", "value"), ("_low", "low"), ("_high", "high"))
            },
            "to_best": None if against is None else against["value"],
            "to_best_p": None if against is None else against["p_holm"],
        },
    }


def _standing(row: Mapping[str, Any]) -> str:
    return "below the best" if row["verdict"] == "worse" else "not told apart from the best"


def _sentence(card: Card, best: str | None, against: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> str:
    """Which was best, and which cannot be told from it."""
    if best is None:
        return "The primary metric has no better side, so none is called best."
    title = str(card["metrics"][card["primary"]]["title"])
    found = card["estimates"][best][card["primary"]]
    head = f"{title} is best for {best}: {number(found['value'])} ({interval(found)})."
    if not against:
        return f"{head} The items of the others are not here, so it is not known which are really below it."
    level = [name for name in names if name in against and against[name]["verdict"] != "worse"]
    below = len(against) - len(level)
    tail = f"{below} of {len(names) - 1} others are clearly below it"
    return f"{head} {tail}" + (f"; not told apart from it: {', '.join(level)}." if level else ".")


def _keep(rows: Sequence[Mapping[str, Any]], card: Card, columns: Sequence[str], beside: Beside) -> None:
    heads = {"stage": "Stage", "fitting": "Fitted by", "learning_rate": "Learning rate",
             "trainable_parameters": "Trained parameters", "share": "Share trained", "seconds": "Seconds",
             "peak_memory_bytes": "Peak memory, bytes"}  # fmt: skip
    for column in columns:
        title = card["metrics"][column]["title"]
        heads |= {column: title, f"{column}_low": f"{title}, low", f"{column}_high": f"{title}, high"}
    heads |= {"to_best": "Difference to the best", "to_best_p": "p (Holm)"}
    beside.table("methods", "Ways of fitting", heads, [row["plain"] for row in rows])
