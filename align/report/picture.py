"""The pipeline as a picture: stages as boxes in columns, arrows along the data, what each cost. Torch-free."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from align.report.costs import money
from align.report.wording import count, duration, number, size
from align.store.artifacts import Artifact

WIDTH, HEIGHT, LINE, GAP_X, GAP_Y, MARGIN = 150, 84, 18, 36, 22, 4
MOST_LETTERS = 14
LEGEND = {
    "done": ("✓", "finished"),
    "cached": ("↺", "found finished"),
    "running": ("▶", "being made"),
    "failed": ("✗", "failed"),
    "pending": ("…", "not run"),
}
"""Mark and words of each status."""


def lay_out(
    artifacts: Sequence[Artifact],
    failed: Mapping[str, Any] | None,
    cached: Collection[str] = (),
    pending: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, Any]:
    """Boxes and arrows with coordinates in pixels, for the template.

    A stage stands one column right of the last stage it reads. A failed or running stage and those that wait for it
    come in ``failed`` (``stage``, and optionally ``status``, ``inputs`` and ``pending``, lists of names); further ones
    that were not run in ``pending``, with what they read. None of these has a cost.
    """
    keys = {artifact.record.get("key"): artifact.stage for artifact in artifacts}
    inputs: dict[str, list[str]] = {}
    for artifact in artifacts:
        links = artifact.record.get("input_stages", [])
        inputs[artifact.stage] = [keys[link["key"]] for link in links if link.get("key") in keys]
    boxes = {artifact.stage: _box(artifact, artifact.stage in cached) for artifact in artifacts}
    if failed:
        name, running = str(failed["stage"]), failed.get("status") == "running"
        inputs[name] = [one for one in failed.get("inputs", []) if one in boxes]
        boxes[name] = _unmade(name, "running" if running else "failed", str(failed.get("status") or "failed"))
        for waiting in map(str, failed.get("pending", [])):
            inputs[waiting] = [name]
            boxes[waiting] = _unmade(waiting, "pending", "not run")
    for waiting, sources in (pending or {}).items():
        boxes.setdefault(waiting, _unmade(waiting, "pending", "not run"))
        inputs[waiting] = [one for one in sources if one in boxes]
    return _placed(boxes, inputs)


def _placed(boxes: dict[str, dict[str, Any]], inputs: dict[str, list[str]]) -> dict[str, Any]:
    columns = _columns(inputs)
    height = HEIGHT + LINE * (max((len(box["lines"]) for box in boxes.values()), default=2) > 2)
    filled: dict[int, int] = {}
    for name, box in boxes.items():
        column = columns[name]
        row = filled.get(column, 0)
        filled[column] = row + 1
        box["x"] = MARGIN + column * (WIDTH + GAP_X)
        box["y"] = MARGIN + row * (height + GAP_Y)
        box["short"] = name if len(name) <= MOST_LETTERS else f"{name[: MOST_LETTERS - 1]}…"
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
    present = {box["status"] for box in boxes.values()}
    return {
        "boxes": list(boxes.values()),
        "arrows": arrows,
        "legend": [f"{mark} {words}" for status, (mark, words) in LEGEND.items() if status in present],
        "box_width": WIDTH,
        "box_height": height,
        "width": 2 * MARGIN + (max(columns.values(), default=0) + 1) * (WIDTH + GAP_X) - GAP_X,
        "height": 2 * MARGIN + max(filled.values(), default=1) * (height + GAP_Y) - GAP_Y,
    }


def _box(artifact: Artifact, cached: bool) -> dict[str, Any]:
    record = artifact.record
    tokens, cost = record.get("tokens"), money(record)
    lines = [f"{duration(record.get('seconds'))} · {size(record.get('peak_memory_bytes'))}"]
    lines.append(f"{count(tokens)} tokens" if tokens else str(record.get("makes", artifact.kind)))
    lines += [] if cost is None else [f"endpoints: {number(cost)}"]
    status = "cached" if cached else "done"
    return {"name": artifact.stage, "status": status, "mark": LEGEND[status][0], "lines": lines}


def _unmade(name: str, status: str, words: str) -> dict[str, Any]:
    return {"name": name, "status": status, "mark": LEGEND[status][0], "lines": [words]}


def _columns(inputs: dict[str, list[str]]) -> dict[str, int]:
    """Length of the longest way to each stage; stages come in an order in which inputs are earlier."""
    columns: dict[str, int] = {}
    for name, sources in inputs.items():
        columns[name] = 1 + max((columns.get(source, 0) for source in sources), default=-1)
    return columns
