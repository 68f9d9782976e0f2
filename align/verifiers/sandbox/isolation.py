"""Sandboxes: how a process is isolated, the level that this machine offers, and the refusal if there is none.

A sandbox starts Python with the text of ``confined.py`` and of others. The process limits itself before it runs foreign
code, and its messages have limits of time and size. The levels:

``bubblewrap``: new namespaces without a network, an empty root with Python's standard library, read-only, and a small
``/tmp`` in memory.
``landlock``: no file but the standard library can be opened, and none written; needs no privileges.
``command``: a user's command, such as docker's.
``unsafe``: no isolation, by permission of the user.

The first two levels require the filter of system calls and limit the number of threads, for which root switches to
another user. ``command`` has the filter if the kernel allows it. All levels limit processor time, wall-clock time,
memory and output. Packages are hidden unless a user names them: a benchmark's solutions may be among them.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import importlib.util
import itertools
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from align.config.verifiers import SandboxConfig
from align.errors import StageFailed, UserError, shorten

Level = Literal["bubblewrap", "landlock", "command", "unsafe"]
OPTIONS = ("-P", "-s", "-S", "-c")
"""Python's options: no packages, no modules of the current folder, and a text as the program."""
PACKAGES = "/packages"
"""Folder of the packages that a program may import, inside bubblewrap."""
ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "HOME": "/tmp",  # noqa: S108 - inside the sandbox
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONUTF8": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
TMP_BYTES = 16 << 20
"""Size of ``/tmp`` inside bubblewrap, and of a file in it."""
FIRST_USER = 600_000_000
"""Number of a user that root switches to; such a user has no files and no processes."""
USERS = itertools.count(FIRST_USER + os.getpid() % 100_000 * 1000)
"""Another user for each process, since the limit of threads counts all threads of a user."""
MIB = 1 << 20
START_SECONDS = 120.0
"""Time until the limits are in force. It is not the program's."""
LINE = 1 << 16
CPU_EXIT = (-signal.SIGXCPU, 128 + signal.SIGXCPU)


class SandboxFailed(StageFailed):
    """The sandbox could not be started."""


class Session:
    """An isolated process and its descriptors. What it writes is hostile."""

    def __init__(self, process: subprocess.Popen[bytes], most_bytes: int, seconds: float) -> None:
        self.task: dict[str, Any] = {}
        """The limits, to which ``begin`` adds the work."""
        self._process = process
        self._most_bytes = most_bytes
        self._seconds = seconds
        self._deadline = time.monotonic() + START_SECONDS
        self._pending = b""
        assert process.stdin is not None and process.stdout is not None
        self._input = process.stdin.fileno()
        self._output = process.stdout.fileno()
        # A program that does not read must not block this process. ``send`` waits until the deadline at most.
        os.set_blocking(self._input, False)

    def begin(self, work: dict[str, Any]) -> None:
        """Send the work and wait until the limits are in force; from then on the time of the program counts.

        Raises ``SandboxFailed``.
        """
        self.send(self.task | work)
        if self.receive() != {}:
            self.kill()
            assert self._process.stderr is not None
            reason = self._process.stderr.read(LINE).decode(errors="replace").strip().splitlines()[-1:]
            raise SandboxFailed(f"the sandbox did not start: {shorten(reason[0]) if reason else 'it ended silently'}.")
        self._deadline = time.monotonic() + self._seconds

    def send(self, message: dict[str, Any]) -> bool:
        """Write a message; return False if the process ended or did not read it in time."""
        content = memoryview(json.dumps(message).encode() + b"\n")
        while content:
            if not self._wait(self._input, select.POLLOUT):
                return False
            try:
                content = content[os.write(self._input, content[:LINE]) :]
            except OSError:
                return False
        return True

    def receive(self) -> dict[str, Any] | None:
        """Return the next message; None if there is none in time, a longer one than allowed, or no JSON."""
        while b"\n" not in self._pending:
            if len(self._pending) > self._most_bytes or not self._read():
                return None
        line, _, self._pending = self._pending.partition(b"\n")
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            return None
        return message if isinstance(message, dict) else None

    def read_output(self) -> str | None:
        """Return all output of a program that ended with exit code 0 in time; None for any other."""
        while self._read():
            if len(self._pending) > self._most_bytes:
                self.kill()
                return None
        return self._pending.decode(errors="replace") if self.exit_code() == 0 else None

    def exit_code(self) -> int | None:
        """Return the exit code of a process that has closed its output; None if it did not end in time."""
        try:
            return self._process.wait(max(0.0, self._deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return None

    @property
    def is_over_time(self) -> bool:
        """True if the process has spent its wall-clock time or its processor time."""
        if time.monotonic() >= self._deadline:
            return True
        return self._process.poll() in CPU_EXIT

    def kill(self) -> None:
        """Kill the process with its group, and wait for its end."""
        # bubblewrap's death ends its process namespace.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    def close(self) -> None:
        """Kill the process and close all its descriptors."""
        self.kill()
        assert self._process.stderr is not None
        self._process.stderr.close()

    def _read(self) -> bool:
        """Read some output; return False at its end or at the limit of time."""
        if not self._wait(self._output, select.POLLIN):
            return False
        content = os.read(self._output, LINE)
        self._pending += content
        return bool(content)

    def _wait(self, descriptor: int, event: int) -> bool:
        poll = select.poll()
        poll.register(descriptor, event)
        remaining = self._deadline - time.monotonic()
        return remaining > 0 and bool(poll.poll(remaining * 1000))


@dataclass(frozen=True)
class Limits:
    """The limits of a program."""

    seconds: float = 5.0
    """Processor time. The wall-clock time is twice as long."""
    memory_mb: int = 512
    output: int = MIB
    """Bytes of its output, or of one result."""
    threads: int = 32
    """Threads of a program; no level allows another process."""


@dataclass(frozen=True)
class Sandbox:
    """A way to start isolated processes."""

    level: Level
    command: tuple[str, ...] = field(default=(), repr=False)
    packages: tuple[str, ...] = ()
    """Packages that programs and tests may import. With a command they are packages of its Python."""

    @contextlib.contextmanager
    def start(self, kind: str, limits: Limits) -> Iterator[Session]:
        """Start a process for a task of ``confined.py``; it is killed with its descendants at the end of the block.

        Raises ``SandboxFailed`` if it cannot be started.
        """
        before = list(self.command) if self.level != "bubblewrap" else _bubblewrap_with(self.packages)
        interpreter = "python3" if self.level == "command" else python()
        # The packages of a command's Python are at their usual place.
        options = [option for option in OPTIONS if option != "-S" or self.level != "command" or not self.packages]
        try:
            process = subprocess.Popen(
                [*before, interpreter, *options, confined_text(kind)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=dict(os.environ) if self.level == "command" else ENVIRONMENT,
                cwd="/",
                start_new_session=True,
            )
        except OSError as error:
            raise SandboxFailed(str(error)) from None
        session = Session(process, limits.output, 2 * limits.seconds)
        try:
            session.task = {
                "kind": kind,
                "level": self.level,
                # The kernel counts whole seconds, so round up.
                "cpu": max(1, -int(-limits.seconds // 1)),
                "memory": limits.memory_mb * MIB,
                "file_size": TMP_BYTES,
                "threads": limits.threads,
                "readable": readable_paths() + _package_paths(self.packages) if self.level == "landlock" else [],
                "writable": ["/dev/null"],
                "packages": self._importable_packages(),
                "user": next(USERS) if self.level in ("bubblewrap", "landlock") and os.geteuid() == 0 else None,
            }
            yield session
        finally:
            session.close()

    def _importable_packages(self) -> dict[str, str]:
        """Return the place of each package inside the sandbox."""
        if self.level == "command":
            return {}
        places = {name: package_place(name) for name in self.packages}
        if self.level != "bubblewrap":
            return places
        return {name: f"{PACKAGES}/{Path(place).name}" for name, place in places.items()}


@functools.cache
def confined_text(kind: str) -> str:
    """Return the program of a task of ``confined.py``: the texts of the files that it needs."""
    names = (
        ["limits", "remote", "harness", "grader", "confined"] if kind in ("grade", "check") else ["limits", "confined"]
    )
    texts = [Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8") for name in names]
    first = "from __future__ import annotations\n"  # which only the beginning of a text may have
    return first + "\n".join(text.replace(first, "", 1) for text in texts)


def is_installed(name: str) -> bool:
    """Return True for a package of this Python."""
    return importlib.util.find_spec(name) is not None


@functools.cache
def package_place(name: str) -> str:
    """Return the folder or the file of an installed package."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise SandboxFailed(f"the package {name} is not installed.")
    return str(Path(spec.origin).parent) if spec.submodule_search_locations else spec.origin


def _package_paths(packages: Sequence[str]) -> list[str]:
    """Return the places of packages, and of the libraries that wheels put next to them."""
    places = [package_place(name) for name in packages]
    return [path for place in places for path in (place, f"{place}.libs") if os.path.exists(path)]


def _bubblewrap_with(packages: Sequence[str]) -> list[str]:
    """Return the command before Python, which also shows packages."""
    binds = [("--ro-bind", path, f"{PACKAGES}/{Path(path).name}") for path in _package_paths(packages)]
    # bubblewrap's root is a file system in memory. A program must not fill it.
    return [*bubblewrap(), *(part for bind in binds for part in bind), "--remount-ro", "/"]


@functools.cache
def python() -> str:
    """Return the path of this Python, outside of a virtual environment."""
    return os.path.realpath(getattr(sys, "_base_executable", sys.executable))


@functools.cache
def readable_paths() -> list[str]:
    """Return the files and folders of the standard library, and of the libraries that it loads."""
    stdlib = Path(sysconfig.get_path("stdlib", vars={"installed_base": sys.base_prefix, "base": sys.base_prefix}))
    packages = ("site-packages", "dist-packages", "ensurepip")
    parts = [str(path) for path in stdlib.iterdir() if path.name not in packages]
    # The dynamic loader looks for the interpreter's shared libraries here.
    libraries = ["/lib64", "/usr/lib64", *glob.glob("/lib/*-linux-*"), *glob.glob("/usr/lib/*-linux-*")]
    libraries += [*glob.glob(f"{sys.base_prefix}/lib/*.so*"), *glob.glob("/usr/local/lib/*.so*"), "/etc/ld.so.cache"]
    devices = ["/dev/null", "/dev/zero", "/dev/urandom", "/usr/share/zoneinfo", "/etc/localtime"]
    return [path for path in (*parts, *libraries, *devices) if os.path.exists(path)]


@functools.cache
def bubblewrap() -> list[str]:
    """Return the beginning of the command before Python.

    Root creates no user namespace, because it could not switch to another user there (``confined.py`` does).
    """
    roots = ["/usr"] if Path(sys.base_prefix).is_relative_to("/usr") else ["/usr", sys.base_prefix]
    arguments = ["bwrap", "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
    arguments += ["--die-with-parent", "--hostname", "sandbox", "--cap-drop", "ALL"]
    if os.geteuid() == 0:
        arguments += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        arguments += ["--unshare-user"]
    # Before the other folders: Python itself may be below /tmp.
    arguments += ["--perms", "1777", "--size", str(TMP_BYTES), "--tmpfs", "/tmp", "--chdir", "/tmp"]  # noqa: S108
    for root in roots:
        for parent in list(Path(root).parents)[-2::-1]:  # the other user must reach a Python below /root
            arguments += ["--perms", "0755", "--dir", str(parent)]
        arguments += ["--ro-bind", root, root]
        # Empty folders hide installed packages, so a program has only the standard library.
        for packages in _package_folders(root):
            arguments += ["--tmpfs", packages]
    for name in ("/lib", "/lib64", "/bin"):
        if os.path.islink(name):
            arguments += ["--symlink", os.readlink(name), name]
        elif os.path.isdir(name):
            arguments += ["--ro-bind", name, name]
    arguments += ["--perms", "0755", "--dir", "/dev"]
    for device in ("/dev/null", "/dev/zero", "/dev/urandom"):
        arguments += ["--dev-bind", device, device]
    return [*arguments, "--perms", "0755", "--dir", PACKAGES]


@functools.cache
def _package_folders(root: str) -> list[str]:
    """Return the folders of installed packages below ``root``."""
    return [
        folder
        for name in ("site-packages", "dist-packages")
        for place in ("lib", "lib64", "local/lib")
        for folder in glob.glob(f"{root}/{place}/python3*/{name}")
    ]


def open_sandbox(config: SandboxConfig | None, place: str) -> Sandbox:
    """Return the sandbox of the best level that works here.

    Raises ``UserError``, which begins with ``place``, if a command does not work, and if there is no isolation.
    """
    if config is not None and config.command is not None:
        problem = _problem("command", tuple(config.command))
        if problem:
            raise UserError(f"{place}.sandbox.command: {shorten(' '.join(config.command))} did not work: {problem}")
        return Sandbox("command", tuple(config.command))
    problems = {}
    # The stricter level comes first. A level counts only if a program has run in it here.
    for level in ("bubblewrap", "landlock"):
        problems[level] = _problem(level, ())
        if not problems[level]:
            return Sandbox(level)
    if config is not None and config.unsafe:
        return Sandbox("unsafe")
    listed = "; ".join(f"{level}: {problem}" for level, problem in problems.items())
    raise UserError(
        f"{place}: no sandbox works here ({listed}). Install bubblewrap (apt install bubblewrap), name a command: "
        "`sandbox: {command: [docker, run, --rm, -i, --network=none, python:3.11-slim, timeout, '60']}`, or write "
        "`sandbox: {unsafe: true}` for programs that you trust."
    )


@functools.cache
def _problem(level: Level, command: tuple[str, ...]) -> str:
    """Return why a level does not work here; empty if a test program ran."""
    program = command[0] if command else "bwrap"
    if level != "landlock" and shutil.which(program) is None:
        return f"{program} is not installed."
    try:
        with Sandbox(level, command).start("run", Limits(seconds=20.0)) as session:
            session.begin({"program": "print(6 * 7)", "stdin": ""})
            output = session.read_output()
    except SandboxFailed as error:
        return str(error)
    return "" if output == "42\n" else "a test program printed something else."
