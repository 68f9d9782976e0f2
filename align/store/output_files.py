"""An artifact's files: their digests in the record, and the check against it. Knows no torch."""

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
    """A file of an artifact that differs from its record. ``description`` is a clause that follows its name."""

    path: Path
    description: str


def output_digests(folder: Path) -> dict[str, dict[str, Any]]:
    """Return name → size, modification time and sha256 of every file of a result."""
    outputs = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in UNRECORDED:
            stat = path.stat()
            outputs[name] = {"sha256": file_digest(path), "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    return outputs


def find_problems(artifact: Artifact, thorough: bool) -> list[Problem]:
    """Return the files that differ from the record.

    Sizes and modification times are compared; a file whose time changed is hashed, and with ``thorough`` all are.
    """
    problems = []
    for name, recorded in artifact.record["outputs"].items():
        path = artifact.path / name
        try:
            stat = path.stat()
        except OSError:
            problems.append(Problem(path, "is missing"))
            continue
        if stat.st_size != recorded["bytes"]:
            problems.append(Problem(path, f"has {stat.st_size} bytes, its record says {recorded['bytes']}"))
        # Hashing a checkpoint takes minutes; a file with the recorded size and time is taken as unchanged.
        elif (thorough or stat.st_mtime_ns != recorded["mtime_ns"]) and file_digest(path) != recorded["sha256"]:
            problems.append(Problem(path, "has another sha256 than its record"))
    return problems
