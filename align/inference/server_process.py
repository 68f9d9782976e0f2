"""A vLLM server's process on this machine: started, waited for, and ended with its group, however this one ends."""

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
from dataclasses import dataclass
from pathlib import Path

import psutil

from align.config.launch import local_size
from align.config.vllm_servers import RolloutsConfig
from align.errors import UserError
from align.inference.server_client import POLL_SECONDS, UNIX, Client, EngineLost
from align.inference.server_guard import HOSTS, KEY, KEY_FILE, new_key, write_key

MODULE = "vllm.entrypoints.openai.api_server"
"""What ``vllm serve`` runs; that command itself does not start from the CPU build."""
GRACE_SECONDS = 20.0
MOST_PATH = 100
"""Bytes of a Unix socket's path; the system allows 107."""

GUARD = """
import os, shutil, signal, subprocess, sys, time
parent, folders, grace, stopping = int(sys.argv[1]), sys.argv[2].split(os.pathsep), float(sys.argv[3]), []
signal.signal(signal.SIGTERM, lambda *_: stopping.append(True))
server = subprocess.Popen(sys.argv[4:])
while server.poll() is None and os.getppid() == parent and not stopping:
    time.sleep(0.1)
if server.poll() is None:
    server.terminate()
    try:
        server.wait(grace)
    except subprocess.TimeoutExpired:
        pass
os.killpg(0, signal.SIGTERM)
if os.getppid() != parent:
    time.sleep(1)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    os.killpg(0, signal.SIGKILL)
code = server.poll()
sys.exit(1 if code is None else code if code >= 0 else 128 - code)
"""
"""Program between this process and the server: ends the server when this process is gone, however it went. vLLM alone
leaves its engine and worker processes behind when its API process is killed."""


@dataclass(frozen=True)
class Place:
    """What of this machine a server may use."""

    threads: int | None = None
    """Of each of its processes that computes on CPU cores; None leaves it as it is."""
    gpus: tuple[int, ...] = ()
    """As this process counts them; none leaves it all that this process sees."""

    @classmethod
    def of(cls, pool: RolloutsConfig, number: int, device: str) -> Place:
        """The place of server ``number``: GPUs of its own, or its share of the cores. Raises ``UserError``."""
        if device == "cpu":
            cores = int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))
            return cls(threads=max(1, cores // (pool.servers * pool.tensor_parallel)))
        import torch

        there = torch.cuda.device_count()
        gpus = pool.gpus_of(number, there, local_size())
        if max(gpus) >= there or len(set(gpus)) < len(gpus):
            raise UserError(
                f"runtime.rollouts: server {number + 1} of {pool.servers} would have GPUs {gpus} (tensor_parallel "
                f"{pool.tensor_parallel}), and there are {there}. Lower servers or tensor_parallel, or name gpus."
            )
        return cls(gpus=tuple(gpus))


class LocalServer:
    """A server process that belongs to this one: it ends with ``end``, and with this process."""

    def __init__(
        self, command: list[str], folders: list[Path], place: Place | None = None, key_file: Path | None = None
    ) -> None:
        """Start ``command``. Its log and temporary files go to the first folder; all go if this process is killed.

        ``key_file`` holds what a client must know (``server_guard.py``).
        """
        self.log, self._ended, self._key_file = folders[0] / "server.log", False, key_file
        guard = [sys.executable, "-I", "-c", GUARD, str(os.getpid()), os.pathsep.join(map(str, folders))]
        guard.append(str(GRACE_SECONDS))
        with self.log.open("ab") as output:
            # A session of its own, so that the whole group can be ended; the guard sees to it that none outlives us.
            self.process = subprocess.Popen(
                [*guard, *command], stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                env=_environment(folders[0], place or Place(), key_file), start_new_session=True,
            )  # fmt: skip

    def life(self) -> str:
        """Whether the process is alive, in words."""
        try:
            code = self.process.wait(2 * POLL_SECONDS)  # a connection breaks before the process that broke it is gone
        except subprocess.TimeoutExpired:
            return f"(pid {self.process.pid}) is alive"
        number = -code if code < 0 else code - 128  # the guard's own signal, or the server's as shells tell it
        with contextlib.suppress(ValueError):
            return f"was ended by {signal.Signals(number).name}"
        return f"ended with exit code {code}"

    def last_words(self, lines: int = 12) -> str:
        """The end of its log, as a sentence, or nothing."""
        with contextlib.suppress(OSError):
            text = self.log.read_bytes()[-8192:].decode("utf-8", "replace").strip()
            return "\nThe end of its log:\n" + "\n".join(text.splitlines()[-lines:]) if text else ""
        return ""

    def end(self) -> None:
        """End the process and its whole group: politely, which frees its shared memory, then not."""
        if self._ended:
            return
        self._ended = True
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(GRACE_SECONDS + 1)
        if not self._gone_within(GRACE_SECONDS):  # workers clean up for some seconds after a server that was killed
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self._gone_within(GRACE_SECONDS)
        self.process.wait()
        if self._key_file is not None and self._key_file.parent != self.log.parent:  # a folder for the socket alone
            shutil.rmtree(self._key_file.parent, ignore_errors=True)

    def _gone_within(self, seconds: float) -> bool:
        """Wait until no process of the group is left, those aside that only wait for their parent to look."""
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


def _environment(folder: Path, place: Place, key_file: Path | None) -> dict[str, str]:
    """Settings of the server's process; the user's own values win, except where the engine depends on them."""
    # The in-process engine sets the first, without which no server starts; the server has a key of its own; it is no
    # part of what a launcher started.
    dropped = {"VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_API_KEY", KEY, KEY_FILE, HOSTS}
    dropped |= {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in dropped and not name.startswith(("TORCHELASTIC_", "GROUP_", "ROLE_"))
    }
    quiet = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    # Bound to cores, vLLM's CPU worker leaves one to the scheduler, which hardly uses it: half of a small machine.
    quiet |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    if place.threads is not None:
        kept["OMP_NUM_THREADS"] = str(place.threads)
    if place.gpus:
        visible = [one for one in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if one]
        kept["CUDA_VISIBLE_DEVICES"] = ",".join(visible[gpu] if visible else str(gpu) for gpu in place.gpus)
    guarded = {} if key_file is None else {KEY_FILE: str(key_file)}
    return quiet | kept | guarded | {"VLLM_SERVER_DEV_MODE": "1", "TMPDIR": str(folder)}


def socket_folder(folder: Path) -> Path:
    """A folder that only this user may enter, with a path short enough for a socket in it: ``folder``, or a new one."""
    if len(os.fsencode(folder)) < MOST_PATH - len("/server.sock"):
        return folder
    return Path(tempfile.mkdtemp(prefix="align-", dir="/tmp"))  # mkdtemp makes it for this user alone


def free_port(address: str = "127.0.0.1") -> int:
    """A port of this machine that nobody listens at, just now. Raises ``OSError`` when there is none."""
    with socket.socket() as free:
        free.bind((address, 0))
        return int(free.getsockname()[1])


def start_server(
    model_dir: Path,
    options: list[str],
    seed: int,
    timeout: float,
    folders: list[Path],
    place: Place | None = None,
    given_up: threading.Event | None = None,
) -> Client:
    """Start a server that only this user's processes can reach, and wait until it answers.

    It listens at a Unix socket in a folder that is closed to others, so that no other user and no web page can open a
    connection, nor take its place at a port. It has a key of its own on top, for its life, in a file beside the socket:
    command lines, logs and records do not show it.

    Raises ``EngineLost`` with the end of its log when it ends, or does not answer within ``timeout`` seconds, or
    ``given_up`` is set.
    """
    closed = socket_folder(folders[0])
    if closed not in folders:
        folders = [*folders, closed]
    path, key, key_file = closed / "server.sock", new_key(), closed / "server.key"
    write_key(key, key_file)
    command = [sys.executable, "-m", MODULE, "--uds", str(path), "--model", str(model_dir)]
    command += [*options, "--seed", str(seed % 2**32), "--uvicorn-log-level", "warning", "--disable-uvicorn-access-log"]
    command.append("--skip-tokenizer-init")  # tokens go in and out as ids; turning them into text took a third of it
    server = LocalServer(command, folders, place, key_file)
    client = Client(f"{UNIX}{path}", timeout, key, server)
    began = time.monotonic()
    try:
        while client.health() != "answers":
            if given_up is not None and given_up.is_set():
                raise EngineLost(f"the vLLM server at {client.address} is needed no more")
            if server.process.poll() is not None or time.monotonic() - began > timeout:
                raise EngineLost(
                    f"the vLLM server at {client.address} was not ready after {time.monotonic() - began:.0f} s of at "
                    f"most {timeout:g} (runtime.engine.timeout). {client.state()}"
                )
            time.sleep(POLL_SECONDS)
    except BaseException:
        server.end()
        raise
    return client
