"""What a stage asks of a cluster's scheduler: the blocks ``runtime.slurm`` and its like. Torch-free.

Left out: how many processes a stage is, and how its model lies over them; those are the stage's whoever starts it.
"""

from __future__ import annotations

import re

from pydantic import Field, field_validator, model_validator

from align.config.base import Config

OURS = {
    "array": "--workers", "chdir": "the current folder", "dependency": "what a stage reads", "error": "the store",
    "export": "your environment", "job-name": "the pipeline's name", "output": "the store", "requeue": "requeue",
    "no-requeue": "requeue", "signal": "grace", "wrap": "the stage", "parsable": "nothing", "wait": "--detach",
    "hold": "nothing", "partition": "partition", "account": "account", "qos": "qos", "time": "time", "mem": "memory_gb",
    "cpus-per-task": "cpus", "gpus-per-node": "gpus", "nodes": "nodes", "ntasks-per-node": "nothing",
    "constraint": "constraint",
}  # fmt: skip
"""Options of sbatch that are set here, and what sets them."""


SLACK = 60
"""Seconds that Slurm may send a signal early."""


def seconds_of(time: str) -> int:
    """Slurm's spelling of a time: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]]."""
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, seconds = [*parts, 0, 0][:3]
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:
        hours, (minutes, seconds) = 0, [*parts, 0][:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


class SlurmConfig(Config):
    """What a stage's job asks of Slurm under ``--on slurm`` (docs/cluster.md); the cluster decides the rest."""

    partition: str | None = Field(None, min_length=1)
    """Slurm's partition; null takes its default one."""
    account: str | None = Field(None, min_length=1)
    """Account that the job is charged to."""
    qos: str | None = Field(None, min_length=1)
    """Slurm's quality of service, where the cluster asks for one."""
    constraint: str | None = Field(None, min_length=1)
    """Features that the node must have, as sbatch takes them: ``a100|h100``."""
    time: str | None = Field(None, pattern=r"^(\d+-)?\d{1,2}(:\d{2}){0,2}$")
    """Time limit of a job, days-hours:minutes:seconds; a stage that needs longer goes on in its next job."""
    nodes: int | None = Field(None, ge=1)
    """Nodes of a job; by default those of ``runtime.launch`` for a stage that trains, else one."""
    cpus: int | None = Field(None, ge=1)
    """Cores of a job on each node."""
    memory_gb: int | None = Field(None, ge=1)
    """GiB of a job on each node."""
    gpus: int = Field(0, ge=0)
    """GPUs of a job on each node."""
    setup: str | None = None
    """Shell commands that make a node ready: ``module load cuda``. This program's own folder is in the PATH before."""
    sbatch: dict[str, str] = Field({})
    """Further options of sbatch, an empty text for one without a value: ``{mail-type: END, exclusive: ""}``."""
    grace: int = Field(60, ge=10, le=65535)
    """Seconds before the time limit at which a stage is asked to save a checkpoint and stop; also what it may take."""
    requeue: bool = True
    """Whether a job that was preempted, or reached its time limit, is queued again to go on from its checkpoint."""
    shared_store: bool = False
    """Says that all nodes see the store under its path, where that cannot be told from its file system."""

    @model_validator(mode="after")
    def _time_to_begin(self) -> SlurmConfig:
        seconds = None if self.time is None else seconds_of(self.time)
        if seconds is not None and seconds < self.grace + 2 * SLACK:
            raise ValueError(
                f"time {self.time} leaves a stage no time before it is asked to stop: Slurm may do so {SLACK} seconds "
                f"earlier than grace says ({self.grace} s). Take {self.grace + 2 * SLACK} seconds, or less grace."
            )
        return self

    @field_validator("sbatch")
    @classmethod
    def _not_what_is_set_here(cls, given: dict[str, str]) -> dict[str, str]:
        for name in given:
            if not re.fullmatch(r"[a-z][a-z0-9-]*", name):
                raise ValueError(f"'{name}' is no option of sbatch; write a long one without its dashes: mail-type.")
            if name in OURS:
                raise ValueError(f"sbatch's --{name} follows from {OURS[name]}; take it out here.")
        return given


class SamplersConfig(Config):
    """Engines on a Ray cluster that share the prompts of a stage."""

    count: int = Field(0, ge=0)
    """How many; 0 samples in the stage's own process."""
    cpus: float = Field(1, ge=0)
    """Cores of each."""
    gpus: float = Field(0, ge=0)
    """GPUs of each."""
    resources: dict[str, float] = Field({})
    """Further resources of each, by the names that nodes were started with."""


class RayConfig(Config):
    """What a stage's task asks of Ray under ``--on ray`` (docs/cluster.md)."""

    address: str = Field("auto", min_length=1)
    """The cluster: ``auto`` for the one that this machine belongs to, ``10.0.0.1:6379``, ``ray://10.0.0.1:10001``."""
    cpus: float = Field(1, ge=0)
    """Cores of a stage's task."""
    gpus: float = Field(0, ge=0)
    """GPUs of a stage's task."""
    memory_gb: float | None = Field(None, gt=0)
    """GiB that a node must have left for a task; Ray counts it and does not enforce it."""
    resources: dict[str, float] = Field({})
    """Further resources by the names that nodes were started with: ``{a100: 1}``."""
    retries: int = Field(3, ge=0)
    """How often a stage whose node or worker died is tried again, on another node where there is one."""
    samplers: SamplersConfig = SamplersConfig()
    """Engines elsewhere in the cluster that draw the stage's responses, whatever runs the stage itself."""
    wait: float = Field(300, ge=0)
    """Seconds that a stage waits while no node of the cluster could ever hold it; raise it for an autoscaler."""


__all__ = ["RayConfig", "SamplersConfig", "SlurmConfig"]
