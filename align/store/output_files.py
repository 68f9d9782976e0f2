"""An artifact's files: what its record says of them, and which are not so. Knows no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.store.artifacts import Artifact
from align.store.fingerprint import file_digest
from align.store.record import RECORD

UNRECORDED = {RECORD, "log.txt", "events.jsonl"}
"""Files whose bytes are not part of the result: they carry times."""


@dataclass(frozen=True)
class Problem:
    """One file of an artifact that is not what its record says."""

    path: Path
    what: str


def output_digests(folder: Path) -> dict[str, dict[str, Any]]:
    """Size, time and sha256 of every file of a result."""
    outputs = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in UNRECORDED:
            stat = path.stat()
            outputs[name] = {"sha256": file_digest(path), "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    return outputs


def differing(artifact: Artifact, thorough: bool) -> list[Problem]:
    """Files that differ from the record.

    Sizes and modification times are compared; a file whose time changed is hashed, and all are when
    ``thorough``.
    """
    found = []
    for name, recorded in artifact.record["outputs"].items():
        path = artifact.path / name
        try:
            stat = path.stat()
        except OSError:
            found.append(Problem(path, "is missing"))
            continue
        if stat.st_size != recorded["bytes"]:
            found.append(Problem(path, f"has {stat.st_size} bytes, its record says {recorded['bytes']}"))
        elif (thorough or stat.st_mtime_ns != recorded["mtime_ns"]) and file_digest(path) != recorded["sha256"]:
            found.append(Problem(path, "has another sha256 than its record"))
    return found
