"""Records of artifacts for tests that lay them out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from align.store.record import output_digests, read_record, write_record


def record_of(kind: str = "number", digit: str = "a", makes: str = "PromptData", **fields: Any) -> dict[str, Any]:
    """A record whose key is one hexadecimal digit over and over."""
    return {
        "key": digit * 64, "kind": kind, "stage": kind, "makes": makes, "created": "2026-01-01", "outputs": {},
        "metrics": {}, "parts": {}, "config": {}, "input_stages": [], "seconds": 1.0, **fields,
    }  # fmt: skip


def put_record(folder: Path, **fields: Any) -> dict[str, Any]:
    """Make ``folder`` a finished artifact of the files that lie in it; returns its record."""
    record = {**record_of(), "outputs": output_digests(folder), **fields}
    write_record(folder, record)
    return record


def change_record(folder: Path, **fields: Any) -> None:
    """Write an artifact's record anew, with other fields and a seal that fits."""
    write_record(folder, {**read_record(folder), **fields})
