"""Stages on the page: the diagram of the pipeline, costs and provenance. Torch-free."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from align.report.page.assets import AssetWriter
from align.report.page.metric_series import METRICS, Events
from align.report.page.number_format import MISSING, count, duration, number, shorten, size
from align.report.scorecard.scorecard_tables import as_yaml
from align.store.artifacts import Artifact

SAMPLE_METRICS: dict[str, str] = METRICS["sample_metrics"]
"""Metric of a ``sample`` stage, without its split, and its meaning."""
MAX_METRICS = 80
MAX_LIST_ITEMS = 12
SPLITS = ("train", "test")


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
    return [stage_row(artifact, events[artifact.stage]) for artifact in artifacts]


def stage_row(artifact: Artifact, events: Events) -> dict[str, Any]:
    """Return one row of ``stage_rows``."""
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
        "metrics": [(name, value, _meaning(record, name)) for name, value in _flatten(record.get("metrics", {}))],
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


def _flatten(metrics: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Return nested metrics as at most :data:`MAX_METRICS` rows of (dotted name, number), without lists of records."""
    rows: list[tuple[str, str]] = []
    if not isinstance(metrics, dict):
        return rows
    for name, value in metrics.items():
        path = f"{prefix}{name}"
        if isinstance(value, dict):
            rows += _flatten(value, f"{path}.")
        elif isinstance(value, list):
            # Short lists of numbers or names fit in a row; records of evaluations would not.
            if value and all(not isinstance(item, (dict, list)) for item in value):
                rows.append((path, ", ".join(number(item) for item in value[:MAX_LIST_ITEMS])))
        elif value is not None:
            rows.append((path, number(value)))
    return rows[:MAX_METRICS]


def add_cost_table(artifacts: Sequence[Artifact], assets: AssetWriter) -> None:
    """Add the stages' costs, unrounded, to the files next to the page."""
    rows = []
    for artifact in artifacts:
        record = artifact.record
        rows.append({**record, "stage": artifact.stage, "cost": endpoint_cost(record), "device": device(record)})
    assets.add_table("stages", rows)


WIDTH = 150
HEIGHT = 84
LINE = 18
GAP_X = 36
GAP_Y = 22
MARGIN = 4
"""Pixels: size of a box, height of a further line in it, gaps between boxes, margin of the diagram."""
LINES_PER_BOX = 2
MAX_NAME_LENGTH = 14
LEGEND = {
    "done": ("✓", "finished"),
    "cached": ("↺", "cached"),
    "running": ("▶", "running"),
    "failed": ("✗", "failed"),
    "pending": ("…", "not run"),
}
"""Mark and words of each status."""


def pipeline_diagram(
    artifacts: Sequence[Artifact],
    failed: Mapping[str, Any] | None,
    cached: Collection[str] = (),
    pending: Mapping[str, Sequence[str]] | None = None,
    states: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Return boxes and arrows with coordinates in pixels, for the template.

    A stage is one column right of the last stage that it reads. ``failed`` describes a failed or running stage and the
    stages that wait for it (``stage``, and optionally ``status``, ``inputs`` and ``pending``, lists of names).
    ``pending`` has further stages that are not finished, with the stages that they read, and ``states`` has the stages
    among them that are ``running`` or ``failed``. None of these has a cost.
    """
    # A record names its inputs by key. Inputs from outside of this run have no box, hence no arrow.
    stages = {artifact.record.get("key"): artifact.stage for artifact in artifacts}
    inputs: dict[str, list[str]] = {}
    for artifact in artifacts:
        links = artifact.record.get("input_stages", [])
        inputs[artifact.stage] = [stages[link["key"]] for link in links if link.get("key") in stages]
    boxes = {artifact.stage: finished_box(artifact, artifact.stage in cached) for artifact in artifacts}
    if failed:
        name = str(failed["stage"])
        status = "running" if failed.get("status") == "running" else "failed"
        inputs[name] = [source for source in failed.get("inputs", []) if source in boxes]
        boxes[name] = stage_box(name, status, str(failed.get("status") or "failed"))
        for waiting in map(str, failed.get("pending", [])):
            inputs[waiting] = [name]
            boxes[waiting] = stage_box(waiting, "pending", "not run")
    for waiting, sources in (pending or {}).items():
        # A stage may be pending both behind the failed one and by itself: keep the first box, and the full inputs.
        status = (states or {}).get(waiting, "pending")
        boxes.setdefault(waiting, stage_box(waiting, status, LEGEND[status][1]))
        inputs[waiting] = [source for source in sources if source in boxes]
    return place_boxes(boxes, inputs)


def place_boxes(boxes: dict[str, dict[str, Any]], inputs: dict[str, list[str]]) -> dict[str, Any]:
    """Give each box a column by its inputs and the next free row in it, and draw the arrows between them."""
    columns = _columns(inputs)
    # Columns follow the longest path to a stage, so arrows only ever point to the right.
    most_lines = max((len(box["lines"]) for box in boxes.values()), default=LINES_PER_BOX)
    height = HEIGHT + (LINE if most_lines > LINES_PER_BOX else 0)
    rows_used: dict[int, int] = {}
    for name, box in boxes.items():
        column = columns[name]
        row = rows_used.get(column, 0)
        rows_used[column] = row + 1
        box["x"] = MARGIN + column * (WIDTH + GAP_X)
        box["y"] = MARGIN + row * (height + GAP_Y)
        box["short"] = shorten(name, MAX_NAME_LENGTH)
    arrows = []
    for target, sources in inputs.items():
        for source in dict.fromkeys(sources):
            start = {"x1": boxes[source]["x"] + WIDTH, "y1": boxes[source]["y"] + height / 2}
            arrows.append({**start, "x2": boxes[target]["x"], "y2": boxes[target]["y"] + height / 2})
    statuses = {box["status"] for box in boxes.values()}
    column_count = max(columns.values(), default=0) + 1
    row_count = max(rows_used.values(), default=1)
    return {
        "boxes": list(boxes.values()),
        "arrows": arrows,
        "legend": [f"{mark} {words}" for status, (mark, words) in LEGEND.items() if status in statuses],
        "box_width": WIDTH,
        "box_height": height,
        "width": 2 * MARGIN + column_count * (WIDTH + GAP_X) - GAP_X,
        "height": 2 * MARGIN + row_count * (height + GAP_Y) - GAP_Y,
    }


def finished_box(artifact: Artifact, cached: bool) -> dict[str, Any]:
    """Return the box of a finished stage: time and memory, tokens, and the cost of its endpoints."""
    record = artifact.record
    tokens = record.get("tokens")
    cost = endpoint_cost(record)
    lines = [f"{duration(record.get('seconds'))} · {size(record.get('peak_memory_bytes'))}"]
    lines.append(f"{count(tokens)} tokens" if tokens else str(record.get("makes", artifact.kind)))
    if cost is not None:
        lines.append(f"endpoints: {number(cost)}")
    return stage_box(artifact.stage, "cached" if cached else "done", *lines)


def stage_box(name: str, status: str, *lines: str) -> dict[str, Any]:
    """Return a box without coordinates; ``status`` is a key of ``LEGEND``."""
    return {"name": name, "status": status, "mark": LEGEND[status][0], "lines": lines}


def _columns(inputs: dict[str, list[str]]) -> dict[str, int]:
    """Return each stage's column: the length of the longest path to it. ``inputs`` has sources before their readers."""
    columns: dict[str, int] = {}
    for name, sources in inputs.items():
        # Every source has its column by now; a source outside the diagram counts as column 0.
        columns[name] = 1 + max((columns.get(source, 0) for source in sources), default=-1)
    return columns
