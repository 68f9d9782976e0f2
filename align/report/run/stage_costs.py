"""Costs and provenance of each stage: time, memory, tokens, money, command, versions, seeds. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from align.report.curves.metric_series import Events
from align.report.page.assets import AssetWriter
from align.report.page.number_format import MISSING, count, duration, number, size
from align.report.scorecard.scorecard_tables import as_yaml
from align.store.artifacts import Artifact

SAMPLE_METRICS = {
    "prompts": "prompts that were answered",
    "too_long": "prompts longer than max_prompt_tokens, which were skipped",
    "empty_responses": "responses without text, which are in no pair",
    "prompts_too_few": "prompts with fewer than two responses that have text",
    "compared": "comparisons of two responses to a prompt",
    "identical": "comparisons of equal texts, which make no pair",
    "tied": "comparisons of equal scores, which make no pair",
    "pairs": "pairs of a better and a worse response",
    "flipped": "pairs whose label is wrong on purpose (noise)",
    "mean_score": "mean score of all responses",
    "eos_rate": "share of responses that end by themselves",
    "mean_tokens": "mean length of a response in tokens",
}
"""Metric of a ``sample`` stage, without its split, and its meaning."""
MAX_METRICS = 80
MAX_LIST_ITEMS = 12
SPLITS = ("train", "test")
COST_COLUMNS = {
    "stage": "Stage",
    "kind": "Kind",
    "seconds": "Seconds",
    "peak_memory_bytes": "Peak memory, bytes",
    "tokens": "Tokens",
    "cost": "Cost",
    "device": "Machine",
    "created": "Made",
    "seed": "Seed",
    "version": "Stage version",
    "key": "Key",
    "git": "Git commit",
    "command": "Command",
}
"""Columns of the ``stages`` table next to the page; those but stage, cost and device are fields of the record."""


def totals(artifacts: Sequence[Artifact]) -> dict[str, Any]:
    """Return sums over the stages, and the last known command, commit and platform."""
    records = [artifact.record for artifact in artifacts]
    costs = [cost for record in records if (cost := endpoint_cost(record)) is not None]
    return {
        "stages": len(records),
        "seconds": sum(record.get("seconds") or 0 for record in records),
        "memory": max((record.get("peak_memory_bytes") or 0 for record in records), default=0),
        "tokens": sum(record.get("tokens") or 0 for record in records),
        "cost": sum(costs) if costs else None,
        "command": _last_value(records, "command"),
        "git": _last_value(records, "git"),
        "platform": _last_value(records, "platform"),
    }


def _last_value(records: Sequence[Mapping[str, Any]], field: str) -> str | None:
    """Return ``field`` of the last record that has it."""
    return next((str(record[field]) for record in reversed(records) if record.get(field)), None)


def endpoint_cost(record: Mapping[str, Any]) -> float | None:
    """Return the cost of a stage's endpoints, in the currency of their prices; None if no endpoint had a price."""
    cost = (record.get("metrics") or {}).get("cost")
    return float(cost) if isinstance(cost, (int, float)) and not isinstance(cost, bool) else None


def device(record: Mapping[str, Any]) -> str:
    """Return the machine, and the engines that sampled if the record names them."""
    metrics = record.get("metrics") or {}
    engines = metrics.get("engines") or ([metrics["engine"]] if metrics.get("engine") else [])
    parts = [str(record.get("device") or record.get("platform") or ""), *map(str, engines)]
    return ", ".join(part for part in parts if part)


def stage_rows(artifacts: Sequence[Artifact], events: Mapping[str, Events]) -> list[dict[str, Any]]:
    """Return each stage's numbers, settings as YAML, versions, warnings and notes, as text."""
    return [_stage_row(artifact, events[artifact.stage]) for artifact in artifacts]


def _stage_row(artifact: Artifact, events: Events) -> dict[str, Any]:
    record = artifact.record
    tokens = record.get("tokens")
    seconds = record.get("seconds")
    cost = endpoint_cost(record)
    # Over all attempts, lost work included: the record's seconds are their sum.
    speed = tokens / seconds if tokens and seconds else None
    return {
        "name": artifact.stage,
        "kind": str(record.get("kind", "")),
        "makes": str(record.get("makes", artifact.kind)),
        "time": duration(seconds),
        "memory": size(record.get("peak_memory_bytes")),
        "tokens": count(tokens) if tokens else MISSING,
        "speed": f"{number(speed)} tok/s" if speed else MISSING,
        "cost": number(cost),
        "device": device(record),
        "created": str(record.get("created", ""))[:16].replace("T", " "),
        "key": str(record.get("key", ""))[:12],
        "facts": _facts(record),
        "config": as_yaml(record.get("config", {})),
        "metrics": [(name, value, _meaning(record, name)) for name, value in flatten(record.get("metrics", {}))],
        "warnings": events.warnings,
        "notes": events.notes,
    }


def _facts(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (name, value) pairs of a stage's provenance, without empty values."""
    inputs = [f"{link['stage']} {link['key'][:12]}" for link in record.get("input_stages", [])]
    identities = [f"{name}: {value}" for name, value in record.get("identities", {}).items()]
    packages = [f"{name} {version}" for name, version in (record.get("packages") or {}).items()]
    facts = [
        ("Command", record.get("command")),
        ("Seed", record.get("seed")),
        ("Key", record.get("key")),
        ("Stage version", record.get("version")),
        ("Reads", ", ".join(inputs)),
        ("Outside the store", ", ".join(identities)),
        ("Git commit", record.get("git")),
        ("Precision", record.get("precision")),
        ("Packages", ", ".join(packages)),
        ("Machine", device(record)),
        ("Made", record.get("created")),
    ]
    return [(name, str(value)) for name, value in facts if value not in (None, "")]


def _meaning(record: Mapping[str, Any], metric: str) -> str:
    """Return the meaning of a metric of a ``sample`` stage; empty for the metrics of other stages."""
    split, _, name = metric.partition("_")
    if record.get("kind") != "sample" or split not in SPLITS:
        return ""
    if name.startswith("mean_score_"):
        return f"mean of the score {name.removeprefix('mean_score_')}, {split} split"
    return f"{SAMPLE_METRICS[name]}, {split} split" if name in SAMPLE_METRICS else ""


def flatten(metrics: Any, prefix: str = "", limit: int = MAX_METRICS) -> list[tuple[str, str]]:
    """Return nested metrics as at most ``limit`` rows of (dotted name, number); lists of records are skipped."""
    rows: list[tuple[str, str]] = []
    if not isinstance(metrics, dict):
        return rows
    for name, value in metrics.items():
        path = f"{prefix}{name}"
        if isinstance(value, dict):
            rows += flatten(value, f"{path}.", limit)
        elif isinstance(value, list):
            # Short lists of numbers or names fit in a row; records of evaluations would not.
            if value and all(not isinstance(item, (dict, list)) for item in value):
                rows.append((path, ", ".join(number(item) for item in value[:MAX_LIST_ITEMS])))
        elif value is not None:
            rows.append((path, number(value)))
    return rows[:limit]


def add_cost_table(artifacts: Sequence[Artifact], assets: AssetWriter) -> None:
    """Add the stages' costs, unrounded, to the files next to the page."""
    rows = []
    for artifact in artifacts:
        record = artifact.record
        row = {name: record.get(name) for name in COST_COLUMNS}
        rows.append({**row, "stage": artifact.stage, "cost": endpoint_cost(record), "device": device(record)})
    assets.add_table("stages", "Stages", COST_COLUMNS, rows)
