"""Records of artifacts: their fields, the files they list, and the marker of a finished artifact."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

from align.errors import UserError
from align.store.artifacts import Artifact, Kind
from align.store.fingerprint import file_digest
from align.store.json_files import (
    DamagedFile,
    parse_object,
    parse_sealed,
    read_file,
    seal,
    validate,
    write_atomically,
)
from align.store.retry import UNREACHABLE

RECORD = "record.json"
SHORT = 12
"""Digits of a key in the names of folders."""


def _inside(name: str) -> str:
    """Return a file's name. Raises ``ValueError`` if it leads out of its artifact's folder."""
    path = PurePosixPath(name)
    # A record may come from a bucket that others write to; its names become paths here.
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name or not path.parts:
        raise ValueError(f"the name {name!r} leads out of the artifact")
    return name


def _known_kind(makes: str) -> str:
    return Kind(makes).value


Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
NAME = r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,199}"
"""Pattern of a stage's kind, which names a folder of the store."""
Name = Annotated[str, StringConstraints(pattern=rf"^{NAME}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)


class OutputEntry(_Strict):
    """One file of a result."""

    sha256: Digest
    bytes: int = Field(ge=0)
    mtime_ns: int


class StageReference(_Strict):
    """An artifact by its kind and key."""

    kind: Name
    key: Digest


class InputStage(StageReference):
    """An artifact that a stage read."""

    stage: str
    weights: Digest | None = None
    """Digest of the checkpoint's files that was read (``Artifact.weights``)."""


class Record(_Strict):
    """The fields of ``record.json`` that align reads; it may have others."""

    key: Digest
    kind: Name
    stage: str
    makes: Annotated[str, AfterValidator(_known_kind)]
    created: str
    outputs: dict[Annotated[str, AfterValidator(_inside)], OutputEntry]
    metrics: dict[str, Any]
    parts: dict[str, Any]
    config: dict[str, Any]
    input_stages: list[InputStage]
    seconds: float = Field(ge=0)
    pipeline: str | None = None
    version: int | None = None
    attempts: list[float] = []
    peak_memory_bytes: int | None = None
    packages: dict[str, str] = {}


class DamagedArtifact(UserError):
    """The artifact of ``stage`` is not what was written; the message has file, finding and remedy."""

    def __init__(self, message: str, stage: str) -> None:
        super().__init__(message)
        self.stage = stage


class DamagedRecord(DamagedArtifact):
    """The record of one artifact cannot be used. ``finding`` is a clause that follows the file's name."""

    def __init__(self, path: Path | str, finding: str, stage: str = "", remedy: str = "") -> None:
        self.path = path
        self.finding = finding
        folder = Path(path).parent
        if not remedy:
            remedy = f"Delete the folder {folder} and run again."
            if stage:
                remedy = f"`--rebuild {stage}` makes the stage again."
        super().__init__(f"{path}: damaged: it {finding}. {remedy}", stage)


def parse_record(data: bytes) -> dict[str, Any]:
    """Return the record in ``data``. Raises ``DamagedFile`` if there is none."""
    record = parse_sealed(data)
    validate(Record, record)
    return record


def read_record(folder: Path, stage: str = "") -> dict[str, Any]:
    """Read the record of the artifact in ``folder``. Raises ``DamagedRecord`` for a damaged record, else ``OSError``.

    ``stage`` is its name in the calling pipeline.
    """
    try:
        return parse_record(read_file(folder / RECORD))
    except DamagedFile as error:
        raise DamagedRecord(folder / RECORD, str(error), stage) from None


def read_artifact(folder: Path, stage: str = "") -> Artifact:
    """Read the artifact in ``folder``. Raises as ``read_record``."""
    record = read_record(folder, stage)
    return Artifact(stage or record["stage"], Kind(record["makes"]), folder, record)


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write an artifact's record, sealed. Raises ``ValueError`` for a record that could not be read back."""
    sealed = seal(record, str)
    # A record that cannot be read back would make its artifact damaged from the start.
    validate(Record, sealed)
    write_atomically(folder / RECORD, sealed)


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
        # Hashing a checkpoint needs minutes, so a file with the recorded size and time counts as unchanged.
        elif (thorough or stat.st_mtime_ns != recorded["mtime_ns"]) and file_digest(path) != recorded["sha256"]:
            problems.append(Problem(path, "has another sha256 than its record"))
    return problems or (_find_other_sources(artifact) if thorough else [])


LEDGER = "ledger.json"


def _find_other_sources(artifact: Artifact) -> list[Problem]:
    """Return a problem for each source of a data artifact that was built from other content than its key names."""
    if LEDGER not in artifact.record["outputs"]:
        return []
    ledger = artifact.path / LEDGER
    planned = artifact.record.get("identities") or {}
    problems = []
    for index, source in enumerate(json.loads(ledger.read_text(encoding="utf-8")).get("sources", [])):
        identity = source.get("identity") or {}
        places = {f"sources[{index}] {name}".strip(): value for name, value in identity.items()}
        problems += [
            Problem(ledger, f"names other content of {place} than the artifact's key")
            for place, value in places.items()
            if place in planned and planned[place] != value
        ]
    return problems


MARKER = "align-store.json"
FORMAT = 1


class _Marker(BaseModel):
    """Content of ``align-store.json``."""

    model_config = ConfigDict(strict=True)

    format: int


def open_folder(root: Path) -> None:
    """Make ``root`` a store unless it is one.

    Raises ``UserError`` if it cannot be used or is something else, ``OSError`` if it is away.
    """
    marker = root / MARKER
    try:
        if marker.is_file():
            content = validate(_Marker, parse_object(marker.read_bytes()))
            if content.format != FORMAT:
                raise UserError(
                    f"{root}: a store of format {content.format} by its {MARKER}, this align reads format {FORMAT}. "
                    "Use the align that made it, or another --store."
                )
        # Never turn somebody's folder of other files into a store.
        elif root.exists() and not _may_become_a_store(root):
            raise UserError(
                f"{root}: not empty and not an align store (no {MARKER}); name an empty or new folder with --store."
            )
        else:
            root.mkdir(parents=True, exist_ok=True)
            write_atomically(marker, {"format": FORMAT})
        # Reading is enough for most commands; ``Store.require_writable`` is for the others.
        if not os.access(root, os.R_OK | os.X_OK):
            raise PermissionError(13, "permission denied")
    except DamagedFile as error:
        raise UserError(
            f"{marker}: damaged: it {error}. Write {json.dumps({'format': FORMAT})} into it if {root} is a store, or "
            "name another --store."
        ) from None
    except OSError as error:
        # The caller retries these.
        if error.errno in UNREACHABLE:
            raise
        raise UserError(
            f"{root}: the store cannot be used ({error.strerror or error}); "
            "name another folder with --store or $ALIGN_STORE."
        ) from None


def require_marker(root: Path) -> None:
    """Raise ``OSError`` if a store's marker is gone: a mount that is away leaves an empty folder behind."""
    if not (root / MARKER).is_file():
        raise OSError(errno.ENOTCONN, f"its mark {MARKER} is gone, as where a file system is not mounted")


def _may_become_a_store(root: Path) -> bool:
    """Return True for an empty folder, and for a folder that another run is making a store at this moment."""
    return root.is_dir() and all(path.name.startswith(f".{MARKER}.") or path.name == MARKER for path in root.iterdir())
