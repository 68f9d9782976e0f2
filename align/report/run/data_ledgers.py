"""Data ledgers: rows in and out of every step and source of each data stage, and the licenses of data and models.

Everything comes from ``ledger.json`` and the records. Texts of rows, which may be private, stay out of the page; a
recipe's own ``preview.html`` has them. Torch-free.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from align.data.builds.build_files import LEDGER
from align.data.card import UNKNOWN, License, mixture_license, normalize_license
from align.models.built_in import LICENSE, NAME
from align.models.checkpoints.source import TINY
from align.report.page.assets import AssetWriter
from align.store.artifacts import DATASETS, Artifact

DATASET_KINDS = frozenset(DATASETS)
MADE_HERE = "random weights, made here"
"""License of the built-in model with random weights, in which no third party holds rights."""


def read_ledger(artifact: Artifact) -> dict[str, Any] | None:
    """Return a stage's ledger; None if it does not exist or cannot be read."""
    try:
        ledger = json.loads((artifact.path / LEDGER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return ledger if isinstance(ledger, dict) else None


def data_sections(artifacts: Sequence[Artifact]) -> list[dict[str, Any]]:
    """Return each data stage's ``steps`` (rows in and out, with reasons), ``sources`` and ``splits``."""
    return [_section(artifact) for artifact in artifacts if artifact.kind in DATASET_KINDS]


def _section(artifact: Artifact) -> dict[str, Any]:
    ledger = read_ledger(artifact) or {}
    # A recipe's ledger lists steps and sources; a synthesis ledger counts prompts, answers and the like by level.
    if isinstance(ledger.get("steps"), list):
        steps = [step_row(line, ledger.get("rows_in") or 0) for line in ledger["steps"]]
        sources = [source_row(line) for line in ledger.get("sources") or []]
    else:
        steps = []
        for name, level in ledger.items():
            if isinstance(level, dict) and {"in", "out", "dropped"} <= level.keys():
                line = {"step": name, "rows_in": level["in"], "rows_out": level["out"], "dropped": level["dropped"]}
                steps.append(step_row(line, level["in"]))
        sources = []
    return {
        "stage": artifact.stage,
        "kind": str(artifact.record.get("kind", "")),
        "makes": str(artifact.kind),
        "steps": steps,
        "sources": sources,
        "splits": _splits(artifact, ledger),
        "choices": ledger.get("format_choices") or {},
        "counts": [] if ledger else _metric_counts(artifact),
        "preview": (artifact.path / "preview.html").is_file(),
    }


def step_row(line: Mapping[str, Any], records: int) -> dict[str, Any]:
    """Return a row of the table of steps; ``width`` of its bar is the percentage of all ``records`` that are left."""
    # A step may add rows, so there may be more than were read. 1 avoids a division by zero.
    total = max(1, records, line["rows_in"] + line.get("added", 0))
    by_source = line.get("by_source") or {}
    reasons = []
    for reason, rows in sorted(line["dropped"].items(), key=lambda item: (-item[1], item[0])):
        lost = {source: counts["dropped"].get(reason) for source, counts in by_source.items()}
        lost = {source: count for source, count in lost.items() if count}
        reasons.append({"reason": reason, "rows": rows, "by_source": lost, "width": 100 * rows / total})
    return {
        **{name: line.get(name, 0) for name in ("rows_in", "rows_out", "added", "changed")},
        "step": str(line["step"]),
        "lost": sum(line["dropped"].values()),
        "width": 100 * line["rows_out"] / total,
        "reasons": reasons,
        "by_source": by_source,
    }


def source_row(line: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of the table of sources."""
    license = normalize_license(line.get("license"))
    return {
        **{name: line.get(name, 0) for name in ("rows_in", "rows_out", "added")},
        "source": line["source"],
        "type": line.get("type", ""),
        "license": license,
        "unknown": license == UNKNOWN,
        "lost": sum(line["dropped"].values()),
    }


def _splits(artifact: Artifact, ledger: Mapping[str, Any]) -> dict[str, int]:
    """Return rows by split, from the ledger or else from the record's metrics."""
    splits = ledger.get("splits") or ledger.get("rows")
    if isinstance(splits, dict):
        return {str(name): int(rows) for name, rows in splits.items()}
    metrics = artifact.record.get("metrics") or {}
    return {name: int(metrics[f"{name}_rows"]) for name in ("train", "test") if f"{name}_rows" in metrics}


def _metric_counts(artifact: Artifact) -> list[tuple[str, Any]]:
    """Return the numbers in the record of a stage without a ledger."""
    metrics = (artifact.record.get("metrics") or {}).items()
    return [(name, value) for name, value in metrics if isinstance(value, (int, float)) and not isinstance(value, bool)]


# ---- licenses -----------------------------------------------------------------------------------------------------


def license_rows(artifacts: Sequence[Artifact]) -> list[dict[str, Any]]:
    """Return licenses of the data and models that entered from outside: ``stage``, ``what``, ``license``, ``identity``.

    ``what`` is ``model`` or ``data``.
    """
    rows = []

    def add(artifact: Artifact, origin: str, name: str, license: str, identity: str) -> None:
        row = {"stage": artifact.stage, "what": origin, "name": name, "license": license, "identity": identity}
        rows.append({**row, "unknown": license == UNKNOWN})

    for artifact in artifacts:
        if artifact.record.get("kind") == "model":
            source = str((artifact.record.get("config") or {}).get("source", ""))
            identity = str((artifact.record.get("identities") or {}).get("source", ""))
            add(artifact, "model", source, model_license(artifact.model, source), identity)
        ledger = read_ledger(artifact) if artifact.kind in DATASET_KINDS else None
        for line in (ledger or {}).get("sources") or []:
            identity = "; ".join(f"{name}: {value}" for name, value in (line.get("identity") or {}).items())
            add(artifact, "data", line["source"], normalize_license(line.get("license")), identity)
    return rows


def data_license(rows: Sequence[Mapping[str, Any]]) -> License | None:
    """Return the license under which all the data together may be passed on; None without data from outside."""
    # Models are skipped, because their licenses bind the weights, not the rows.
    names = [row["license"] for row in rows if row["what"] == "data"]
    return mixture_license(names) if names else None


def model_license(folder: Path, source: str) -> str:
    """Return a base model's license: a built-in model's, or the license in its model card, else ``unknown``."""
    if source == NAME:
        return normalize_license(LICENSE)
    if source == TINY:
        return MADE_HERE
    try:
        # A model card begins with YAML between two lines of dashes.
        front_matter = (folder / "README.md").read_text(encoding="utf-8").split("---")[1]
        license = (yaml.safe_load(front_matter) or {}).get("license")
    except (OSError, UnicodeDecodeError, IndexError, AttributeError, yaml.YAMLError):
        return UNKNOWN
    return normalize_license(license if isinstance(license, str) else None)


# ---- files next to the page ---------------------------------------------------------------------------------------


def add_data_tables(
    sections: Sequence[Mapping[str, Any]], licenses: Sequence[Mapping[str, Any]], assets: AssetWriter
) -> None:
    """Add tables of licenses, of rows by step and source, and of dropped rows by reason."""
    if licenses:
        assets.add_table("licenses", licenses)
    steps: list[dict[str, Any]] = []
    reasons: list[dict[str, Any]] = []
    for section in sections:
        for step in section["steps"]:
            # A ledger without counts by source has its counts under an empty name.
            whole_step = {**step, "dropped": {reason["reason"]: reason["rows"] for reason in step["reasons"]}}
            for source, counts in (step["by_source"] or {"": whole_step}).items():
                place = {"stage": section["stage"], "step": step["step"], "source": source}
                rows = {name: counts.get(name, 0) for name in ("rows_in", "added", "changed", "rows_out")}
                steps.append({**place, **rows, "dropped": sum(counts["dropped"].values())})
                reasons += [{**place, "reason": reason, "rows": n} for reason, n in counts["dropped"].items()]
    if steps:
        assets.add_table("ledger", steps)
        assets.add_table("dropped", reasons)
