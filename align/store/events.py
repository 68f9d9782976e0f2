"""Event files of stages: a JSON object a line, read while it grows. Knows no torch.

An event file shows the course of a stage and is no part of its result, so a damaged line is skipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from align.store.json_files import DamagedFile, parse_object, validate


class _Event(BaseModel):
    """Fields of every event."""

    model_config = ConfigDict(strict=True)

    event: str
    time: float = 0.0


class _Progress(_Event):
    done: float
    total: float
    unit: str = ""
    tokens: float | None = None


class _Metrics(_Event):
    step: float


class _Phase(_Event):
    text: str


SCHEMAS: dict[str, type[_Event]] = {"progress": _Progress, "metrics": _Metrics, "phase": _Phase}


def parse_event(line: bytes) -> dict[str, Any] | None:
    """Return the event in a line; None where there is none."""
    try:
        event = parse_object(line)
        validate(SCHEMAS.get(str(event.get("event")), _Event), event)
    except DamagedFile:
        return None
    return {"time": 0.0, **event}


def read_events(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the events of a file in order; none where there is no such file."""
    try:
        with path.open("rb") as file:
            for line in file:
                event = parse_event(line)
                if event is not None:
                    yield event
    except OSError:
        return
