"""What each stage cost and how it was made: time, memory, tokens, money, command, versions, seeds. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from align.report.assets import Beside
from align.report.curves import Events
from align.report.tables import as_yaml
from align.report.wording import count, duration, number, size
from align.store.artifacts import Artifact

MOST_METRICS = 80


def totals(artifacts: Sequence[Artifact]) -> dict[str, Any]:
    """Sums over the stages, and what they have in common."""
    records = [artifact.record for artifact in artifacts]
    costs = [cost for record in records if (cost := money(record)) is not None]
    return {
        "stages": len(records),
        "seconds": sum(record.get("seconds") or 0 for record in records),
        "memory": max((record.get("peak_memory_bytes") or 0 for record in records), default=0),
        "tokens": sum(record.get("tokens") or 0 for record in records),
        "cost": sum(costs) if costs else None,
        "command": next((str(r["command"]) for r in reversed(records) if r.get("command")), None),
        "git": next((str(r["git"]) for r in reversed(records) if r.get("git")), None),
        "platform": next((str(r["platform"]) for r in reversed(records) if r.get("platform")), None),
    }


def money(record: Mapping[str, Any]) -> float | None:
    """What a stage's endpoints asked for by their prices, in their currency; None where nothing had a price."""
    cost = (record.get("metrics") or {}).get("cost")
    return float(cost) if isinstance(cost, (int, float)) and not isinstance(cost, bool) else None


def device(record: Mapping[str, Any]) -> str:
    """The machine, and the engines that sampled where the record names them."""
    metrics = record.get("metrics") or {}
    engines = metrics.get("engines") or ([metrics["engine"]] if metrics.get("engine") else [])
    parts = [str(record.get("device") or record.get("platform") or ""), *map(str, engines)]
    return ", ".join(part for part in parts if part)


def stage_rows(artifacts: Sequence[Artifact], events: Mapping[str, Events]) -> list[dict[str, Any]]:
    """What each stage cost and how it was made: numbers, settings as YAML, versions, warnings."""
    return [_stage(artifact, events[artifact.stage]) for artifact in artifacts]


def _stage(artifact: Artifact, events: Events) -> dict[str, Any]:
    record = artifact.record
    tokens, seconds, cost = record.get("tokens"), record.get("seconds"), money(record)
    speed = tokens / seconds if tokens and seconds else None
    return {
        "name": artifact.stage,
        "kind": str(record.get("kind", "")),
        "makes": str(record.get("makes", artifact.kind)),
        "time": duration(seconds),
        "memory": size(record.get("peak_memory_bytes")),
        "tokens": count(tokens) if tokens else "–",
        "speed": f"{number(speed)} tok/s" if speed else "–",
        "cost": "–" if cost is None else number(cost),
        "device": device(record),
        "created": str(record.get("created", ""))[:16].replace("T", " "),
        "key": str(record.get("key", ""))[:12],
        "facts": _facts(record),
        "config": as_yaml(record.get("config", {})),
        "metrics": flatten(record.get("metrics", {})),
        "warnings": events.warnings,
        "notes": events.notes,
    }


def _facts(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    packages = record.get("packages") or {}
    facts = [
        ("Command", record.get("command")),
        ("Seed", record.get("seed")),
        ("Key", record.get("key")),
        ("Stage version", record.get("version")),
        ("Reads", ", ".join(f"{one['stage']} {one['key'][:12]}" for one in record.get("input_stages", []))),
        ("Outside the store", ", ".join(f"{name}: {value}" for name, value in record.get("identities", {}).items())),
        ("Git commit", record.get("git")),
        ("Packages", ", ".join(f"{name} {version}" for name, version in packages.items())),
        ("Machine", device(record)),
        ("Made", record.get("created")),
    ]
    return [(name, str(value)) for name, value in facts if value not in (None, "")]


def flatten(metrics: Any, prefix: str = "", most: int = MOST_METRICS) -> list[tuple[str, str]]:
    """Nested metrics as (dotted name, number) rows, at most ``most`` of them; lists of records are left out."""
    rows: list[tuple[str, str]] = []
    if not isinstance(metrics, dict):
        return rows
    for name, value in metrics.items():
        path = f"{prefix}{name}"
        if isinstance(value, dict):
            rows += flatten(value, f"{path}.", most)
        elif isinstance(value, list):
            if value and all(not isinstance(item, (dict, list)) for item in value):
                rows.append((path, ", ".join(number(item) for item in value[:12])))
        elif value is not None:
            rows.append((path, number(value)))
    return rows[:most]


def keep_tables(artifacts: Sequence[Artifact], beside: Beside) -> None:
    """Put the stages' costs among the files beside the page, unrounded."""
    rows = []
    for artifact in artifacts:
        record = artifact.record
        rows.append(
            {
                **{name: record.get(name) for name in ("kind", "seconds", "peak_memory_bytes", "tokens", "created")},
                **{name: record.get(name) for name in ("seed", "version", "key", "git", "command")},
                "stage": artifact.stage,
                "cost": money(record),
                "device": device(record),
            }
        )
    beside.table(
        "stages",
        "Stages",
        {"stage": "Stage", "kind": "Kind", "seconds": "Seconds", "peak_memory_bytes": "Peak memory, bytes",
         "tokens": "Tokens", "cost": "Cost", "device": "Machine", "created": "Made", "seed": "Seed",
         "version": "Stage version", "key": "Key", "git": "Git commit", "command": "Command"},
        rows,
    )  # fmt: skip
