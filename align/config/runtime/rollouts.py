"""The block ``runtime.rollouts``: vLLM servers that sample, and the batch sizes of sampling and scoring. Torch-free."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, field_validator

from align.config.base import Config
from align.errors import redact

ADDRESS = re.compile(r"^(http://[A-Za-z0-9._-]+(:[0-9]{1,5})?/?|unix:/[^\s\x00]+)$")
MOVED = ("address", "weights", "weights_folder")
"""Fields for servers that belong in this block, not in ``runtime.engine``."""


class RolloutsConfig(Config):
    """vLLM servers that sample and score for a stage; without any it samples in its own process."""

    servers: int = Field(0, ge=0, le=1024)
    """Servers that a stage starts on this machine, each on its own Unix socket, and stops when it ends."""
    addresses: list[str] = Field([])
    """Running servers to use in place of ``servers``: http://127.0.0.1:8000 or unix:/run/vllm.sock. They keep
    running."""
    key_variable: str = Field("ALIGN_SERVER_KEY", pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    """Environment variable with the API key of the servers at ``addresses``; the key itself is never stored."""
    tensor_parallel: int = Field(1, ge=1, le=64)
    """GPUs (processes, on a CPU) that share the weights of each of ``servers``."""
    gpus: list[int] | None = None
    """GPUs of ``servers``, ``tensor_parallel`` each, in CUDA's order; null uses the GPUs after the trainer's."""
    weights: Literal["folder", "nccl"] = "folder"
    """Transfer of new weights to the servers: through a folder, or by NCCL from the trainer's GPU to other GPUs."""
    weights_folder: str | None = None
    """Folder that servers read new weights from, under the same path as here; null uses a temporary folder."""
    restarts: int = Field(3, ge=0, le=100)
    """Restarts of a lost server, or retries of a server at ``addresses``. After that the stage continues without it."""

    @property
    def pooled(self) -> bool:
        """True if servers sample."""
        return self.servers > 0 or bool(self.addresses)

    @field_validator("addresses", mode="before")
    @classmethod
    def _to_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("addresses")
    @classmethod
    def _check_addresses(cls, addresses: list[str]) -> list[str]:
        for address in addresses:
            if not ADDRESS.match(address):
                raise ValueError(f"'{redact(address)}' is not an address of a vLLM server; write http://127.0.0.1:8000")
        bare = [address.rstrip("/") for address in addresses]
        duplicates = sorted({address for address in bare if bare.count(address) > 1})
        if duplicates:
            raise ValueError(f"{duplicates[0]} is listed twice")
        return bare

    def objection(self) -> str | None:
        """Return why the fields contradict each other, or None.

        No validator, since a stage's overrides may hold only some of the fields.
        """
        if self.servers and self.addresses:
            return "servers are started by the stage, addresses name servers that run already; give one of them."
        if self.addresses and (self.tensor_parallel > 1 or self.gpus is not None):
            return "tensor_parallel and gpus are for `servers`, which a stage starts; `addresses` have their own."
        settings = self.weights == "nccl" or self.weights_folder is not None or self.tensor_parallel > 1
        if not self.pooled and (settings or self.gpus is not None):
            return "no server is named: write `servers: 2`, or `addresses: [http://127.0.0.1:8000]`."
        if self.gpus is not None and len(set(self.gpus)) < len(self.gpus):
            return "gpus names a GPU twice; each server needs its own GPUs."
        if self.gpus is not None and len(self.gpus) != self.servers * self.tensor_parallel:
            return (
                f"gpus names {len(self.gpus)} GPUs; {self.servers} servers of {self.tensor_parallel} each need "
                f"{self.servers * self.tensor_parallel}."
            )
        return None

    def gpus_of(self, server: int, available: int, trainers: int = 1) -> list[int]:
        """Return the GPUs of one server on a machine with ``available`` GPUs.

        Trainers use the first ``trainers`` of them. If there are too few for both, servers share GPUs with the
        trainers, round robin.
        """
        size = self.tensor_parallel
        if self.gpus is not None:
            return self.gpus[server * size : (server + 1) * size]
        # Behind the trainer's GPUs if there are enough; else servers share GPUs with it, going round.
        first = trainers if available >= trainers + self.servers * size else 0
        start = first + server * size
        return [(start + offset) % max(available, 1) for offset in range(size)]


def refuse_moved(engine: Any) -> Any:
    """Return the block ``runtime.engine``; raise ``ValueError`` for fields that belong in ``runtime.rollouts``."""
    if not isinstance(engine, dict):
        return engine
    is_server = engine.get("name") == "vllm-server"
    moved = {name: engine[name] for name in MOVED if engine.get(name) is not None}
    if not is_server and not moved:
        return engine
    place = {"addresses": [moved.pop("address")]} if "address" in moved else {"servers": 1}
    block = ", ".join(f"{name}: {value}" for name, value in {**place, **moved}.items()).replace("'", "")
    left_out = [*(["name: vllm-server"] if is_server else []), *(name for name in MOVED if name in engine)]
    raise ValueError(
        f"vLLM servers have their own block. Write `runtime: {{rollouts: {{{block}}}}}`, and leave "
        f"{', '.join(left_out)} out of engine."
    )


CPU_STEP_TOKENS = 8192
"""Most prompt tokens that vLLM reads in one step on a CPU; a longer prompt gets a separate step."""
SCORED_AT_ONCE = 32
"""Rows that a reward model reads at a time."""
SAMPLE_CHUNK = 128
"""Prompts that the stage ``sample`` answers between two writes: a killed stage repeats at most these."""
SYNTHESIS_CHUNK = 128
"""Requests that the stage ``synthesize`` answers between two writes: a killed stage repeats at most these."""
EPISODES_TOGETHER = 512
"""Episodes that are played at once: as many instances of an environment live at the same time."""
READ_TOKENS = 2048
"""Tokens, padding included, that an evaluation reads in one forward pass, or one longer row."""
