"""Results on disk that are believed only while they are what was written: each carries a digest of its content.

``seal`` and ``open_sealed`` are for one JSON object, ``write_entry`` and ``read_entry`` for a file of a cache, which
also names the key that it was made under. A digest finds damage and slips of hands; it does not stop somebody who
computes a new one. Torch-free. Left out: what a key is made of.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

SEAL = "seal"
"""Field of a sealed object that holds the digest of all the others."""

Warn = Callable[[str], object]


class BrokenSealError(ValueError):
    """Content that is not what was sealed; its text says why."""


def seal(payload: Mapping[str, Any]) -> dict[str, Any]:
    """``payload`` as JSON reads it back, with the digest of that under ``seal``.

    Raises ``TypeError`` for what JSON cannot hold and ``ValueError`` for a payload that has a ``seal`` already.
    """
    if SEAL in payload:
        raise ValueError(f"the payload has a field '{SEAL}' already")
    plain: dict[str, Any] = json.loads(json.dumps(payload))
    return {**plain, SEAL: _digest(plain)}


def open_sealed(sealed: object) -> dict[str, Any]:
    """The payload of ``seal``'s result, whatever the order of its fields. Raises ``BrokenSealError``."""
    if not isinstance(sealed, dict):
        raise BrokenSealError(f"expected an object, found {type(sealed).__name__}")
    if SEAL not in sealed:
        raise BrokenSealError("it has no seal: it was changed, or written by an earlier version of align")
    payload = {name: value for name, value in sealed.items() if name != SEAL}
    if sealed[SEAL] != _digest(payload):
        raise BrokenSealError("its content differs from its seal")
    return payload


def _digest(payload: Mapping[str, Any]) -> str:
    """sha256 of the canonical JSON. Unlike ``fingerprint.digest`` it takes NaN, which measurements may be."""
    text = json.dumps(payload, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


# -----------------------------------------------------------------------------------------------------------------


def write_entry(path: Path, key: str, values: Iterable[Any]) -> None:
    """Write a file of JSON lines, the last of which is the seal: the key, and a digest of key and lines.

    The file appears under its name only once it is whole. Processes on several machines may write one at a time.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}.draft")
    hasher = _hasher(key)
    try:
        with draft.open("wb") as file:
            for value in values:
                line = json.dumps(value).encode("ascii") + b"\n"
                hasher.update(line)
                file.write(line)
            file.write(json.dumps({"key": key, "sha256": hasher.hexdigest()}).encode("ascii") + b"\n")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def read_entry(path: Path, key: str, warn: Warn) -> list[Any] | None:
    """The values that ``write_entry`` wrote under ``key``; None where there is no such file.

    A file that is damaged, or was written under another key, is None as well, with a warning.
    """
    try:
        return _read(path, key)
    except FileNotFoundError:
        return None
    except OSError as error:
        warn(f"{path} cannot be read ({error.strerror or error}); its result is computed again")
    except (ValueError, RecursionError) as error:
        why = str(error) if isinstance(error, BrokenSealError) else "it is no JSON"
        warn(f"{path} is not what was written there ({why}); its result is computed again")
    return None


def read_or_compute(path: Path, key: str, compute: Callable[[], Any], warn: Warn) -> Any:
    """``compute()``'s JSON-able result, or the one that was written under the same key.

    The result is as JSON reads it back, so that a second run gets what the first one got.
    """
    values = read_entry(path, key, warn)
    if values is not None and len(values) == 1:
        return values[0]
    value = json.loads(json.dumps(compute()))
    write_entry(path, key, [value])
    return value


def _read(path: Path, key: str) -> list[Any]:
    hasher = _hasher(key)
    values: list[Any] = []
    last: bytes | None = None
    with path.open("rb") as file:
        for line in file:
            if last is not None:
                hasher.update(last)
                values.append(json.loads(last))
            last = line
    if last is None:
        raise BrokenSealError("it is empty")
    footer = json.loads(last)
    if not isinstance(footer, dict) or footer.keys() != {"key", "sha256"}:
        raise BrokenSealError("its last line is no seal")
    if footer["key"] != key:
        raise BrokenSealError("it was written under another key")
    if footer["sha256"] != hasher.hexdigest():
        raise BrokenSealError("its content differs from its seal")
    return values


def _hasher(key: str) -> hashlib._Hash:
    return hashlib.sha256(key.encode() + b"\n")
