"""Find and kill everything that a process has started, sessions of their own included. Torch-free.

A process group is not enough: a tool may start a program in a session of its own, or as a daemon. Needs Linux, and does
nothing elsewhere.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36
ROUNDS, PAUSE = 50, 0.01
"""Most rounds of looking for new processes, and the seconds between two: each may have started others meanwhile."""


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent ends, so that ``descendants`` still finds them."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def children_of(pid: int) -> list[int]:
    """Return the ids of a process's children, ended ones that nobody has waited for included."""
    children: list[int] = []
    try:
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(ProcessLookupError):
                children += map(int, (thread / "children").read_text(encoding="ascii").split())
    except OSError:  # the process has ended, or the kernel does not list children
        return []
    return children


def descendants(pid: int) -> list[int]:
    """Return the ids of everything below a process that has not ended."""
    found: list[int] = []
    queue = children_of(pid)
    while queue:
        child = queue.pop()
        queue += children_of(child)
        if not _has_ended(child):
            found.append(child)
    return found


def kill_descendants(pid: int) -> None:
    """Kill everything below a process, and stop the process itself, so that it starts nothing more."""
    _signal(pid, signal.SIGSTOP)
    for _ in range(ROUNDS):
        below = descendants(pid)
        if not below:
            return
        for child in below:
            _signal(child, signal.SIGKILL)
        time.sleep(PAUSE)


def kill_children_except(kept: set[int]) -> None:
    """Kill all children of this process except ``kept``, with everything below them, and wait for them."""
    for child in set(children_of(os.getpid())) - kept:
        kill_descendants(child)
        _signal(child, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(child, 0)


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


def _has_ended(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return True
    # The name, in parentheses, may hold spaces. The state follows it.
    return stat.rpartition(") ")[2][:1] in ("Z", "X")
