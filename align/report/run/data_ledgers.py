"""Data ledgers: rows in and out of every step and source of each data stage, and the licenses of data and models.

Everything comes from ``ledger.json`` and the records. Texts of rows, which may be private, stay out of the page; a
recipe's own ``preview.html`` has them. Torch-free.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from align.data.builds.build_files import LEDGER
from align.data.card import UNKNOWN, mixture_license, normalize_license
from align.models.built_in import LICENSE, NAME
from align.models.checkpoints.source import TINY
from align.report.page.assets import AssetWriter
from align.store.artifacts import DATASETS, Artifact

DATASET_KINDS = frozenset(DATASETS)
MAX_REASONS = 40
MADE_HERE = "random weights, made here"
"""License of the built-in model with random weights, in which no third party holds rights."""
LICENSE_COLUMNS = {"stage": "Stage", "what": "What", "name": "Name", "license": "License", "identity": "Identity"}
STEP_COLUMNS = {"stage": "Stage", "step": "Step", "source": "Source"}
ROW_COLUMNS = {
    "rows_in": "Rows in",
    "added": "Added",
    "changed": "Changed",
    "dropped": "Dropped",
    "rows_out": "Rows out",
}


def read_ledger(artifact: Artifact) -> dict[str, Any] | None:
    """Return a stage's ledger; None if it does not exist or cannot be read."""
    try:
        ledger = json.loads((artifact.path / LEDGER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return ledger if isinstance(ledger, dict) else None


def data_sections(artifacts: Sequence[Artifact], assets: AssetWriter) -> list[dict[str, Any]]:
    """Return for each stage that makes rows its ``steps`` (rows in and out, with reasons), ``sources`` and ``splits``.

    The same numbers are added to the files next to the page.
    """
    sections = [_section(artifact) for artifact in artifacts if artifact.kind in DATASET_KINDS]
    _add_ledger_tables(sections, assets)
    return sections


def _section(artifact: Artifact) -> dict[str, Any]:
    ledger = read_ledger(artifact) or {}
    # A recipe's ledger lists steps and sources; a synthesis ledger counts prompts, answers and the like by level.
    if isinstance(ledger.get("steps"), list):
        steps = [_step(line, ledger.get("rows_in") or 0) for line in ledger["steps"]]
        sources = [_source(line) for line in ledger.get("sources") or []]
    else:
        steps = list(_synthesis_steps(ledger))
        sources = []
    return {
        "stage": artifact.stage,
        "kind": str(artifact.record.get("kind", "")),
        "makes": str(artifact.kind),
        "steps": steps,
        "sources": sources,
        "splits": _splits(artifact, ledger),
        "choices": ledger.get("format_choices") or {},
        "counts": [] if ledger else list(_metric_counts(artifact)),
        "preview": (artifact.path / "preview.html").is_file(),
    }


def _step(line: Mapping[str, Any], records: int) -> dict[str, Any]:
    """Return a line of the table of steps; ``width`` of its bar is the percentage of all ``records`` that are left."""
    # A step may add rows, so there may be more than were read. 1 avoids a division by zero.
    total = max(1, records, line["rows_in"] + line.get("added", 0))
    by_source = line.get("by_source") or {}
    reasons = [
        {"reason": reason, "rows": rows, "by_source": _dropped_by_source(by_source, reason)}
        for reason, rows in sorted(line["dropped"].items(), key=lambda item: (-item[1], item[0]))
    ]
    return {
        "step": str(line["step"]),
        **{name: line.get(name, 0) for name in ("rows_in", "rows_out", "added", "changed")},
        "lost": sum(line["dropped"].values()),
        "width": 100 * line["rows_out"] / total,
        "reasons": reasons[:MAX_REASONS],
        "more_reasons": max(0, len(reasons) - MAX_REASONS),
        "by_source": by_source,
    }


def _dropped_by_source(by_source: Mapping[str, Any], reason: str) -> dict[str, int]:
    """Return source → rows dropped for ``reason``, for the sources that lost some."""
    return {source: counts["dropped"][reason] for source, counts in by_source.items() if counts["dropped"].get(reason)}


def _synthesis_steps(ledger: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a step for each level (prompts, answers, ...) that a synthesis ledger counts."""
    for name, level in ledger.items():
        if isinstance(level, dict) and {"in", "out", "dropped"} <= level.keys():
            line = {"step": name, "rows_in": level["in"], "rows_out": level["out"], "dropped": level["dropped"]}
            yield _step(line, level["in"])


def _source(line: Mapping[str, Any]) -> dict[str, Any]:
    license = normalize_license(line.get("license"))
    return {
        "source": line["source"],
        "type": line.get("type", ""),
        "license": license,
        "unknown": license == UNKNOWN,
        **{name: line.get(name, 0) for name in ("rows_in", "rows_out", "added")},
        "lost": sum(line["dropped"].values()),
    }


def _splits(artifact: Artifact, ledger: Mapping[str, Any]) -> dict[str, int]:
    """Return rows by split, from the ledger or else from the record's metrics."""
    splits = ledger.get("splits") or ledger.get("rows")
    if isinstance(splits, dict):
        return {str(name): int(rows) for name, rows in splits.items()}
    metrics = artifact.record.get("metrics") or {}
    return {name: int(metrics[f"{name}_rows"]) for name in ("train", "test") if f"{name}_rows" in metrics}


def _metric_counts(artifact: Artifact) -> Iterator[tuple[str, Any]]:
    """Yield the numbers in the record of a stage without a ledger."""
    for name, value in (artifact.record.get("metrics") or {}).items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            yield name, value


# ---- licenses -----------------------------------------------------------------------------------------------------


def license_rows(artifacts: Sequence[Artifact], assets: AssetWriter) -> list[dict[str, Any]]:
    """Return licenses of the data and models that entered from outside: ``stage``, ``what``, ``license``, ``identity``.

    ``what`` is ``model`` or ``data``. The rows are added to the files next to the page.
    """
    rows = []
    for artifact in artifacts:
        if artifact.record.get("kind") == "model":
            rows.append(_model_row(artifact))
        ledger = read_ledger(artifact) if artifact.kind in DATASET_KINDS else None
        for line in (ledger or {}).get("sources") or []:
            license = normalize_license(line.get("license"))
            identity = "; ".join(f"{name}: {value}" for name, value in (line.get("identity") or {}).items())
            rows.append(_license_row(artifact.stage, "data", line["source"], license, identity))
    if rows:
        assets.add_table("licenses", "Licenses", LICENSE_COLUMNS, rows)
    return rows


def data_license(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return the license under which all the data together may be passed on; None without data from outside."""
    names = [row["license"] for row in rows if row["what"] == "data"]
    if not names:
        return None
    # Models are skipped, because their licenses bind the weights, not the rows.
    mixture = mixture_license(names)
    return {"names": mixture.names, "reason": mixture.reason, "concerns": mixture.concerns}


def _model_row(artifact: Artifact) -> dict[str, Any]:
    config = artifact.record.get("config") or {}
    source = str(config.get("source", ""))
    identity = str((artifact.record.get("identities") or {}).get("source", ""))
    return _license_row(artifact.stage, "model", source, model_license(artifact.model, source), identity)


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


def _license_row(stage: str, source_type: str, name: str, license: str, identity: str) -> dict[str, Any]:
    return {
        "stage": stage,
        "what": source_type,
        "name": name,
        "license": license,
        "identity": identity,
        "unknown": license == UNKNOWN,
    }


# ---- files next to the page ---------------------------------------------------------------------------------------


def _add_ledger_tables(sections: Sequence[Mapping[str, Any]], assets: AssetWriter) -> None:
    """Add a table of rows by step and source, and a table of dropped rows by reason."""
    steps: list[dict[str, Any]] = []
    reasons: list[dict[str, Any]] = []
    for section in sections:
        for step in section["steps"]:
            for source, counts in _counts_by_source(step).items():
                place = {"stage": section["stage"], "step": step["step"], "source": source}
                rows = {name: counts.get(name, 0) for name in ("rows_in", "added", "changed", "rows_out")}
                steps.append({**place, **rows, "dropped": sum(counts["dropped"].values())})
                reasons += [{**place, "reason": reason, "rows": n} for reason, n in counts["dropped"].items()]
    if steps:
        assets.add_table("ledger", "Data ledger", {**STEP_COLUMNS, **ROW_COLUMNS}, steps)
        reason_columns = {**STEP_COLUMNS, "reason": "Reason", "rows": "Rows"}
        assets.add_table("dropped", "Dropped rows by reason", reason_columns, reasons)


def _counts_by_source(step: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a step's counts by source; under an empty name if the ledger has no counts by source."""
    if step["by_source"]:
        return dict(step["by_source"])
    return {"": {**step, "dropped": {reason["reason"]: reason["rows"] for reason in step["reasons"]}}}
