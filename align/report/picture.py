"""The pipeline as a picture: stages as boxes in columns, arrows along the data, what each cost. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from align.artifacts import Artifact
from align.report.wording import count, duration, size

WIDTH, HEIGHT, GAP_X, GAP_Y, MARGIN = 150, 84, 36, 22, 4


def lay_out(artifacts: Sequence[Artifact], failed: dict[str, Any] | None) -> dict[str, Any]:
    """Boxes and arrows with coordinates in pixels, for the template.

    A stage stands one column right of the last stage it reads. A failed stage and those that wait for it come in
    ``failed`` (``stage``, ``inputs`` and ``pending``, both optional lists of names) and have no cost.
    """
    keys = {artifact.record.get("key"): artifact.stage for artifact in artifacts}
    inputs: dict[str, list[str]] = {}
    for artifact in artifacts:
        links = artifact.record.get("input_stages", [])
        inputs[artifact.stage] = [keys[link["key"]] for link in links if link.get("key") in keys]
    boxes = {artifact.stage: _box(artifact) for artifact in artifacts}
    if failed:
        name = str(failed["stage"])
        inputs[name] = [one for one in failed.get("inputs", []) if one in boxes]
        boxes[name] = {"name": name, "kind": str(failed.get("kind", "")), "status": "failed", "lines": ["failed"]}
        for waiting in failed.get("pending", []):
            inputs[waiting] = [name]
            boxes[waiting] = {"name": waiting, "kind": "", "status": "pending", "lines": ["not run"]}
    columns = _columns(inputs)
    filled: dict[int, int] = {}
    for name, box in boxes.items():
        column = columns[name]
        row = filled.get(column, 0)
        filled[column] = row + 1
        box["x"] = MARGIN + column * (WIDTH + GAP_X)
        box["y"] = MARGIN + row * (HEIGHT + GAP_Y)
        box["short"] = name if len(name) <= 14 else f"{name[:13]}…"
    arrows = [
        {
            "x1": boxes[source]["x"] + WIDTH,
            "y1": boxes[source]["y"] + HEIGHT / 2,
            "x2": boxes[target]["x"],
            "y2": boxes[target]["y"] + HEIGHT / 2,
        }
        for target, sources in inputs.items()
        for source in dict.fromkeys(sources)
    ]
    return {
        "boxes": list(boxes.values()),
        "arrows": arrows,
        "box_width": WIDTH,
        "box_height": HEIGHT,
        "width": 2 * MARGIN + (max(columns.values(), default=0) + 1) * (WIDTH + GAP_X) - GAP_X,
        "height": 2 * MARGIN + max(filled.values(), default=1) * (HEIGHT + GAP_Y) - GAP_Y,
    }


def _box(artifact: Artifact) -> dict[str, Any]:
    record = artifact.record
    tokens = record.get("tokens")
    lines = [f"{duration(record.get('seconds'))} · {size(record.get('peak_memory_bytes'))}"]
    lines.append(f"{count(tokens)} tokens" if tokens else str(record.get("makes", artifact.kind)))
    return {"name": artifact.stage, "kind": str(record.get("kind", "")), "status": "done", "lines": lines}


def _columns(inputs: dict[str, list[str]]) -> dict[str, int]:
    """Length of the longest way to each stage; stages come in an order in which inputs are earlier."""
    columns: dict[str, int] = {}
    for name, sources in inputs.items():
        columns[name] = 1 + max((columns.get(source, 0) for source in sources), default=-1)
    return columns
