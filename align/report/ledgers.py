"""What every data stage did to its rows, step by step and source by source, and the licenses of data and models.

From ``ledger.json`` and the records alone: no texts of rows, kept or dropped, which may be private; a recipe's own
``preview.html`` has those. Torch-free.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from align.data.built import LEDGER
from align.data.licenses import UNKNOWN, normalize, of_mixture
from align.models.embedded import LICENSE, NAME
from align.models.source import TINY
from align.report.assets import Beside
from align.store.artifacts import DATASETS, Artifact

DATA = frozenset(DATASETS)
MOST_REASONS = 40
MADE_HERE = "random weights, made here"


def read_ledger(artifact: Artifact) -> dict[str, Any] | None:
    """A stage's ledger; None where it has none that can be read."""
    try:
        found = json.loads((artifact.path / LEDGER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def data_sections(artifacts: Sequence[Artifact], beside: Beside) -> list[dict[str, Any]]:
    """For each stage that makes rows: ``steps`` (rows in and out, with reasons), ``sources`` and ``splits``."""
    found = []
    for artifact in artifacts:
        if artifact.kind not in DATA:
            continue
        ledger = read_ledger(artifact) or {}
        recipe = isinstance(ledger.get("steps"), list)
        steps = [_step(line, ledger) for line in ledger["steps"]] if recipe else list(_levels(ledger))
        found.append(
            {
                "stage": artifact.stage,
                "kind": str(artifact.record.get("kind", "")),
                "makes": str(artifact.kind),
                "steps": steps,
                "sources": [_source(line) for line in ledger.get("sources") or []] if recipe else [],
                "splits": _splits(artifact, ledger),
                "choices": ledger.get("format_choices") or {},
                "counts": [] if ledger else list(_counts(artifact)),
                "preview": (artifact.path / "preview.html").is_file(),
            }
        )
    _keep_tables(found, beside)
    return found


def _step(line: Mapping[str, Any], ledger: Mapping[str, Any]) -> dict[str, Any]:
    """A line of the steps' table; the bar is the share of all records that are left."""
    whole = max(1, ledger.get("rows_in") or 0, line["rows_in"] + line.get("added", 0))
    by_source = line.get("by_source") or {}
    reasons = [
        {
            "reason": reason,
            "rows": rows,
            "by_source": {
                name: part["dropped"][reason] for name, part in by_source.items() if part["dropped"].get(reason)
            },
        }
        for reason, rows in sorted(line["dropped"].items(), key=lambda one: (-one[1], one[0]))
    ]
    return {
        "step": str(line["step"]),
        **{name: line.get(name, 0) for name in ("rows_in", "rows_out", "added", "changed")},
        "lost": sum(line["dropped"].values()),
        "width": 100 * line["rows_out"] / whole,
        "reasons": reasons[:MOST_REASONS],
        "more_reasons": max(0, len(reasons) - MOST_REASONS),
        "by_source": by_source,
    }


def _levels(ledger: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The same of a synthesis ledger, which counts prompts, answers and the like instead of steps."""
    for name, level in ledger.items():
        if isinstance(level, dict) and {"in", "out", "dropped"} <= level.keys():
            line = {"step": name, "rows_in": level["in"], "rows_out": level["out"], "dropped": level["dropped"]}
            yield _step(line, {"rows_in": level["in"]})


def _source(line: Mapping[str, Any]) -> dict[str, Any]:
    license = normalize(line.get("license"))
    return {
        "source": line["source"],
        "type": line.get("type", ""),
        "license": license,
        "unknown": license == UNKNOWN,
        **{name: line.get(name, 0) for name in ("rows_in", "rows_out", "added")},
        "lost": sum(line["dropped"].values()),
    }


def _splits(artifact: Artifact, ledger: Mapping[str, Any]) -> dict[str, int]:
    given = ledger.get("splits") or ledger.get("rows")
    if isinstance(given, dict):
        return {str(name): int(rows) for name, rows in given.items()}
    metrics = artifact.record.get("metrics") or {}
    return {name: int(metrics[f"{name}_rows"]) for name in ("train", "test") if f"{name}_rows" in metrics}


def _counts(artifact: Artifact) -> Iterator[tuple[str, Any]]:
    """What a stage without a ledger counted."""
    for name, value in (artifact.record.get("metrics") or {}).items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            yield name, value


# ---- licenses -----------------------------------------------------------------------------------------------------


def license_rows(artifacts: Sequence[Artifact], beside: Beside) -> list[dict[str, Any]]:
    """Licenses of the data and models that entered from outside: ``stage``, ``what``, ``license``, ``identity``."""
    rows = []
    for artifact in artifacts:
        if artifact.record.get("kind") == "model":
            rows.append(_model(artifact))
        ledger = read_ledger(artifact) if artifact.kind in DATA else None
        for line in (ledger or {}).get("sources") or []:
            license = normalize(line.get("license"))
            identity = "; ".join(f"{name}: {value}" for name, value in (line.get("identity") or {}).items())
            rows.append(_license(artifact.stage, "data", line["source"], license, identity))
    if rows:
        heads = {"stage": "Stage", "what": "What", "name": "Name", "license": "License", "identity": "Identity"}
        beside.table("licenses", "Licenses", heads, rows)
    return rows


def data_license(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Under what all the data together may be passed on; None without data from outside."""
    names = [row["license"] for row in rows if row["what"] == "data"]
    if not names:
        return None
    whole = of_mixture(names)
    return {"names": whole.names, "reason": whole.reason, "concerns": whole.concerns}


def _model(artifact: Artifact) -> dict[str, Any]:
    config = artifact.record.get("config") or {}
    source = str(config.get("source", ""))
    identity = str((artifact.record.get("identities") or {}).get("source", ""))
    return _license(artifact.stage, "model", source, model_license(artifact.model, source), identity)


def model_license(folder: Path, source: str) -> str:
    """A base model's license: of the built-in ones, or what a model card in its folder states; else ``unknown``."""
    if source == NAME:
        return normalize(LICENSE)
    if source == TINY:
        return MADE_HERE
    try:
        front = (folder / "README.md").read_text(encoding="utf-8").split("---")[1]
        stated = (yaml.safe_load(front) or {}).get("license")
    except (OSError, UnicodeDecodeError, IndexError, AttributeError, yaml.YAMLError):
        return UNKNOWN
    return normalize(stated if isinstance(stated, str) else None)


def _license(stage: str, what: str, name: str, license: str, identity: str) -> dict[str, Any]:
    found = {"stage": stage, "what": what, "name": name, "license": license, "identity": identity}
    return {**found, "unknown": license == UNKNOWN}


# ---- files --------------------------------------------------------------------------------------------------------


def _keep_tables(sections: Sequence[Mapping[str, Any]], beside: Beside) -> None:
    steps, reasons = [], []
    for section in sections:
        for step in section["steps"]:
            of = {"stage": section["stage"], "step": step["step"]}
            parts = step["by_source"] or {
                "": {**step, "dropped": {one["reason"]: one["rows"] for one in step["reasons"]}}
            }
            for source, part in parts.items():
                counts = {name: part.get(name, 0) for name in ("rows_in", "added", "changed", "rows_out")}
                steps.append({**of, "source": source, **counts, "dropped": sum(part["dropped"].values())})
                reasons += [{**of, "source": source, "reason": name, "rows": n} for name, n in part["dropped"].items()]
    heads = {"stage": "Stage", "step": "Step", "source": "Source"}
    counts = {
        "rows_in": "Rows in",
        "added": "Added",
        "changed": "Changed",
        "dropped": "Dropped",
        "rows_out": "Rows out",
    }
    if steps:
        beside.table("ledger", "Data ledger", {**heads, **counts}, steps)
        beside.table("dropped", "Dropped rows by reason", {**heads, "reason": "Reason", "rows": "Rows"}, reasons)
