"""A vLLM server's process on this machine: its start, and the end of its whole group, however this process ends."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from align.config.runtime.launch import local_size
from align.config.runtime.rollouts import RolloutsConfig
from align.errors import UserError
from align.inference.server_guard import HOSTS, KEY, KEY_FILE, new_key, write_key
from align.inference.servers.server_client import POLL_SECONDS, UNIX, Client, EngineLost
from align.pipeline.process_limits import usable_cores, waiting_beside

MODULE = "vllm.entrypoints.openai.api_server"
"""Module behind ``vllm serve``; that command itself does not start from the CPU build."""
BINDING = "VLLM_CPU_OMP_THREADS_BIND"
"""Variable that binds vLLM's worker processes on a CPU to cores."""
GRACE_SECONDS = 20.0
"""Time that a server, and then its workers, have to end after SIGTERM."""
MAX_SOCKET_PATH = 100
"""Bytes of a Unix socket's path; the system allows 107."""

GUARD = """
import os, shutil, signal, subprocess, sys, time
parent, folders, grace = int(sys.argv[1]), sys.argv[2].split(os.pathsep), float(sys.argv[3])
stopping = []
# 1. Wait until the server has ended, the run that started it is gone, or the run asks for the end.
signal.signal(signal.SIGTERM, lambda *_: stopping.append(True))
server = subprocess.Popen(sys.argv[4:])
while server.poll() is None and os.getppid() == parent and not stopping:
    time.sleep(0.1)
# 2. End the server in order, then all that it has left in this process group.
if server.poll() is None:
    server.terminate()
    try:
        server.wait(grace)
    except subprocess.TimeoutExpired:
        pass
os.killpg(0, signal.SIGTERM)
# 3. A run that is gone cannot kill what remains, nor remove the folders.
if os.getppid() != parent:
    time.sleep(1)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    os.killpg(0, signal.SIGKILL)
# 4. Pass the exit code on, a signal as shells write it.
code = server.poll()
if code is None:
    sys.exit(1)
sys.exit(code if code >= 0 else 128 - code)
"""
"""Program between this process and the server. It ends the server when this process is gone, for whatever reason: vLLM
only leaves its engine and worker processes behind when its API process is killed."""


@dataclass(frozen=True)
class Placement:
    """Cores and GPUs of this machine that a server may use."""

    threads: int | None = None
    """Threads of each of its processes that computes on CPU cores; None leaves the default."""
    gpus: tuple[int, ...] = ()
    """GPU numbers as this process counts them; none leaves it all that this process sees."""

    @classmethod
    def of(cls, pool: RolloutsConfig, number: int, device: str) -> Placement:
        """Return the placement of server ``number``: its share of the cores, or its GPUs. Raises ``UserError``."""
        if device == "cpu":
            # use_threads() has set the variable to this process's share of the cores.
            cores = int(os.environ.get("OMP_NUM_THREADS") or usable_cores())
            return cls(threads=max(1, cores // (pool.servers * pool.tensor_parallel)))
        import torch

        gpu_count = torch.cuda.device_count()
        gpus = pool.gpus_of(number, gpu_count, local_size())
        if max(gpus) >= gpu_count or len(set(gpus)) < len(gpus):
            raise UserError(
                f"runtime.rollouts: server {number + 1} of {pool.servers} would have GPUs {gpus} (tensor_parallel "
                f"{pool.tensor_parallel}), and there are {gpu_count}. Lower servers or tensor_parallel, or name gpus."
            )
        return cls(gpus=tuple(gpus))


class LocalServer:
    """A server process that belongs to this one: it ends with ``end``, and with this process."""

    def __init__(
        self,
        command: list[str],
        folders: list[Path],
        placement: Placement | None = None,
        key_file: Path | None = None,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        """Start ``command``. Its log and temporary files go to the first folder.

        All ``folders`` are removed if this process is killed. ``key_file`` holds the server's key
        (``server_guard.py``). ``variables`` of the environment override the others.
        """
        self.log = folders[0] / "server.log"
        self._ended = False
        self._key_file = key_file
        # Isolated mode: the guard must start whatever the working directory or PYTHONPATH holds.
        guard = [sys.executable, "-I", "-c", GUARD, str(os.getpid()), os.pathsep.join(map(str, folders))]
        guard.append(str(GRACE_SECONDS))
        with self.log.open("ab") as output:
            # Its own session, so the whole group can be ended. The guard ends it when this process is gone.
            self.process = subprocess.Popen(
                [*guard, *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**_environment(folders[0], placement or Placement(), key_file), **(variables or {})},
                start_new_session=True,
            )

    def describe_exit(self, seconds: float) -> str:
        """Say whether the process is alive after so many seconds, or how it ended."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return f"(pid {self.process.pid}) is alive"
        number = -code if code < 0 else code - 128  # the guard's own signal, or the server's in a shell's notation
        with contextlib.suppress(ValueError):
            return f"was ended by {signal.Signals(number).name}"
        return f"ended with exit code {code}"

    def log_tail(self, lines: int = 12) -> str:
        """Return the end of its log as a sentence, or an empty string."""
        try:
            text = self.log.read_bytes()[-8192:].decode("utf-8", "replace").strip()
        except OSError:
            return ""
        return "\nThe end of its log:\n" + "\n".join(text.splitlines()[-lines:]) if text else ""

    def end(self) -> None:
        """End the process and its whole group: first by SIGTERM, which frees its shared memory, then by SIGKILL."""
        if self._ended:
            return
        self._ended = True
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(GRACE_SECONDS + 1)
        # Workers clean up for some seconds after a server that was killed.
        if not self._wait_for_group(GRACE_SECONDS):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self._wait_for_group(GRACE_SECONDS)
        self.process.wait()
        if self._key_file is not None and self._key_file.parent != self.log.parent:  # a folder for the socket only
            shutil.rmtree(self._key_file.parent, ignore_errors=True)

    def _wait_for_group(self, seconds: float) -> bool:
        """Wait until no process of the group is left, zombies aside. Returns False after ``seconds``."""
        deadline = time.monotonic() + seconds
        while any(_in_group(process, self.process.pid) for process in psutil.process_iter()):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True


def _in_group(process: psutil.Process, leader: int) -> bool:
    try:
        return os.getpgid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE
    except (ProcessLookupError, psutil.NoSuchProcess):
        return False


# In-process engines set the first, without which no server starts. The server has its own key. It is no rank of
# what a launcher started.
_DROPPED_VARIABLES = frozenset(
    (
        *("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_API_KEY", KEY, KEY_FILE, HOSTS),
        *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    )
)
_DROPPED_PREFIXES = ("TORCHELASTIC_", "GROUP_", "ROLE_")


def _environment(folder: Path, placement: Placement, key_file: Path | None) -> dict[str, str]:
    """Return the environment of a server: defaults, then the user's own values, then what the engine depends on."""
    defaults = {
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        # Bound to cores, vLLM's CPU worker leaves one to the scheduler, which hardly uses it: half of a small machine.
        BINDING: "nobind",
    }
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in _DROPPED_VARIABLES and not name.startswith(_DROPPED_PREFIXES)
    }
    # Server and stage may compute at once, and only a single process may spin.
    required = {"VLLM_SERVER_DEV_MODE": "1", "TMPDIR": str(folder), **waiting_beside(inherited)}
    if placement.threads is not None:
        required["OMP_NUM_THREADS"] = str(placement.threads)
    if placement.gpus:
        required["CUDA_VISIBLE_DEVICES"] = ",".join(_device_names(placement.gpus))
    if key_file is not None:
        required[KEY_FILE] = str(key_file)
    return {**defaults, **inherited, **required}


def _device_names(gpus: tuple[int, ...]) -> list[str]:
    """Return the names of GPUs that this process counts from 0, as its own CUDA_VISIBLE_DEVICES has them."""
    # A launcher may have given this process some of the GPUs; the server counts from 0 among those.
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return [visible[gpu] for gpu in gpus] if visible else [str(gpu) for gpu in gpus]


def socket_folder(folder: Path) -> Path:
    """Return a folder that only this user may enter, short enough for a socket's path: ``folder``, or a new one."""
    if len(os.fsencode(folder)) < MAX_SOCKET_PATH - len("/server.sock"):
        return folder
    return Path(tempfile.mkdtemp(prefix="align-", dir="/tmp"))  # mkdtemp makes it for this user only


def free_port(address: str = "127.0.0.1") -> int:
    """Return a port of this machine that is free just now. Raises ``OSError`` when there is none."""
    with socket.socket() as free:
        free.bind((address, 0))
        return int(free.getsockname()[1])


@dataclass(frozen=True)
class ServerLaunch:
    """Everything that the start of a server needs."""

    model_dir: Path
    options: list[str]
    """vLLM's command-line options."""
    seed: int
    timeout: float
    """Seconds until it must answer, and of each later call."""
    folders: list[Path]
    """The first has its log, its socket and its temporary files; all are removed if this process is killed."""
    placement: Placement | None = None


def start_server(launch: ServerLaunch, cancelled: threading.Event | None = None) -> Client:
    """Start a server that only this user's processes can reach, and wait until it answers.

    It listens at a Unix socket in a folder that is closed to others, so no other user and no web page can open a
    connection, nor replace it at a port. It also has a key for its lifetime, in a file next to the socket: command
    lines, logs and records do not show it.

    Raises ``EngineLost`` with the end of its log when it ends, when it does not answer within ``launch.timeout``
    seconds, or when ``cancelled`` is set.
    """
    closed = socket_folder(launch.folders[0])
    folders = launch.folders if closed in launch.folders else [*launch.folders, closed]
    path = closed / "server.sock"
    key_file = closed / "server.key"
    # Both live only as long as the server; no other process needs them.
    key = new_key()
    write_key(key, key_file)
    command = [sys.executable, "-m", MODULE, "--uds", str(path), "--model", str(launch.model_dir)]
    command += [*launch.options, "--seed", str(launch.seed % 2**32)]
    command += ["--uvicorn-log-level", "warning", "--disable-uvicorn-access-log"]
    command.append("--skip-tokenizer-init")  # tokens go in and out as ids; turning them into text took a third of it
    server = LocalServer(command, folders, launch.placement, key_file)
    client = Client(f"{UNIX}{path}", launch.timeout, key, server)
    try:
        _await_start(client, launch.timeout, cancelled)
    except BaseException:
        server.end()
        raise
    return client


def _await_start(client: Client, timeout: float, cancelled: threading.Event | None) -> None:
    """Wait until a server answers. Raises as ``start_server``."""
    began = time.monotonic()
    # Loading weights, and compiling where that is on, needs from seconds to minutes.
    while client.health() != "answers":
        if cancelled is not None and cancelled.is_set():
            raise EngineLost(f"the vLLM server at {client.address} is no longer needed")
        seconds = time.monotonic() - began
        if client.has_exited() or seconds > timeout:
            raise EngineLost(
                f"the vLLM server at {client.address} was not ready after {seconds:.0f} s of at most {timeout:g} "
                f"(runtime.engine.timeout). {client.state()}"
            )
        time.sleep(POLL_SECONDS)
