"""The record of submitted Slurm jobs, a folder in the store: ``jobs/<run>/<time>-<six hex>/``.

``submission.json`` holds the pipeline at that time and a job for each stage. ``<stage>.sh`` is a job's script,
``<stage>.log`` its output, ``<stage>.json`` its note about its end. The file ``cancelled`` appears once the jobs were
cancelled, so none requeues itself. Never imports torch.
"""

from __future__ import annotations

import secrets
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from align.clusters.follow import JobResult, read_note, write_note
from align.config.runtime.executor import SlurmExecutor
from align.errors import UserError
from align.pipeline.pipeline import Pipeline
from align.runner.open_store import Opening
from align.store.json_files import DamagedFile, parse_sealed, read_file, validate, write_sealed, write_text_atomically
from align.store.store import JOBS, Store

ABOUT = "submission.json"
CANCELLED = "cancelled"


@dataclass(frozen=True)
class StageJob:
    """One stage's job."""

    stage: str
    kind: str
    key: str
    job: int
    """Slurm's number."""
    force: bool = False
    """True when the stage runs although an artifact is there, the one created at ``replaces``."""
    replaces: str | None = None


class Submission(BaseModel):
    """A folder of jobs; its fields other than ``folder`` are in ``submission.json``."""

    model_config = ConfigDict(extra="forbid")

    folder: Path
    run: str
    raw: dict[str, Any]
    """The pipeline as parsed YAML, overrides set and loops written out."""
    where: str
    base: str
    rounds: dict[str, list[str]]
    store: Opening
    stages: list[StageJob] = []
    sweep: dict[str, Any] | None = None
    """For a sweep: the place of its file, `--set`'s assignments, `--on`, the number of workers, their job's number."""
    references: dict[str, dict[str, str]] = {}
    """Kind and key of every stage of the pipeline, which ``gc`` keeps while a job waits or runs."""

    @classmethod
    def begin(cls, store: Store, pipeline: Pipeline, run: str, sweep: dict[str, Any] | None = None) -> Submission:
        """Create a folder for ``pipeline``; no job is submitted yet."""
        # The order by name is the order by time; the random part distinguishes two submissions of one second.
        stamp = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
        folder = (store.root / JOBS / run / stamp).resolve()
        folder.mkdir(parents=True)
        rounds = {name: list(names) for name, names in pipeline.expanded.rounds.items()}
        submission = cls(
            folder=folder,
            run=run,
            raw=pipeline.plain,
            where=pipeline.where,
            base=str(pipeline.base),
            rounds=rounds,
            store=Opening.of(store),
            sweep=sweep,
            references=pipeline.references,
        )
        # Before any job is submitted: the first job may start, and read this file, at once.
        submission.write()
        return submission

    @classmethod
    def read(cls, folder: Path) -> Submission:
        """Read the submission in ``folder``. Raises ``UserError`` if it is damaged."""
        try:
            fields = parse_sealed(read_file(folder / ABOUT))
            return validate(cls, {**fields, "folder": folder})
        except DamagedFile as error:
            raise UserError(
                f"{folder / ABOUT}: damaged: it {error}. End its jobs with scancel, delete the folder {folder} and run "
                "the command again."
            ) from None

    @classmethod
    def read_for(cls, folder: Path, stage: str, seconds: float = 60.0) -> Submission:
        """Read the submission in ``folder`` once it lists the job of ``stage``.

        Slurm may start a job before the command that submitted it has written the job's number down, and a shared file
        system may show that late. Raises ``UserError`` if the job is not listed after ``seconds``.
        """
        deadline = time.monotonic() + seconds
        while True:
            submission = cls.read(folder)
            if any(job.stage == stage for job in submission.stages):
                return submission
            if time.monotonic() >= deadline:
                raise UserError(
                    f"{folder / ABOUT} does not list the job of stage '{stage}': the command that submitted it ended "
                    "before it wrote the job down. Run the command again."
                )
            time.sleep(0.2)

    def write(self) -> None:
        """Write ``submission.json`` atomically."""
        write_sealed(self.folder / ABOUT, self.model_dump(exclude={"folder"}))

    @property
    def numbers(self) -> set[int]:
        """Slurm's numbers of its jobs."""
        numbers = {job.job for job in self.stages}
        sweep_job = (self.sweep or {}).get("job")
        if sweep_job is not None:
            numbers.add(int(sweep_job))
        return numbers

    def pipeline(self) -> Pipeline:
        """Return the pipeline that was submitted. Raises ``UserError`` if changed files have changed its keys."""
        # The job must run the submitted pipeline or refuse: recipes and other files are read again here.
        pipeline = Pipeline(self.raw, self.where, Path(self.base), self.rounds)
        for job in self.stages:
            if pipeline.nodes[job.stage].key != job.key:
                raise UserError(
                    f"stage '{job.stage}' has another key than when it was submitted: a file that {self.where} "
                    "names has changed. Run the same command again to submit the stage as it is now."
                )
        return pipeline

    def job_of(self, stage: str) -> StageJob:
        """Return the job of a stage."""
        return next(job for job in self.stages if job.stage == stage)

    def log(self, stage: str) -> Path:
        """Return the file that the stage's job prints to."""
        return self.folder / f"{stage}.log"

    def result(self, stage: str) -> JobResult | None:
        """Return the result of the last turn of the stage's job; None if no turn has ended."""
        return read_note(self.folder / f"{stage}.json")

    def write_result(self, stage: str, result: JobResult) -> None:
        """Write the result of a turn."""
        write_note(self.folder / f"{stage}.json", result)

    def mark_cancelled(self) -> None:
        """Keep the jobs of this submission from requeueing themselves."""
        (self.folder / CANCELLED).touch()

    @property
    def is_cancelled(self) -> bool:
        """True once it was cancelled."""
        return (self.folder / CANCELLED).exists()


def submissions(store: Store, run: str | None = None) -> Iterator[Submission]:
    """Yield the submissions of a run, or all, newest first. Damaged submissions are skipped."""
    folder = store.root / JOBS
    # Newest first: a stage's latest job counts.
    for path in sorted(folder.glob(f"{run or '*'}/*/{ABOUT}"), key=lambda path: path.parent.name, reverse=True):
        try:
            yield Submission.read(path.parent.resolve())
        except (OSError, UserError):  # deleted meanwhile, or damaged, which `align gc` names
            continue


TEMPLATE = """\
#!/bin/bash
# {title}. Written by align; runs again as it stands: sbatch OPTIONS {script}
# Asked to stop before anything has begun: wait for another turn.
trap 'scontrol requeue "$SLURM_JOB_ID"; exit 75' USR1
if [ ! -d {folder} ]; then
  echo "node $(hostname) does not see the store's folder" {folder} >&2
  exit 1
fi
export PATH={bin}:"$PATH"
{setup}
# From here to Python's own handler the signal is held back, not lost; coreutils before 8.32 cannot.
trap '' USR1
block=; env --block-signal=USR1 true 2>/dev/null && block='env --block-signal=USR1'
exec $block {python} -m {module} {arguments}
"""


def write_script(
    file: Path, title: str, arguments: Sequence[str], setup: str | None, module: str = "align.cli.slurm_job"
) -> Path:
    """Write a script that runs ``module`` with ``arguments``; returns its path."""
    python = Path(sys.executable)
    write_text_atomically(
        file,
        TEMPLATE.format(
            # One line: a name with a line break must not become a command.
            title=" ".join(title.split()),
            script=shlex.quote(str(file)),
            folder=shlex.quote(str(file.parent)),
            bin=shlex.quote(str(python.parent)),
            setup=setup or "",
            python=shlex.quote(python.name),
            module=module,
            arguments=shlex.join(arguments),
        ),
    )
    return file


def sbatch_options(block: SlurmExecutor, name: str, log_folder: Path, workdir: Path, log: str) -> list[str]:
    """Return sbatch's options for a job named ``name`` that works in ``workdir``.

    It writes ``log`` into ``log_folder``. In ``log``, %a is the number of an array's task.
    """
    settings = {
        "job-name": name,
        # sbatch replaces % and a letter in this path, so a % of the folder's own is doubled.
        "output": f"{str(log_folder).replace('%', '%%')}/{log}",
        # A requeued job adds to the log of its earlier turns.
        "open-mode": "append",
        "chdir": str(workdir),
        # B: only to the script's own process, which has become Python by ``exec``.
        "signal": f"B:USR1@{block.grace}",
        "partition": block.partition,
        "account": block.account,
        "qos": block.qos,
        "constraint": block.constraint,
        "time": block.time,
        "nodes": block.nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": block.cpus,
        "mem": None if block.memory_gb is None else f"{block.memory_gb}G",
        "gpus-per-node": block.gpus or None,
        **block.sbatch,
    }
    options = []
    # None leaves an option out; the user's own ``sbatch`` settings come last and win.
    for option, value in settings.items():
        if value is not None:
            options.append(f"--{option}" if value == "" else f"--{option}={value}")
    options.append("--requeue" if block.requeue else "--no-requeue")
    return options
