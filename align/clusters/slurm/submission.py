"""What was handed to Slurm, as a folder in the store: ``jobs/<run>/<time>-<six hex>/``.

``submission.json`` has the pipeline as it was and a job for each stage; ``<stage>.sh`` is a job's script,
``<stage>.log`` what it printed, ``<stage>.json`` what it said of its end. ``cancelled`` stands there once the jobs were
called off, so that none queues itself again. Never imports torch.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from align.clusters.follow import Said, read_note, write_note
from align.errors import UserError
from align.pipeline.pipeline import Pipeline
from align.runner.open_store import Opening
from align.store.json_files import DamagedFile, read_sealed, write_sealed
from align.store.store import JOBS, Store

ABOUT, CANCELLED = "submission.json", "cancelled"


@dataclass(frozen=True)
class StageJob:
    """One stage's job."""

    stage: str
    kind: str
    key: str
    job: int
    """Slurm's number."""
    anew: bool = False
    """Whether the stage is made although an artifact is there, the one of time ``replaces``."""
    replaces: str | None = None


@dataclass
class Submission:
    """A folder of jobs."""

    folder: Path
    run: str
    raw: dict[str, Any]
    """The pipeline as parsed YAML, overrides set and loops written out."""
    where: str
    base: str
    rounds: dict[str, list[str]]
    store: Opening
    stages: list[StageJob] = field(default_factory=list)
    sweep: dict[str, Any] | None = None
    """For a sweep: where its file was, `--set`'s, how many workers, the number of their array of jobs."""
    references: dict[str, dict[str, str]] = field(default_factory=dict)
    """Kind and key of every stage of the pipeline, which ``gc`` leaves alone while a job waits or runs."""

    @classmethod
    def begin(cls, store: Store, pipeline: Pipeline, run: str, sweep: dict[str, Any] | None = None) -> Submission:
        """A new folder for ``pipeline``; nothing is submitted yet."""
        stamp = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
        folder = (store.root / JOBS / run / stamp).resolve()
        folder.mkdir(parents=True)
        rounds = {name: list(names) for name, names in pipeline.expanded.rounds.items()}
        made = cls(
            folder, run, pipeline.plain, pipeline.where, str(pipeline.base), rounds, Opening.of(store),
            sweep=sweep, references=pipeline.references,
        )  # fmt: skip
        made.write()
        return made

    @classmethod
    def read(cls, folder: Path) -> Submission:
        """The submission in ``folder``; ``UserError`` for one that cannot be used."""
        try:
            about = read_sealed(folder / ABOUT, _About)
        except DamagedFile as error:
            raise UserError(
                f"{folder / ABOUT}: damaged: it {error}. End its jobs with scancel, delete the folder {folder} and run "
                "the command again."
            ) from None
        return cls(folder, **{name: getattr(about, name) for name in _About.model_fields})

    def write(self) -> None:
        """Bring ``submission.json`` up to date, in one rename."""
        about = asdict(self)
        del about["folder"]
        write_sealed(self.folder / ABOUT, about)

    @property
    def numbers(self) -> set[int]:
        """Slurm's numbers of its jobs."""
        swept = (self.sweep or {}).get("job")
        return {job.job for job in self.stages} | ({int(swept)} if swept is not None else set())

    def pipeline(self) -> Pipeline:
        """The pipeline that was submitted; ``UserError`` where its files have changed so that it is another now."""
        pipeline = Pipeline(self.raw, self.where, Path(self.base), self.rounds)
        for one in self.stages:
            if pipeline.nodes[one.stage].key != one.key:
                raise UserError(
                    f"stage '{one.stage}' is another than when it was submitted: a file that {self.where} names has "
                    "changed since. Run the same command again to submit it as it is now."
                )
        return pipeline

    def job_of(self, stage: str) -> StageJob:
        """The job of a stage."""
        return next(one for one in self.stages if one.stage == stage)

    def log(self, stage: str) -> Path:
        """What the stage's job prints."""
        return self.folder / f"{stage}.log"

    def said(self, stage: str) -> Said | None:
        """What the stage's job said of its last turn, if one has ended."""
        return read_note(self.folder / f"{stage}.json")

    def say(self, stage: str, said: Said) -> None:
        """Note how a turn ended."""
        write_note(self.folder / f"{stage}.json", said)

    def call_off(self) -> None:
        """No job of this submission is to queue itself again."""
        (self.folder / CANCELLED).touch()

    @property
    def is_called_off(self) -> bool:
        """Whether it was called off."""
        return (self.folder / CANCELLED).exists()


def submissions(store: Store, run: str | None = None) -> Iterator[Submission]:
    """Those of a run, or all; newest first."""
    folder = store.root / JOBS
    for path in sorted(folder.glob(f"{run or '*'}/*/{ABOUT}"), key=lambda path: path.parent.name, reverse=True):
        try:
            yield Submission.read(path.parent.resolve())
        except (OSError, UserError):  # deleted meanwhile, or damaged, which `align gc` names
            continue


class _About(BaseModel):
    """The content of ``submission.json``."""

    model_config = ConfigDict(extra="forbid")

    run: str
    raw: dict[str, Any]
    where: str
    base: str
    rounds: dict[str, list[str]]
    store: Opening
    stages: list[StageJob]
    sweep: dict[str, Any] | None
    references: dict[str, dict[str, str]]


__all__ = ["StageJob", "Submission", "submissions"]
