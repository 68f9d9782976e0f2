"""Records of named runs, ``runs/<name>.json``: which stages each reached last. Knows no torch."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from align.errors import UserError
from align.store.json_files import DamagedFile, read_sealed, write_sealed
from align.store.leases import Stages, UsedStage

RUNS = "runs"


class RunRecord(BaseModel):
    """Content of ``runs/<name>.json``."""

    model_config = ConfigDict(strict=True)

    name: str
    when: float
    """Seconds since the epoch."""
    stages: dict[str, UsedStage]
    pipeline: dict[str, Any]
    """As parsed YAML."""


class DamagedRun(UserError):
    """The record of a named run cannot be used."""

    def __init__(self, path: Path, finding: str) -> None:
        self.name = path.stem
        super().__init__(
            f"{path}: damaged: it {finding}. Run the pipeline of '{path.stem}' again to rewrite it, or delete it if "
            "that run is no longer needed."
        )


def write_run(root: Path, name: str, stages: Stages, pipeline: dict[str, Any]) -> None:
    """Record that the run ``name`` reaches ``stages``; ``root`` is the store's folder."""
    (root / RUNS).mkdir(exist_ok=True)
    record = {"name": name, "when": time.time(), "stages": stages, "pipeline": pipeline}
    write_sealed(root / RUNS / f"{name}.json", record)


def read_runs(root: Path) -> tuple[dict[str, dict[str, Any]], list[DamagedRun]]:
    """Return name → content of the intact records, and the errors of the damaged ones."""
    intact, damaged = {}, []
    for path in sorted((root / RUNS).glob("*.json")):
        try:
            run = read_sealed(path, RunRecord)
            if run.name != path.stem:
                raise DamagedFile(f"is about the run '{run.name}'")
            intact[path.stem] = run.model_dump()
        except DamagedFile as error:
            damaged.append(DamagedRun(path, str(error)))
        except FileNotFoundError:  # deleted since the folder was listed
            continue
    return intact, damaged
