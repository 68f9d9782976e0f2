"""Files that a stage's process and its runner hand each other in ``<12 hex>.partial/``, each through a schema.

``work.json`` is the stage to run, ``result.json`` its outcome, ``attempts.json`` the seconds of each attempt. All are
sealed, and written atomically. Knows no torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from align.errors import UserError
from align.store.json_files import DamagedFile, read_sealed, write_sealed
from align.store.retry import UNREACHABLE_STORE

WORK = "work.json"
RESULT = "result.json"
ATTEMPTS = "attempts.json"


class InputReference(BaseModel):
    """An artifact that the stage reads: its name in the pipeline, and its folder."""

    stage: str
    path: str


class Work(BaseModel):
    """The content of ``work.json``."""

    model_config = ConfigDict(extra="forbid")

    name: str
    stage: str
    """The kind of a stage, or the place of its description (``module:NAME``)."""
    config: dict[str, Any]
    seed: int
    runtime: dict[str, Any]
    inputs: dict[str, InputReference | list[InputReference] | None] = {}
    identities: dict[str, str] = {}
    """Content that is read outside the store, as the stage's key has it."""
    cache: str | None = None
    pipeline: str = ""
    group: str = ""
    runner_pid: int | None = None


class StageResult(BaseModel):
    """The content of ``result.json``."""

    status: Literal["done", "failed", "refused", "stopped", UNREACHABLE_STORE]  # type: ignore[valid-type]
    message: str = ""
    """Reason if it is not done."""
    metrics: dict[str, Any] = {}
    seconds: float = Field(0.0, ge=0)
    peak_memory_bytes: int = Field(0, ge=0)
    versions: dict[str, str] = {}
    precision: str | None = None
    """Type of the stage's matrix products; None for a stage without any."""
    symptom: str | None = None
    """Of one process among several: the sign by which its error only tells of another one's end."""


class _Attempts(BaseModel):
    seconds: list[float]


def write_work(partial: Path, work: dict[str, Any]) -> None:
    """Write the stage's work."""
    write_sealed(partial / WORK, work)


def read_work(partial: Path) -> Work:
    """Read the stage's work; ``UserError`` if the file cannot be used."""
    try:
        return read_sealed(partial / WORK, Work)
    except DamagedFile as error:
        raise UserError(f"{partial / WORK}: damaged: it {error}. Run again to rewrite it.") from None


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Write the result of a stage's process."""
    write_sealed(path, result, default=float)


def read_result(path: Path) -> StageResult:
    """Read the result of a stage's process. Raises ``DamagedFile``, or ``FileNotFoundError`` if it left none."""
    return read_sealed(path, StageResult)


def left_result(partial: Path) -> StageResult | None:
    """Return the result in a stage's folder; None if no usable one exists."""
    try:
        return read_result(partial / RESULT)
    except (OSError, DamagedFile):
        return None


def write_attempts(partial: Path, seconds: list[float]) -> None:
    """Note the duration of each attempt so far."""
    write_sealed(partial / ATTEMPTS, {"seconds": seconds})


def read_attempts(partial: Path) -> list[float]:
    """Seconds of each attempt. A file that is damaged counts as absent: it is about cost, not about the result."""
    try:
        return read_sealed(partial / ATTEMPTS, _Attempts).seconds
    except (FileNotFoundError, DamagedFile):
        return []
