"""The block ``executor``: what runs stages, trials of sweeps and data builds, and the resources of each. Torch-free.

The number of processes of a stage, and how they share its model, are in ``runtime.launch``.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, GetJsonSchemaHandler, field_validator
from pydantic_core import CoreSchema

from align.config.base import Config
from align.config.validation import nearest

OURS = {
    "array": "--workers",
    "chdir": "the current folder",
    "dependency": "what a stage reads",
    "error": "the store",
    "export": "your environment",
    "job-name": "the pipeline's name",
    "output": "the store",
    "requeue": "requeue",
    "no-requeue": "requeue",
    "signal": "grace",
    "wrap": "the stage",
    "parsable": "nothing",
    "wait": "--detach",
    "hold": "nothing",
    "partition": "partition",
    "account": "account",
    "qos": "qos",
    "time": "time",
    "mem": "memory_gb",
    "cpus-per-task": "cpus",
    "gpus-per-node": "gpus",
    "nodes": "nodes",
    "ntasks-per-node": "nothing",
    "constraint": "constraint",
}
"""Options of sbatch that align sets, with the setting that decides each."""

TIME = re.compile(r"([0-9]+-)?[0-9]+(:[0-9]+){0,2}")
"""A time in Slurm's notation."""
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


class _ExecutorFields(Config):
    """Base of the executors."""

    def model_post_init(self, context: Any) -> None:
        """Count ``name`` as set: a block that is written without it could not be read again."""
        self.model_fields_set.add("name")

    def objection(self) -> str | None:
        """Return why the fields contradict each other, or None.

        No validator, since a stage's overrides may hold only some of the fields.
        """
        return None


class LocalExecutor(_ExecutorFields):
    """This machine: the command runs the stages one after another."""

    name: Literal["local"] = "local"
    """``local``: the default."""


class SlurmExecutor(_ExecutorFields):
    """Slurm: each stage is a job, each worker of a sweep too (docs/cluster.md). The cluster decides what is not set."""

    name: Literal["slurm"] = "slurm"
    """``slurm``."""
    partition: str | None = Field(None, min_length=1)
    """Slurm's partition; null means the cluster's default."""
    account: str | None = Field(None, min_length=1)
    """Account to charge."""
    qos: str | None = Field(None, min_length=1)
    """Slurm's quality of service, if the cluster requires one."""
    constraint: str | None = Field(None, min_length=1)
    """Node features, in sbatch's notation: ``a100|h100``."""
    time: str | None = None
    """Time limit of a job, days-hours:minutes:seconds; a stage that needs longer continues in its next job."""
    nodes: int | None = Field(None, ge=1)
    """Nodes per job. The default is ``runtime.launch.nodes`` for a stage that trains, else one."""
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

    tasks: int | None = Field(None, ge=1)
    """Most jobs of each pass of a data build; by default the stage's own job builds all shards."""

    def objection(self) -> str | None:
        """Return why the fields contradict each other, or None."""
        seconds = None if self.time is None else seconds_of(self.time)
        if seconds is not None and seconds < self.grace + 2 * SLACK:
            return (
                f"time {self.time} leaves a stage no time before it is told to stop: Slurm may signal {SLACK} seconds "
                f"earlier than grace ({self.grace} s). Take {self.grace + 2 * SLACK} seconds, or less grace."
            )
        if self.tasks is not None and self.partition is None:
            return f"with tasks (now {self.tasks}), the jobs of data builds need a partition: write `partition: cpu`."
        return None

    @field_validator("time")
    @classmethod
    def _check_time(cls, time: str | None) -> str | None:
        if time is not None and not TIME.fullmatch(time):
            raise ValueError(
                f'\'{time}\' is not a time of Slurm; write "90" (minutes), "12:00:00" (hours:minutes:seconds) or '
                '"1-00:00:00" (days first).'
            )
        return time

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


class RayExecutor(_ExecutorFields):
    """Ray: each stage is a task, each worker of a sweep too (docs/cluster.md)."""

    name: Literal["ray"] = "ray"
    """``ray``."""
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
    tasks: int | None = Field(None, ge=1)
    """Most Ray tasks of each pass of a data build; by default the stage's own task builds all shards."""


# ---- the block ------------------------------------------------------------------------------------------------------

EXECUTORS: dict[str, type[_ExecutorFields]] = {"local": LocalExecutor, "slurm": SlurmExecutor, "ray": RayExecutor}
LOCAL = "local"
"""The executor of a run that names none."""


def in_long_form(block: Any) -> Any:
    """Return ``{name: slurm}`` for ``slurm``, and any other value as it is."""
    return {"name": block} if isinstance(block, str) else block


def _check_fields(value: Any) -> Any:
    """Return the block in its long form, with a name. Raises ``ValueError`` for a field of another executor."""
    block = in_long_form(value)
    if not isinstance(block, dict):
        return block
    name = block.get("name", LOCAL)
    if not isinstance(name, str) or name not in EXECUTORS:
        return block  # pydantic names the nearest executor
    for field in block:
        owners = _owners_of(field)
        if owners and name not in owners:
            raise ValueError(_foreign_field(f"'{field}' is", owners, block.get("name")))
        if not owners and "name" not in block:
            close = nearest(str(field), {field for config in EXECUTORS.values() for field in config.model_fields})
            if close is not None:
                raise ValueError(_foreign_field(f"unknown key '{field}'. '{close}' is", _owners_of(close), None))
    return {"name": name, **block}


def _owners_of(field: str) -> list[str]:
    """Return the executors that have a field."""
    return [name for name, config in EXECUTORS.items() if field in config.model_fields]


def _foreign_field(subject: str, owners: list[str], name: str | None) -> str:
    """Return the message about a field of ``owners`` in a block for ``name``; None for a block without a name."""
    fact = f"{subject} a field of {' and '.join(owners)}"
    if name is None:
        return (
            f"{fact}, and no executor is named. Write `runtime: {{executor: {{name: {owners[0]}}}}}`, or run it with "
            f"--on {owners[0]}."
        )
    return f"{fact}, and the executor is {name}. Leave it out, or write `name: {owners[0]}`."


class _ShortForm:
    """Adds the short form to the JSON schema, and lets a stage's block leave ``name`` out."""

    def __get_pydantic_json_schema__(self, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        schema = handler(core_schema)
        return {"anyOf": [{"enum": list(EXECUTORS)}, *schema["oneOf"]]}


Executor = Annotated[
    LocalExecutor | SlurmExecutor | RayExecutor,
    Field(discriminator="name"),
    BeforeValidator(_check_fields),
    _ShortForm(),
]
"""One of the executors; ``executor: slurm`` is short for ``executor: {name: slurm}``."""


def name_of_stages(runtime: Any) -> Any:
    """Return the block ``runtime`` with the run's executor as the name of stages' executor blocks that have none."""
    if not isinstance(runtime, dict) or not isinstance(runtime.get("stages"), dict):
        return runtime
    name = name_in(runtime.get("executor"))
    if name is None:
        return runtime
    stages = dict(runtime["stages"])
    for stage, block in stages.items():
        executor = block.get("executor") if isinstance(block, dict) else None
        if isinstance(executor, dict) and "name" not in executor:
            stages[stage] = {**block, "executor": {"name": name, **executor}}
    return {**runtime, "stages": stages}


def name_in(block: Any) -> Any:
    """Return the name in an executor block, or None."""
    if isinstance(block, _ExecutorFields):
        return block.model_dump()["name"]
    block = in_long_form(block)
    return block.get("name") if isinstance(block, dict) else None


def refuse_moved_blocks(runtime: Any) -> Any:
    """Return the block ``runtime``; raise ``ValueError`` for the blocks ``slurm`` and ``ray``, which are executors."""
    for name in ("slurm", "ray"):
        if isinstance(runtime, dict) and name in runtime:
            block = runtime[name] if isinstance(runtime[name], dict) else {}
            fields = ", ".join([f"name: {name}", *(f"{field}: …" for field in block)])
            raise ValueError(f"'{name}' is an executor. Write `executor: {{{fields}}}`, and leave `{name}` out.")
    return runtime


__all__ = ["Executor", "LocalExecutor", "RayExecutor", "SamplersConfig", "SlurmExecutor"]
