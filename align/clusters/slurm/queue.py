"""What Slurm says of a run's stages, for ``align.clusters.follow``. Never imports torch."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from align.clusters.follow import Place, Said
from align.clusters.slurm import commands
from align.clusters.slurm.submit import Submitted


class SlurmQueue:
    """The jobs of ``submitted``."""

    name = "Slurm"
    every = 5.0  # its controller has many users

    def __init__(self, submitted: Submitted) -> None:
        self.submitted = submitted

    def look(self, stages: Collection[str]) -> dict[str, Place]:
        """See ``align.clusters.follow.Queue``."""
        known = commands.jobs({self.submitted.job(stage) for stage in stages})
        return {stage: self._place(stage, known.get(self.submitted.job(stage))) for stage in stages}

    def _place(self, stage: str, job: commands.Job | None) -> Place:
        number = self.submitted.job(stage)
        if job is None:
            return Place("gone", f"its job is gone, and nothing of it is there (job {number})")
        if job.waits:
            return Place("waits", f"job {number} waits" + (f" ({job.why})" if job.why else ""))
        if job.is_live:
            return Place("runs", f"job {number} runs on {job.nodes}")
        if job.state == "COMPLETED":
            return Place("gone", f"its job is done, and its result is not there (job {number})")
        block, place = self.submitted.pipeline.runtimes[stage].slurm, f"runtime.stages.{stage}.slurm"
        remedy = {
            "TIMEOUT": f"Raise {place}.time (now {block.time or 'the partition has its own'}).",
            "OUT_OF_MEMORY": f"Raise {place}.memory_gb (now {block.memory_gb or 'the partition has its own'}).",
        }.get(job.state, "")
        return Place("over", f"{commands.OVER.get(job.state, job.state)} (job {number})", remedy)

    def said(self, stage: str) -> Said | None:
        """See ``align.clusters.follow.Queue``."""
        return self.submitted.places[stage].said(stage)

    def log(self, stage: str) -> Path:
        """See ``align.clusters.follow.Queue``."""
        return self.submitted.places[stage].log(stage)

    def replaces(self, stage: str) -> str | None:
        """See ``align.clusters.follow.Queue``."""
        job = self.submitted.places[stage].job_of(stage)
        return job.replaces if job.anew else None


__all__ = ["SlurmQueue"]
