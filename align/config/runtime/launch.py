"""``launch``: the processes of a stage that trains, and the rank of this process among them. Torch-free.

``align.runner.ranks`` starts the processes; ``align.models.checkpoints.sharding`` applies the strategies to a model.
"""

from __future__ import annotations

import os
from typing import Literal

from pydantic import Field, field_validator

from align.config.base import Config


class FsdpConfig(Config):
    """FSDP2: every process holds a shard of weights, gradients and optimizer state (torch's ``fully_shard``)."""

    reshard_after_forward: bool = True
    """Free a layer's gathered weights after its forward pass and gather them again for the backward pass (ZeRO-3).
    False keeps them in between (ZeRO-2): faster, but needs memory for a full copy of the weights."""
    offload: bool = False
    """Keep the shards in the CPU's memory and run the optimizer step there; for GPUs with too little memory."""


class DeepspeedConfig(Config):
    """DeepSpeed's ZeRO, through transformers and accelerate; needs the extra ``deepspeed``."""

    stage: Literal[1, 2, 3] = 2
    """Sharded state: optimizer state (1), also gradients (2), also weights (3)."""
    offload_optimizer: bool = False
    """Keep the optimizer state in the CPU's memory, and run its step there."""
    offload_parameters: bool = False
    """Also keep the weights in the CPU's memory; stage 3 only."""


class LaunchConfig(Config):
    """Processes of a stage that trains. Batch sizes and losses count all processes together."""

    processes: int | Literal["auto"] = Field(1)
    """Processes per node; ``auto`` starts one per GPU, or one without GPUs."""
    nodes: int = Field(1, ge=1)
    """Number of nodes; each runs the stage's command line once (docs/distributed.md)."""
    rendezvous: str | None = Field(None, pattern=r"^[A-Za-z0-9._-]+:[0-9]{1,5}$")
    """Host name of the first of several nodes with a free port, ``node1:29500``; ``executor: slurm`` sets it itself."""
    strategy: Literal["ddp", "fsdp2", "deepspeed"] = "ddp"
    """``ddp``: a full model in each process. ``fsdp2``, ``deepspeed``: each process holds a shard."""
    fsdp: FsdpConfig = FsdpConfig()
    """Options of ``fsdp2``."""
    deepspeed: DeepspeedConfig = DeepspeedConfig()
    """Options of ``deepspeed``."""
    timeout: float = Field(1800, gt=0)
    """Seconds that a process waits for the others. Then the stage fails, names the waiting rank, and can be resumed."""

    @field_validator("processes")
    @classmethod
    def _check_processes(cls, processes: int | str) -> int | str:
        if isinstance(processes, int) and processes < 1:
            raise ValueError(f"should be at least 1, or auto; found {processes}.")
        return processes

    def objection(self) -> str | None:
        """Return why the options contradict each other, or None."""
        if self.fsdp != FsdpConfig() and self.strategy != "fsdp2":
            return f"fsdp is used with `strategy: fsdp2` only; it is {self.strategy}."
        if self.deepspeed != DeepspeedConfig() and self.strategy != "deepspeed":
            return f"deepspeed is used with `strategy: deepspeed` only; it is {self.strategy}."
        if self.deepspeed.offload_parameters and self.deepspeed.stage != 3:
            return f"deepspeed.offload_parameters needs stage 3; it is {self.deepspeed.stage}."
        return None

    def nowhere_to_meet(self) -> str | None:
        """Return why the nodes cannot find each other without a scheduler, or None."""
        if self.nodes == 1 or self.rendezvous is not None:
            return None
        return (
            f"nodes is {self.nodes}, and they must find each other: set rendezvous to the first node's name and "
            "a free port, such as node1:29500. `align run --on slurm` starts them on all nodes and sets it itself."
        )

    @property
    def known(self) -> int | None:
        """Total number of processes; None if only the machine that runs the stage knows."""
        return None if self.processes == "auto" else self.processes * self.nodes


def rank() -> int:
    """Return this process's rank in its stage, 0 for a single process."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Return the number of processes of this stage."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """Return this process's rank in its stage on this machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_size() -> int:
    """Return the number of processes of this stage on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))


RANKS = "ranks"
"""Folder next to a stage's checkpoints with each rank's result, log and process id."""
PARENT = "ALIGN_LAUNCHER_PID"
"""Environment variable with the id of the launcher; a rank exits when the launcher does."""
BY_SRUN = "ALIGN_BY_SRUN"
"""Environment variable of a stage's process that srun started: its parent is not the runner."""
NODE = "ALIGN_NODE_RANK"
"""Environment variable with this node's rank; Slurm's variable is also read."""
LOST = "lost"
LATE = "late"
"""Reasons of a failure that another rank caused: it exited, or did not answer in time."""
SYMPTOMS = {
    LATE: ("timed out", "timeout"),
    LOST: (
        "connection closed by peer",
        "connection reset by peer",
        "broken pipe",
        "socket is closed",
        "remote process",
    ),
}


def is_head() -> bool:
    """Return whether this is the first node's launcher, which writes the stage's result."""
    return int(os.environ.get(NODE) or os.environ.get("SLURM_NODEID") or 0) == 0


def symptom(error: BaseException) -> str | None:
    """Return ``LOST`` or ``LATE`` for an exception of torch.distributed that another rank caused, else None."""
    text = str(error).lower()
    # First make sure that the error is about communication at all: a ``timeout`` may come from anywhere.
    if not any(word in text for word in ("gloo", "nccl", "process group", "c10d", "tcpstore", "recv", "peer")):
        return None
    return next((name for name, words in SYMPTOMS.items() if any(word in text for word in words)), None)
