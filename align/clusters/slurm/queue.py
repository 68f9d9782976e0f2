"""The jobs of a submitted run, as a :class:`~align.clusters.follow.Queue`. Never imports torch."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from align.clusters.follow import JobFollower, JobResult, JobState
from align.clusters.slurm import commands
from align.clusters.slurm.submit import SubmittedRun, slurm_block
from align.runner.listener import Listener
from align.runner.runner import Run


class SlurmQueue:
    """The jobs of ``run``."""

    name = "Slurm"
    every = 5.0  # its controller has many users

    def __init__(self, run: SubmittedRun) -> None:
        self.run = run

    def query(self, stages: Collection[str]) -> dict[str, JobState]:
        """Return the states of these stages' jobs. Raises ``SchedulerError``."""
        jobs = commands.jobs({self.run.job(stage) for stage in stages})
        return {stage: self._state(stage, jobs.get(self.run.job(stage))) for stage in stages}

    def _state(self, stage: str, job: commands.Job | None) -> JobState:
        number = self.run.job(stage)
        # Slurm has forgotten the job, which says nothing about how it ended.
        if job is None:
            return JobState("gone", f"its job is gone and has left no artifact (job {number})")
        if job.waits:
            return JobState("waits", f"job {number} waits" + (f" ({job.reason})" if job.reason else ""))
        if job.is_live:
            return JobState("runs", f"job {number} runs on {job.nodes}")
        # A shared file system may show the artifact late, so this is no failure yet.
        if job.state == "COMPLETED":
            return JobState("gone", f"its job is done, but its artifact is missing (job {number})")
        block, place = slurm_block(self.run.pipeline, stage), f"runtime.stages.{stage}.executor"
        remedies = {
            "TIMEOUT": f"Raise {place}.time (now {block.time or 'the partition has its own'}).",
            "OUT_OF_MEMORY": f"Raise {place}.memory_gb (now {block.memory_gb or 'the partition has its own'}).",
        }
        description = f"{commands.OVER.get(job.state, job.state)} (job {number})"
        return JobState("over", description, remedies.get(job.state, ""))

    def result(self, stage: str) -> JobResult | None:
        """Return the result of the job's last turn, if one has ended."""
        return self.run.submissions[stage].result(stage)

    def log(self, stage: str) -> Path:
        """Return the file that the job prints to."""
        return self.run.submissions[stage].log(stage)

    def replaces(self, stage: str) -> str | None:
        """Return the creation time of the artifact that a forced stage replaces."""
        job = self.run.submissions[stage].job_of(stage)
        return job.replaces if job.force else None


def follow_jobs(submitted: SubmittedRun, listener: Listener) -> Run:
    """Report the jobs to ``listener`` until all are over. Raises ``StageFailed`` once one has failed."""
    queue = SlurmQueue(submitted)
    return JobFollower(submitted.pipeline, submitted.store, submitted.submissions, queue, listener).follow()


__all__ = ["SlurmQueue", "follow_jobs"]
