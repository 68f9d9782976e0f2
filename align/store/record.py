"""The record of a finished artifact: its fields, reading and writing. Knows no torch.

A record is sealed with a digest of itself. One that lacks a field, was changed, or carries no seal is damaged: its
artifact does not count as finished, and the error names the file and the remedy.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

from align.errors import UserError
from align.store.artifacts import Artifact, Kind
from align.store.json_files import DamagedFile, as_json, parse_sealed, read_file, validate, write_sealed

RECORD = "record.json"
SHORT = 12
"""Digits of a key in the names of folders."""


def _inside(name: str) -> str:
    """Return a file's name. Raises ``ValueError`` for one that leads out of its artifact's folder."""
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
        self.path, self.finding = path, finding
        folder = Path(path).parent
        if not remedy:
            remedy = f"Delete the folder {folder} and run again."
            if stage:
                remedy = f"`--rebuild {stage}` makes the stage again."
        super().__init__(f"{path}: damaged: it {finding}. {remedy}", stage)


def parse_record(data: bytes) -> dict[str, Any]:
    """Return the record in ``data``. Raises ``DamagedFile`` where there is none."""
    record = parse_sealed(data)
    validate(Record, record)
    return record


def read_record(folder: Path, stage: str = "") -> dict[str, Any]:
    """Read the record of the artifact in ``folder``. Raises ``DamagedRecord`` for a damaged one, else ``OSError``.

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
    """Write an artifact's record, sealed. Raises ``ValueError`` for one that could not be read back."""
    plain = as_json(record)
    # A record that cannot be read back would make its artifact damaged from the start.
    validate(Record, plain)
    write_sealed(folder / RECORD, plain)
