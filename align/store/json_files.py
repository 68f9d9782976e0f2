"""JSON files of a store: whole documents, and lines of events. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from align.store.atomic_write import write_atomically
from align.store.sealed import BrokenSealError, open_sealed, seal

Model = TypeVar("Model", bound=BaseModel)


class DamagedFile(ValueError):
    """A file does not hold what was written to it. The text is a clause that follows the file's name."""


def parse_json(data: bytes) -> Any:
    """Return the JSON value in ``data``. Raises ``DamagedFile``."""
    if not data.strip():
        raise DamagedFile("is empty")
    try:
        return json.loads(data)
    except RecursionError:
        raise DamagedFile("is nested too deeply") from None
    except ValueError as error:  # text that is not UTF-8, too
        raise DamagedFile(f"is not JSON ({error})") from None


def parse_object(data: bytes) -> dict[str, Any]:
    """Return the JSON object in ``data``. Raises ``DamagedFile``."""
    value = parse_json(data)
    if not isinstance(value, dict):
        raise DamagedFile(f"holds a {type(value).__name__} instead of an object")
    return value


def parse_sealed(data: bytes) -> dict[str, Any]:
    """Return the object that was sealed in ``data``. Raises ``DamagedFile``, also if it was changed since."""
    value = parse_object(data)
    try:
        return open_sealed(value)
    except BrokenSealError as error:
        raise DamagedFile(f"is not what was written there ({error})") from None


def read_file(path: Path) -> bytes:
    """Return a file's bytes. Raises ``DamagedFile`` for a folder and where reading is forbidden, else ``OSError``."""
    try:
        return path.read_bytes()
    except (PermissionError, IsADirectoryError) as error:
        raise DamagedFile(f"cannot be read ({error.strerror})") from None


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the number and the text of each line of a file of JSON lines, from 1 on, without blank ones.

    Not by ``splitlines``: a text may hold U+2028, which separates lines, but ends none of JSON.
    """
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if line.strip():
            yield number, line


def read_sealed(path: Path, schema: type[Model]) -> Model:
    """Return the sealed object in a file as ``schema``. Raises as ``read_file``, and ``DamagedFile``."""
    return validate(schema, parse_sealed(read_file(path)))


def write_sealed(path: Path, value: dict[str, Any], default: Callable[[Any], Any] = str) -> None:
    """Write a sealed JSON object atomically."""
    write_atomically(path, seal(as_json(value, default)))


def as_json(value: dict[str, Any], default: Callable[[Any], Any] = str) -> dict[str, Any]:
    """Return ``value`` as JSON reads it back. ``default`` converts values that JSON has no form for."""
    plain: dict[str, Any] = json.loads(json.dumps(value, default=default))
    return plain


def validate(schema: type[Model], value: Any) -> Model:
    """Return ``value`` as ``schema``. Raises ``DamagedFile``, which names the first wrong field."""
    try:
        return schema.model_validate(value)
    except ValidationError as error:
        # The value itself is omitted: a damaged file may hold anything.
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        field = f"field '{place}': " if place else ""
        raise DamagedFile(f"has an unexpected content ({field}{first['msg']})") from None


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
    """Return the event in a line; None if there is none."""
    try:
        event = parse_object(line)
        validate(SCHEMAS.get(str(event.get("event")), _Event), event)
    except DamagedFile:
        return None
    return {"time": 0.0, **event}


def read_events(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the events of a file in order; none if there is no such file."""
    try:
        with path.open("rb") as file:
            for line in file:
                event = parse_event(line)
                if event is not None:
                    yield event
    except OSError:
        return
