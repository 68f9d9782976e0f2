"""Sandboxes: how a process is isolated, the level that this machine offers, and the refusal if there is none.

A sandbox starts Python with the texts of ``limits.py`` and ``confined.py``. The process limits itself before it runs
foreign code. The levels:

``bubblewrap``: new namespaces without a network, an empty root with Python's standard library, read-only, and a small
``/tmp`` in memory.
``landlock``: no file but the standard library can be opened, and none written; needs no privileges.
``command``: a user's command, such as docker's.
``unsafe``: no isolation, by permission of the user.

The first two levels require the filter of system calls and limit the number of threads, for which root switches to
another user. ``command`` has the filter if the kernel allows it. All levels limit processor time, wall-clock time,
memory and output. Packages are hidden: a benchmark's solutions may be among them.
"""

from __future__ import annotations

import functools
import glob
import itertools
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from align.config.verifiers import SandboxConfig
from align.errors import UserError, shorten
from align.verifiers.sandbox.session import SandboxFailed, Session

Level = Literal["bubblewrap", "landlock", "command", "unsafe"]
TEXTS = [Path(__file__).with_name(name).read_text(encoding="utf-8") for name in ("limits.py", "confined.py")]
FUTURE = "from __future__ import annotations\n"
"""Statement that only the beginning of a text may have."""
OPTIONS = ("-P", "-s", "-S", "-c", FUTURE + "\n".join(text.replace(FUTURE, "", 1) for text in TEXTS))
"""Python's options: no packages, and no modules of the current folder."""
ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "HOME": "/tmp",  # noqa: S108 - inside the sandbox
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONUTF8": "1",
}
TMP_BYTES = 16 << 20
"""Size of ``/tmp`` inside bubblewrap, and of a file in it."""
FIRST_USER = 600_000_000
"""Number of a user that root switches to; such a user has no files and no processes."""
USERS = itertools.count(FIRST_USER + os.getpid() % 100_000 * 1000)
"""Another user for each process, since the limit of threads counts all threads of a user."""
MIB = 1 << 20


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

    @contextmanager
    def start(self, kind: str, limits: Limits) -> Iterator[Session]:
        """Start a process for a task of ``confined.py``; it is killed with its descendants at the end of the block.

        Raises ``SandboxFailed`` if it cannot be started.
        """
        before = list(self.command) if self.level != "bubblewrap" else bubblewrap()
        interpreter = "python3" if self.level == "command" else python()
        try:
            process = subprocess.Popen(
                [*before, interpreter, *OPTIONS],
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
                "readable": readable_paths() if self.level == "landlock" else [],
                "user": next(USERS) if self.level in ("bubblewrap", "landlock") and os.geteuid() == 0 else None,
            }
            yield session
        finally:
            session.close()


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
    """Return the command before Python.

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
    for device in ("/dev/null", "/dev/zero", "/dev/urandom"):
        arguments += ["--dev-bind", device, device]
    # bubblewrap's root is a file system in memory. A program must not fill it.
    return [*arguments, "--remount-ro", "/"]


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
