"""Files that a later run or another process reads: written atomically, sealed with a digest, read through schemas.

A file is complete or absent, also after a power cut: it is written to a draft next to it, which is synced and renamed.
A seal is a digest of the content. It finds damage and accidental edits; it does not stop somebody who computes a new
one. ``write_sealed`` and ``read_sealed`` are for one JSON object, ``write_entry`` and ``read_entry`` for a file of a
cache, which also names its key. Torch-free.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from align.errors import with_article

Model = TypeVar("Model", bound=BaseModel)
Warn = Callable[[str], object]

SEAL = "seal"
"""Field of a sealed object with the digest of all other fields."""


class DamagedFile(ValueError):
    """A file does not hold what was written to it. The text is a clause that follows the file's name."""


# ---- atomic writes ----


@contextlib.contextmanager
def atomic_draft(path: Path) -> Iterator[Path]:
    """Yield a draft's path; after the context the draft is synced to disk and replaces ``path``.

    After an error the draft is deleted and the old content is still there. Each call has its own draft, so several
    processes may write the same file.
    """
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        yield draft
        # Content first, then the name: the name must never stand for a file without its content. The folder is not
        # synced, so after a power cut the old file may be back, which is also complete.
        _sync(draft, os.O_RDWR)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def write_bytes_atomically(path: Path, data: bytes) -> None:
    """Write bytes: after an error the old content is still there."""
    with atomic_draft(path) as draft:
        draft.write_bytes(data)


def write_text_atomically(path: Path, text: str) -> None:
    """Write UTF-8 text as ``write_bytes_atomically`` does, without changing its line ends."""
    write_bytes_atomically(path, text.encode("utf-8"))


def write_atomically(path: Path, value: Any) -> None:
    """Write JSON as ``write_text_atomically`` does; values that JSON has no form for become texts."""
    write_text_atomically(path, json.dumps(value, indent=1, default=str))


def sync_folder(folder: Path) -> None:
    """Sync a folder's names to disk."""
    _sync(folder, os.O_RDONLY)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---- JSON documents ----


def parse_json(data: bytes) -> Any:
    """Return the JSON value in ``data``. Raises ``DamagedFile``."""
    if not data.strip():
        raise DamagedFile("is empty")
    try:
        return json.loads(data)
    except RecursionError:
        raise DamagedFile("is nested too deeply") from None
    except ValueError as error:  # also for text that is not UTF-8
        raise DamagedFile(f"is not JSON ({error})") from None


def parse_object(data: bytes) -> dict[str, Any]:
    """Return the JSON object in ``data``. Raises ``DamagedFile``."""
    value = parse_json(data)
    if not isinstance(value, dict):
        raise DamagedFile(f"holds {with_article(type(value).__name__)} instead of an object")
    return value


def read_file(path: Path) -> bytes:
    """Return a file's bytes. Raises ``DamagedFile`` for a folder and if reading is forbidden, else ``OSError``."""
    try:
        return path.read_bytes()
    except (PermissionError, IsADirectoryError) as error:
        raise DamagedFile(f"cannot be read ({error.strerror})") from None


def read_tail(path: Path, size: int) -> bytes:
    """Return at most the last ``size`` bytes of a file. Raises ``OSError``."""
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - size))
        return file.read(size)


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the number, from 1 on, and the text of each line of a file of JSON lines, without blank lines."""
    # Not by ``splitlines``: a text may hold U+2028, which separates lines, but ends no line of JSON.
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if line.strip():
            yield number, line


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


# ---- sealed objects ----


def seal(payload: Mapping[str, Any], default: Callable[[Any], Any] | None = None) -> dict[str, Any]:
    """Return ``payload`` as JSON reads it back, with its digest under ``seal``.

    ``default`` converts values that JSON has no form for; without it they raise ``TypeError``. Raises ``ValueError``
    for a payload that has a ``seal`` already.
    """
    if SEAL in payload:
        raise ValueError(f"the payload has a field '{SEAL}' already")
    fields: dict[str, Any] = json.loads(json.dumps(payload, default=default))
    return {**fields, SEAL: _digest(fields)}


def parse_sealed(data: bytes) -> dict[str, Any]:
    """Return the payload that was sealed in ``data``. Raises ``DamagedFile``, also if it was changed since."""
    fields = parse_object(data)
    if SEAL not in fields:
        raise _unlike("it has no seal: it was changed, or written by an earlier version of align")
    if fields.pop(SEAL) != _digest(fields):
        raise _unlike("its content differs from its seal")
    return fields


def read_sealed(path: Path, schema: type[Model]) -> Model:
    """Return the sealed object in a file as ``schema``. Raises as ``read_file``, and ``DamagedFile``."""
    return validate(schema, parse_sealed(read_file(path)))


def write_sealed(path: Path, value: dict[str, Any], default: Callable[[Any], Any] = str) -> None:
    """Write a sealed JSON object atomically."""
    write_atomically(path, seal(value, default))


def _digest(fields: Mapping[str, Any]) -> str:
    """Return the sha256 of the canonical JSON. Unlike ``fingerprint.digest`` it accepts NaN, for measurements."""
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def _unlike(reason: str) -> DamagedFile:
    return DamagedFile(f"is not what was written there ({reason})")


# ---- cache entries ----


def write_entry(path: Path, key: str, values: Iterable[Any]) -> None:
    """Write a file of JSON lines, the last of which is the seal: the key, and a digest of key and lines.

    The file appears under its name only once it is complete, so several processes may write the same one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(value).encode("ascii") + b"\n" for value in values]
    footer = {"key": key, "sha256": _digest_lines(key, lines)}
    write_bytes_atomically(path, b"".join([*lines, json.dumps(footer).encode("ascii"), b"\n"]))


def read_entry(path: Path, key: str, warn: Warn) -> list[Any] | None:
    """Return the values that ``write_entry`` wrote under ``key``; None if there is no such file.

    Returns None with a warning for a file that is damaged or has another key.
    """
    try:
        return _parse_entry(path.read_bytes(), key)
    except FileNotFoundError:
        return None
    except OSError as error:
        warn(f"{path} cannot be read ({error.strerror or error}); its result is computed again")
    except DamagedFile as error:
        warn(f"{path} {error}; its result is computed again")
    return None


def read_or_compute(path: Path, key: str, compute: Callable[[], Any], warn: Warn) -> Any:
    """Return ``compute()``'s JSON-able result, or the result that was written under the same key.

    The result is as JSON reads it back, so a second run gets the same as the first.
    """
    # A file of several lines was not written by this function.
    values = read_entry(path, key, warn)
    if values is not None and len(values) == 1:
        return values[0]
    value = json.loads(json.dumps(compute()))
    write_entry(path, key, [value])
    return value


def _parse_entry(data: bytes, key: str) -> list[Any]:
    # The seal is the last line, so a file that was cut off anywhere has none.
    *lines, last = data.splitlines(keepends=True) or [b""]
    footer = parse_json(last)
    if not isinstance(footer, dict) or footer.keys() != {"key", "sha256"}:
        raise _unlike("its last line is not a seal")
    if footer["key"] != key:
        raise _unlike("it was written under another key")
    if footer["sha256"] != _digest_lines(key, lines):
        raise _unlike("its content differs from its seal")
    return [json.loads(line) for line in lines]


def _digest_lines(key: str, lines: Iterable[bytes]) -> str:
    hasher = hashlib.sha256(key.encode() + b"\n")
    for line in lines:
        hasher.update(line)
    return hasher.hexdigest()


# ---- lines of events ----


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
                # The last line may be torn by a kill, or not yet written to its end.
                event = parse_event(line)
                if event is not None:
                    yield event
    except OSError:
        return
