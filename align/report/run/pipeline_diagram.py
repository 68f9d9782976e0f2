"""Diagram of the pipeline: stages as boxes in columns, arrows along the data, the cost of each. Torch-free."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from align.report.page.number_format import count, duration, number, size
from align.report.run.stage_costs import endpoint_cost
from align.store.artifacts import Artifact

WIDTH, HEIGHT, LINE, GAP_X, GAP_Y, MARGIN = 150, 84, 18, 36, 22, 4
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
    boxes = {artifact.stage: _finished_box(artifact, artifact.stage in cached) for artifact in artifacts}
    if failed:
        name = str(failed["stage"])
        status = "running" if failed.get("status") == "running" else "failed"
        inputs[name] = [source for source in failed.get("inputs", []) if source in boxes]
        boxes[name] = _unfinished_box(name, status, str(failed.get("status") or "failed"))
        for waiting in map(str, failed.get("pending", [])):
            inputs[waiting] = [name]
            boxes[waiting] = _unfinished_box(waiting, "pending", "not run")
    for waiting, sources in (pending or {}).items():
        # A stage may be pending both behind the failed one and by itself: keep the first box, and the full inputs.
        status = (states or {}).get(waiting, "pending")
        boxes.setdefault(waiting, _unfinished_box(waiting, status, LEGEND[status][1]))
        inputs[waiting] = [source for source in sources if source in boxes]
    return _place_boxes(boxes, inputs)


def _place_boxes(boxes: dict[str, dict[str, Any]], inputs: dict[str, list[str]]) -> dict[str, Any]:
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
        box["short"] = name if len(name) <= MAX_NAME_LENGTH else f"{name[: MAX_NAME_LENGTH - 1]}…"
    arrows = [
        {
            "x1": boxes[source]["x"] + WIDTH,
            "y1": boxes[source]["y"] + height / 2,
            "x2": boxes[target]["x"],
            "y2": boxes[target]["y"] + height / 2,
        }
        for target, sources in inputs.items()
        for source in dict.fromkeys(sources)
    ]
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


def _finished_box(artifact: Artifact, cached: bool) -> dict[str, Any]:
    record = artifact.record
    tokens = record.get("tokens")
    cost = endpoint_cost(record)
    lines = [f"{duration(record.get('seconds'))} · {size(record.get('peak_memory_bytes'))}"]
    lines.append(f"{count(tokens)} tokens" if tokens else str(record.get("makes", artifact.kind)))
    if cost is not None:
        lines.append(f"endpoints: {number(cost)}")
    status = "cached" if cached else "done"
    return {"name": artifact.stage, "status": status, "mark": LEGEND[status][0], "lines": lines}


def _unfinished_box(name: str, status: str, words: str) -> dict[str, Any]:
    return {"name": name, "status": status, "mark": LEGEND[status][0], "lines": [words]}


def _columns(inputs: dict[str, list[str]]) -> dict[str, int]:
    """Return each stage's column: the length of the longest path to it. ``inputs`` has sources before their readers."""
    columns: dict[str, int] = {}
    for name, sources in inputs.items():
        # Every source has its column by now; a source outside the diagram counts as column 0.
        columns[name] = 1 + max((columns.get(source, 0) for source in sources), default=-1)
    return columns
