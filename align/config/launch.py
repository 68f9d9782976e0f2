"""``launch``: over how many processes, and how, a stage is trained; and where in them this process stands. Torch-free.

Left out: starting them (``launcher.py``), and what each strategy does to a model (``align.training.sharding``).
"""

from __future__ import annotations

import os
from typing import Literal

from pydantic import Field, field_validator

from align.config.base import Config


class FsdpConfig(Config):
    """FSDP2: every process holds a part of weights, gradients and optimizer (torch's ``fully_shard``)."""

    reshard_after_forward: bool = True
    """Give a layer's gathered weights up after its forward pass and gather them again for the backward pass (ZeRO-3).
    False keeps them in between: faster, for a whole copy of the weights (ZeRO-2)."""
    offload: bool = False
    """Keep the parts in the CPU's memory and do the optimizer's step there; for GPUs that they do not fit."""


class DeepspeedConfig(Config):
    """DeepSpeed's ZeRO, by transformers' and accelerate's integration; needs the extra ``deepspeed``."""

    stage: Literal[1, 2, 3] = 2
    """What is shared out: optimizer state (1), gradients too (2), weights too (3)."""
    offload_optimizer: bool = False
    """Keep the optimizer's state in the CPU's memory, and do its step there."""
    offload_parameters: bool = False
    """Keep the weights in the CPU's memory too; stage 3 alone."""


class LaunchConfig(Config):
    """Processes of a stage that trains. Batch sizes and losses are those of all processes together."""

    processes: int | Literal["auto"] = Field(1)
    """Processes on each node; ``auto`` takes one for each GPU, and one where there is none."""
    nodes: int = Field(1, ge=1)
    """Machines; each runs the stage's command line once (docs/distributed.md)."""
    rendezvous: str | None = Field(None, pattern=r"^[A-Za-z0-9._-]+:[0-9]{1,5}$")
    """Of several nodes, where they meet: a name of the first one and a free port there, ``node1:29500``; ``--on slurm``
    sets it itself."""
    strategy: Literal["ddp", "fsdp2", "deepspeed"] = "ddp"
    """``ddp``: a whole model in each process. ``fsdp2``, ``deepspeed``: each holds a part of what training needs."""
    fsdp: FsdpConfig = FsdpConfig()
    """What of ``fsdp2`` is other than usual."""
    deepspeed: DeepspeedConfig = DeepspeedConfig()
    """What of ``deepspeed`` is other than usual."""
    timeout: float = Field(1800, gt=0)
    """Seconds that a process may wait for the others; then the stage fails, says who waited, and can be resumed."""

    @field_validator("processes")
    @classmethod
    def _at_least_one(cls, processes: int | str) -> int | str:
        if isinstance(processes, int) and processes < 1:
            raise ValueError(f"should be at least 1, or auto; found {processes}.")
        return processes

    def objection(self) -> str | None:
        """What does not go together, once a stage's own fields and the run's are one block."""
        if self.fsdp != FsdpConfig() and self.strategy != "fsdp2":
            return f"fsdp is read with `strategy: fsdp2` only; here it is {self.strategy}."
        if self.deepspeed != DeepspeedConfig() and self.strategy != "deepspeed":
            return f"deepspeed is read with `strategy: deepspeed` only; here it is {self.strategy}."
        if self.deepspeed.offload_parameters and self.deepspeed.stage != 3:
            return f"deepspeed.offload_parameters needs stage 3; it is {self.deepspeed.stage}."
        return None

    def nowhere_to_meet(self) -> str | None:
        """What is missing where the run itself does not choose the nodes, as it does under Slurm."""
        if self.nodes == 1 or self.rendezvous is not None:
            return None
        return (
            f"nodes is {self.nodes}, and they need to know where to meet: set rendezvous to the first node's name and "
            "a free port, such as node1:29500. `align run --on slurm` starts them on all nodes and sets it itself."
        )

    @property
    def known(self) -> int | None:
        """Processes in all, None where only the machine that runs it knows."""
        return None if self.processes == "auto" else self.processes * self.nodes


def rank() -> int:
    """This process's number among those of its stage, 0 where it is the only one."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Processes of this stage."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """This process's number among those of its stage on this machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_size() -> int:
    """Processes of this stage on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))


RANKS = "ranks"
"""Folder beside a stage's checkpoints with what each of its processes left: result, log, process id."""
PARENT = "ALIGN_LAUNCHER_PID"
"""Environment variable with the process that a rank ends with."""
BY_SRUN = "ALIGN_BY_SRUN"
"""Environment variable of a stage's process that srun started on each node: its parent is not the runner."""
NODE = "ALIGN_NODE_RANK"
"""Environment variable with the number of this node; Slurm's is read too."""
LOST, LATE = "lost", "late"
"""Why a rank failed where the fault is another's: it went away, or did not answer in time."""
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
    """Whether this is the first node's launcher, which the runner started and which writes the stage's result."""
    return int(os.environ.get(NODE) or os.environ.get("SLURM_NODEID") or 0) == 0


def symptom(error: BaseException) -> str | None:
    """``LOST`` or ``LATE`` where an exception out of torch.distributed only says what became of another rank."""
    text = str(error).lower()
    if not any(word in text for word in ("gloo", "nccl", "process group", "c10d", "tcpstore", "recv", "peer")):
        return None
    return next((name for name, words in SYMPTOMS.items() if any(word in text for word in words)), None)
