"""Files that carry a digest of their content, so damaged or edited ones are not used.

``seal`` and ``open_sealed`` are for one JSON object, ``write_entry`` and ``read_entry`` for a file of a cache, which
also names its key. A digest finds damage and accidental edits; it does not stop somebody who computes a new one.
Torch-free. Leaves out the making of keys.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from align.store.atomic_write import atomic_draft

SEAL = "seal"
"""Field of a sealed object with the digest of all other fields."""

Warn = Callable[[str], object]


class BrokenSealError(ValueError):
    """Content that differs from what was sealed; the text has the reason."""


def seal(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``payload`` as JSON reads it back, with its digest under ``seal``.

    Raises ``TypeError`` for values that JSON cannot hold and ``ValueError`` for a payload that has a ``seal`` already.
    """
    if SEAL in payload:
        raise ValueError(f"the payload has a field '{SEAL}' already")
    plain: dict[str, Any] = json.loads(json.dumps(payload))
    return {**plain, SEAL: _digest(plain)}


def open_sealed(sealed: object) -> dict[str, Any]:
    """Return the payload of ``seal``'s result, in any order of its fields. Raises ``BrokenSealError``."""
    if not isinstance(sealed, dict):
        raise BrokenSealError(f"expected an object, found {type(sealed).__name__}")
    if SEAL not in sealed:
        raise BrokenSealError("it has no seal: it was changed, or written by an earlier version of align")
    payload = {name: value for name, value in sealed.items() if name != SEAL}
    if sealed[SEAL] != _digest(payload):
        raise BrokenSealError("its content differs from its seal")
    return payload


def _digest(payload: Mapping[str, Any]) -> str:
    """Return the sha256 of the canonical JSON. Unlike ``fingerprint.digest`` it takes NaN, as measurements may be."""
    text = json.dumps(payload, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


# ---- cache entries ----


def write_entry(path: Path, key: str, values: Iterable[Any]) -> None:
    """Write a file of JSON lines, the last of which is the seal: the key, and a digest of key and lines.

    The file appears under its name only once it is complete, so several processes may write the same one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    hasher = _hasher(key)
    with atomic_draft(path) as draft, draft.open("wb") as file:
        for value in values:
            line = json.dumps(value).encode("ascii") + b"\n"
            hasher.update(line)
            file.write(line)
        file.write(json.dumps({"key": key, "sha256": hasher.hexdigest()}).encode("ascii") + b"\n")


def read_entry(path: Path, key: str, warn: Warn) -> list[Any] | None:
    """Return the values that ``write_entry`` wrote under ``key``; None if there is no such file.

    Returns None with a warning for a file that is damaged or has another key.
    """
    try:
        return _read(path, key)
    except FileNotFoundError:
        return None
    except OSError as error:
        warn(f"{path} cannot be read ({error.strerror or error}); its result is computed again")
    except (ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, BrokenSealError) else "it is no JSON"
        warn(f"{path} is not what was written there ({reason}); its result is computed again")
    return None


def read_or_compute(path: Path, key: str, compute: Callable[[], Any], warn: Warn) -> Any:
    """Return ``compute()``'s JSON-able result, or the one that was written under the same key.

    The result is as JSON reads it back, so a second run gets the same as the first.
    """
    # A file of several lines was not written by this function.
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
            # One line behind: a line is a value only once another one follows it, else it is the seal.
            if last is not None:
                hasher.update(last)
                values.append(json.loads(last))
            last = line
    if last is None:
        raise BrokenSealError("it is empty")
    # The seal is the last line, so a file that was cut off anywhere has none.
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
