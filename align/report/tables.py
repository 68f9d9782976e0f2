"""The page's tables as plain rows of text: scorecard, differences, stages and their settings. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from align.artifacts import Artifact
from align.report.curves import Events
from align.report.summary import compared_with, find
from align.report.wording import MARKS, WORDS, count, duration, interval, number, p_value, signed, size

Card = dict[str, Any]


def scorecard_rows(card: Card) -> list[dict[str, Any]]:
    """One row a metric, one cell a checkpoint: value, interval, and the paired difference to its comparison."""
    rows = []
    for metric, about in card["metrics"].items():
        cells = []
        for policy in card["policies"]:
            estimate = card["estimates"][policy].get(metric)
            against = compared_with(card, policy)
            row = None if against is None else find(card, policy, against, metric)
            cells.append(
                {
                    "value": number(estimate and estimate["value"]),
                    "interval": interval(estimate) if estimate else "",
                    "n": estimate["n"] if estimate else 0,
                    "change": "" if row is None else signed(row["value"]),
                    "change_interval": "" if row is None else interval(row, True),
                    "against": against,
                    "verdict": "" if row is None else row["verdict"],
                    "mark": "" if row is None else MARKS[row["verdict"]],
                    "words": "" if row is None else WORDS[row["verdict"]],
                }
            )
        rows.append({"metric": metric, **about, "primary": metric == card["primary"], "cells": cells})
    return rows


def difference_rows(card: Card) -> list[dict[str, Any]]:
    """Every paired difference of the scorecard."""
    return [
        {
            "policy": row["policy"],
            "against": row["against"],
            "title": card["metrics"][row["metric"]]["title"],
            "value": signed(row["value"]),
            "interval": interval(row, True),
            "n": row["n"],
            "p": p_value(row["p"]),
            "p_holm": p_value(row["p_holm"]),
            "test": {"mcnemar": "exact McNemar", "sign-flip": "sign-flip permutation"}[row["test"]],
            "verdict": row["verdict"],
            "mark": MARKS[row["verdict"]],
            "words": WORDS[row["verdict"]],
        }
        for row in card["differences"]
    ]


def family_rows(card: Card) -> list[dict[str, Any]]:
    """The primary metric of every source and checkpoint, regressions and gains against the reference marked."""
    verdicts = {
        (row["family"], row["policy"]): row for row in card["family_differences"] if row["against"] == card["reference"]
    }
    rows = []
    for family, about in card["families"].items():
        cells = []
        for policy in card["policies"]:
            estimate = about["estimates"][policy].get(card["primary"])
            row = verdicts.get((family, policy))
            cells.append(
                {
                    "value": number(estimate and estimate["value"]),
                    "interval": interval(estimate) if estimate else "",
                    "change": "" if row is None else signed(row["value"]),
                    "verdict": "" if row is None else row["verdict"],
                    "mark": "" if row is None else MARKS[row["verdict"]],
                    "words": "" if row is None else WORDS[row["verdict"]],
                }
            )
        rows.append({"family": family, "n": about["n"], "cells": cells})
    return rows


def stage_rows(artifacts: Sequence[Artifact], events: dict[str, Events]) -> list[dict[str, Any]]:
    """What each stage cost and how it was made: numbers, settings as YAML, versions, warnings."""
    return [_stage(artifact, events[artifact.stage]) for artifact in artifacts]


def _stage(artifact: Artifact, events: Events) -> dict[str, Any]:
    record = artifact.record
    tokens, seconds = record.get("tokens"), record.get("seconds")
    speed = tokens / seconds if tokens and seconds else None
    return {
        "name": artifact.stage,
        "kind": str(record.get("kind", "")),
        "makes": str(record.get("makes", artifact.kind)),
        "time": duration(seconds),
        "memory": size(record.get("peak_memory_bytes")),
        "tokens": count(tokens) if tokens else "–",
        "speed": f"{number(speed)} tok/s" if speed else "–",
        "created": str(record.get("created", ""))[:16].replace("T", " "),
        "key": str(record.get("key", ""))[:12],
        "facts": _facts(record),
        "config": yaml.safe_dump(record.get("config", {}), sort_keys=False, allow_unicode=True, width=100),
        "metrics": flatten(record.get("metrics", {})),
        "warnings": events.warnings,
    }


def _facts(record: dict[str, Any]) -> list[tuple[str, str]]:
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
        ("Machine", record.get("platform")),
        ("Made", record.get("created")),
    ]
    return [(name, str(value)) for name, value in facts if value not in (None, "")]


def flatten(metrics: Any, prefix: str = "", most: int = 80) -> list[tuple[str, str]]:
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
