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


def find_extra_files(artifact: Artifact) -> list[Problem]:
    """Return the files, links included, that are in the artifact's folder and not in its record."""
    outputs = artifact.record["outputs"]
    extra = []
    for path in sorted(artifact.path.rglob("*")):
        name = path.relative_to(artifact.path).as_posix()
        is_folder = path.is_dir() and not path.is_symlink()
        if not is_folder and name not in outputs and name not in UNRECORDED:
            extra.append(Problem(path, "is not in its record"))
    return extra


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
