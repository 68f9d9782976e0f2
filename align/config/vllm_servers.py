"""Which vLLM servers sample instead of the stage's own process: the block ``runtime.rollouts``. Torch-free."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, field_validator

from align.config.base import Config
from align.errors import redact

ADDRESS = re.compile(r"^(http://[A-Za-z0-9._-]+(:[0-9]{1,5})?/?|unix:/[^\s\x00]+)$")
MOVED = ("address", "weights", "weights_folder")
"""Fields that ``runtime.engine`` once had for its one server."""


class RolloutsConfig(Config):
    """vLLM servers that sample, score and answer for a stage; none: it samples in its own process."""

    servers: int = Field(0, ge=0, le=1024)
    """Servers that a stage starts on this machine, each on a Unix socket of its own, and ends with it."""
    addresses: list[str] = Field([])
    """Servers that run already, http://127.0.0.1:8000 or unix:/run/vllm.sock, instead of ``servers``; they go on
    afterwards."""
    key_variable: str = Field("ALIGN_SERVER_KEY", pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    """Environment variable that holds the key of the servers at ``addresses``; the key itself is never written."""
    tensor_parallel: int = Field(1, ge=1, le=64)
    """GPUs (processes, on a CPU) that share the weights of one of ``servers``."""
    gpus: list[int] | None = None
    """GPUs of ``servers``, ``tensor_parallel`` each, as CUDA counts them; null takes those behind the trainer's."""
    weights: Literal["folder", "nccl"] = "folder"
    """How servers get new ones: from a folder, or from the trainer's GPU to theirs, which must be others."""
    weights_folder: str | None = None
    """Folder that servers read new weights from, under the same path as here; null takes a temporary one."""
    restarts: int = Field(3, ge=0, le=100)
    """Times that a server may be lost: started anew, or asked again once it answers. Then the stage goes on without."""

    @property
    def pooled(self) -> bool:
        """Whether servers sample at all."""
        return self.servers > 0 or bool(self.addresses)

    @field_validator("addresses", mode="before")
    @classmethod
    def _one_or_several(cls, given: Any) -> Any:
        return [given] if isinstance(given, str) else given

    @field_validator("addresses")
    @classmethod
    def _are_addresses(cls, given: list[str]) -> list[str]:
        for one in given:
            if not ADDRESS.match(one):
                raise ValueError(f"'{redact(one)}' is no address of a vLLM server; write http://127.0.0.1:8000")
        bare = [one.rstrip("/") for one in given]
        twice = sorted({one for one in bare if bare.count(one) > 1})
        if twice:
            raise ValueError(f"{twice[0]} stands there twice")
        return bare

    def refuse_unfit(self) -> None:
        """Raise ``ValueError`` for fields that do not go together; a stage's own block may hold a part of them."""
        if self.servers and self.addresses:
            raise ValueError("servers are started, addresses are those of servers that run already; give one of them.")
        if self.addresses and (self.tensor_parallel > 1 or self.gpus is not None):
            raise ValueError(
                "tensor_parallel and gpus are of `servers` that a stage starts; those at `addresses` have their own."
            )
        settings = self.weights == "nccl" or self.weights_folder is not None or self.tensor_parallel > 1
        if not self.pooled and (settings or self.gpus is not None):
            raise ValueError("no server is named: write `servers: 2`, or `addresses: [http://127.0.0.1:8000]`.")
        if self.gpus is not None and len(set(self.gpus)) != self.servers * self.tensor_parallel:
            raise ValueError(
                f"gpus names {len(set(self.gpus))} GPUs; {self.servers} servers of {self.tensor_parallel} each need "
                f"{self.servers * self.tensor_parallel}."
            )

    def gpus_of(self, server: int, there: int, trainers: int = 1) -> list[int]:
        """GPUs of one of ``servers`` on a machine that has ``there`` of them, of which ``trainers`` take the first.

        Where there are too few to leave the trainers theirs, servers share them by turns.
        """
        size = self.tensor_parallel
        if self.gpus is not None:
            return self.gpus[server * size : (server + 1) * size]
        first = trainers if there >= trainers + self.servers * size else 0
        return [(first + server * size + at) % max(there, 1) for at in range(size)]


def refuse_moved(given: Any) -> Any:
    """Raise ``ValueError`` where ``runtime.engine`` says what ``runtime.rollouts`` says now; else return it."""
    if not isinstance(given, dict):
        return given
    named = given.get("name") == "vllm-server"
    found = {name: given[name] for name in MOVED if given.get(name) is not None}
    if not named and not found:
        return given
    place = {"addresses": [found.pop("address")]} if "address" in found else {"servers": 1}
    block = ", ".join(f"{name}: {value}" for name, value in {**place, **found}.items()).replace("'", "")
    left_out = [*(["name: vllm-server"] if named else []), *(name for name in MOVED if name in given)]
    raise ValueError(
        f"servers of vLLM have a block of their own. Write `runtime: {{rollouts: {{{block}}}}}`, and leave "
        f"{', '.join(left_out)} out of engine."
    )
