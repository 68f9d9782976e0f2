"""A vLLM server for users: OpenAI's routes on 127.0.0.1, for clients with its key.

The model folder has the chat template and the sampling defaults, which vLLM reads. ``server_guard.Guard`` refuses
requests without the key, of browsers, and to other names. Development routes, which change weights, are off. The key is
in a file that only this user may read; no command line and no log has it.
"""

from __future__ import annotations

import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from align.errors import StageFailed, UserError
from align.inference.server_guard import Guard, new_key, write_key
from align.inference.servers.server_client import POLL_SECONDS, Client
from align.inference.servers.server_process import MODULE, LocalServer, free_port

ADDRESS = "127.0.0.1"
VARIABLES = {"VLLM_SERVER_DEV_MODE": "0", "VLLM_LOGGING_LEVEL": "INFO"}
HEALTH_SECONDS = 10.0
"""Time that the server has to answer a question about its health."""
CPU_CACHE_GB = 1.0
"""GiB for keys and values on a CPU."""


@dataclass(frozen=True)
class ServedModel:
    """A model that a server serves, with its settings."""

    folder: Path
    name: str
    """Name of the model in requests."""
    adapters: dict[str, Path] = field(default_factory=dict)
    """Further names → folders of LoRA adapters of this model."""
    largest_rank: int = 16
    dtype: str = "auto"
    max_length: int | None = None
    """Tokens of a conversation; None for what the model allows."""
    reasoning_parser: str | None = None
    is_on_cpu: bool = False
    cpu_cache_gb: float = CPU_CACHE_GB
    options: tuple[str, ...] = ()
    """Further options of vLLM."""

    def command(self, port: int) -> list[str]:
        """Return the command that starts the server."""
        command = [sys.executable, "-m", MODULE, "--host", ADDRESS, "--port", str(port)]
        command += ["--model", str(self.folder), "--served-model-name", self.name, "--dtype", self.dtype]
        # The checkpoint's own sampling defaults, from its generation_config.json.
        command += ["--generation-config", "auto", "--middleware", f"{Guard.__module__}.{Guard.__name__}"]
        if self.max_length is not None:
            command += ["--max-model-len", str(self.max_length)]
        if self.reasoning_parser is not None:
            command += ["--reasoning-parser", self.reasoning_parser]
        if self.adapters:
            command += ["--enable-lora", "--max-lora-rank", str(self.largest_rank)]
            command += ["--max-loras", str(min(len(self.adapters), 4)), "--lora-modules"]
            command += [f"{name}={folder}" for name, folder in self.adapters.items()]
        if self.is_on_cpu:
            # vLLM's compiler takes minutes on a CPU.
            command += ["--enforce-eager", "--block-size", "32"]
            command += ["--kv-cache-memory-bytes", str(int(self.cpu_cache_gb * 2**30))]
        return [*command, *self.options]


class OpenAiServer:
    """A running server. A context manager: leaving it ends the server and removes its files."""

    def __init__(self, model: ServedModel, port: int | None = None) -> None:
        """Start a server at ``port``, or at a free port. Raises ``UserError`` for a port that is in use."""
        self.model = model
        self.port = _require_free(port) if port else free_port()
        self.key = new_key()
        self.folder = Path(tempfile.mkdtemp(prefix="align-serve-"))  # mkdtemp makes it for this user only
        key_file = self.folder / "server.key"
        write_key(self.key, key_file)
        variables = dict(VARIABLES)
        self.server = LocalServer(model.command(self.port), [self.folder], key_file=key_file, variables=variables)
        self.client = Client(f"http://{ADDRESS}:{self.port}", HEALTH_SECONDS, self.key, self.server)
        self._shown = 0

    @property
    def address(self) -> str:
        """Base URL for OpenAI clients."""
        return f"http://{ADDRESS}:{self.port}/v1"

    def __enter__(self) -> OpenAiServer:
        return self

    def __exit__(self, *error: object) -> None:
        self.server.end()
        shutil.rmtree(self.folder, ignore_errors=True)

    def wait(self, timeout: float, log: Callable[[str], object]) -> None:
        """Wait until the server answers, and log its lines. Raises ``StageFailed`` if it ends or does not answer."""
        began = time.monotonic()
        while self.client.health() != "answers":
            self.log_lines(log)
            seconds = time.monotonic() - began
            if self.client.has_exited():
                raise StageFailed(
                    f"the server {self.server.describe_exit(0)} before it answered.{self.server.log_tail()}"
                )
            if seconds > timeout:
                raise StageFailed(
                    f"the server did not answer within {timeout:g} s (--timeout).{self.server.log_tail()}"
                )
            time.sleep(POLL_SECONDS)

    def follow(self, log: Callable[[str], object]) -> None:
        """Log the server's lines until it ends. Raises ``StageFailed``: a server ends only by a fault or a signal."""
        while not self.client.has_exited():
            self.log_lines(log)
            time.sleep(POLL_SECONDS)
        self.log_lines(log)
        raise StageFailed(f"the server {self.server.describe_exit(0)}.{self.server.log_tail()}")

    def log_lines(self, log: Callable[[str], object]) -> None:
        """Log the whole lines that the server has written since the last call."""
        with self.server.log.open("rb") as file:
            file.seek(self._shown)
            text = file.read()
        lines = text[: text.rfind(b"\n") + 1]
        self._shown += len(lines)
        for line in lines.decode("utf-8", "replace").splitlines():
            log(line)


def _require_free(port: int) -> int:
    with socket.socket() as attempt:
        attempt.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            attempt.bind((ADDRESS, port))
        except OSError as error:
            raise UserError(
                f"--port {port}: {error.strerror or error}; name another, or none for a free one."
            ) from None
    return port
