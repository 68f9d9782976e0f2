"""Resources that a stage requests from a cluster: the blocks ``runtime.slurm`` and ``runtime.ray``. Torch-free.

The number of processes of a stage, and how they share its model, are in ``runtime.launch``.
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
"""Options of sbatch that align sets, with the setting that decides each."""


SLACK = 60
"""Seconds by which Slurm may send a signal early."""


def seconds_of(time: str) -> int:
    """Return the seconds of a time in Slurm's notation.

    It is minutes, minutes:seconds, hours:minutes:seconds, or days-hours[:minutes[:seconds]].
    """
    days, dash, rest = time.rpartition("-")
    # ``days-hours[:minutes[:seconds]]``, or without days ``minutes``, ``minutes:seconds``, ``hours:minutes:seconds``.
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, seconds = [*parts, 0, 0][:3]
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:
        hours, (minutes, seconds) = 0, [*parts, 0][:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


class SlurmConfig(Config):
    """Resources of a stage's Slurm job under ``--on slurm`` (docs/cluster.md); the cluster decides the rest."""

    partition: str | None = Field(None, min_length=1)
    """Slurm's partition; null means the cluster's default."""
    account: str | None = Field(None, min_length=1)
    """Account to charge."""
    qos: str | None = Field(None, min_length=1)
    """Slurm's quality of service, if the cluster requires one."""
    constraint: str | None = Field(None, min_length=1)
    """Node features, in sbatch's notation: ``a100|h100``."""
    time: str | None = Field(None, pattern=r"^(\d+-)?\d{1,2}(:\d{2}){0,2}$")
    """Time limit of a job, days-hours:minutes:seconds; a stage that needs longer continues in its next job."""
    nodes: int | None = Field(None, ge=1)
    """Nodes per job; by default those of ``runtime.launch`` for a stage that trains, else one."""
    cpus: int | None = Field(None, ge=1)
    """Cores per node."""
    memory_gb: int | None = Field(None, ge=1)
    """GiB per node."""
    gpus: int = Field(0, ge=0)
    """GPUs per node."""
    setup: str | None = None
    """Shell commands that set up a node, such as ``module load cuda``; align's folder is in PATH before them."""
    sbatch: dict[str, str] = Field({})
    """Further options of sbatch; an empty text for an option without a value: ``{mail-type: END, exclusive: ""}``."""
    grace: int = Field(60, ge=10, le=65535)
    """Seconds before the time limit at which a stage is told to save a checkpoint and stop."""
    requeue: bool = True
    """Requeue a job that was preempted or reached its time limit; it continues from its checkpoint."""
    shared_store: bool = False
    """Assert that all nodes see the store under its path, if that does not follow from its file system."""

    @model_validator(mode="after")
    def _time_to_begin(self) -> SlurmConfig:
        seconds = None if self.time is None else seconds_of(self.time)
        if seconds is not None and seconds < self.grace + 2 * SLACK:
            raise ValueError(
                f"time {self.time} leaves a stage no time before it is told to stop: Slurm may signal {SLACK} seconds "
                f"earlier than grace ({self.grace} s). Take {self.grace + 2 * SLACK} seconds, or less grace."
            )
        return self

    @field_validator("sbatch")
    @classmethod
    def _refuse_own_options(cls, options: dict[str, str]) -> dict[str, str]:
        for name in options:
            if not re.fullmatch(r"[a-z][a-z0-9-]*", name):
                raise ValueError(
                    f"'{name}' is not an option of sbatch; write a long option without its dashes: mail-type."
                )
            if name in OURS:
                raise ValueError(f"sbatch's --{name} is set by {OURS[name]}; remove it here.")
        return options


class SamplersConfig(Config):
    """Engines on a Ray cluster that share the prompts of a stage."""

    count: int = Field(0, ge=0)
    """Number of engines; 0 samples in the stage's own process."""
    cpus: float = Field(1, ge=0)
    """Cores per engine."""
    gpus: float = Field(0, ge=0)
    """GPUs per engine."""
    resources: dict[str, float] = Field({})
    """Further resources per engine, by the names that the nodes were started with."""


class RayConfig(Config):
    """Resources of a stage's Ray task under ``--on ray`` (docs/cluster.md)."""

    address: str = Field("auto", min_length=1)
    """Address of the cluster: ``10.0.0.1:6379``, ``ray://10.0.0.1:10001``, or ``auto`` for this machine's cluster."""
    cpus: float = Field(1, ge=0)
    """Cores per task."""
    gpus: float = Field(0, ge=0)
    """GPUs per task."""
    memory_gb: float | None = Field(None, gt=0)
    """GiB that a node must have free for a task; Ray counts them and does not enforce them."""
    resources: dict[str, float] = Field({})
    """Further resources, by the names that the nodes were started with: ``{a100: 1}``."""
    retries: int = Field(3, ge=0)
    """Retries of a stage whose node or worker died, on another node if there is one."""
    samplers: SamplersConfig = SamplersConfig()
    """Engines on other nodes of the cluster that sample the stage's responses."""
    wait: float = Field(300, ge=0)
    """Seconds to wait if no node of the cluster is large enough; raise it for an autoscaler."""


__all__ = ["RayConfig", "SamplersConfig", "SlurmConfig"]
