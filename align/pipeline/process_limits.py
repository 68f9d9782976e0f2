"""Cores, memory and time of a process that computes, its threads, and its garbage collections. Torch-free.

Two limits count: the cores of the process's affinity mask (``taskset``, ``docker --cpuset-cpus``, Slurm), and the
control groups of the kernel (``docker --cpus --memory``, Kubernetes, systemd), which Python does not know. A group is
limited by every group above it, so all of them are read. Version 2 of control groups is described in the kernel's
``Documentation/admin-guide/cgroup-v2.rst``; version 1 has a folder for each kind of limit.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

GROUPS = Path("/sys/fs/cgroup")
GROUPS_OF_PROCESS = Path("/proc/self/cgroup")


@contextlib.contextmanager
def alarm(seconds: float, error: type[BaseException]) -> Iterator[None]:
    """Raise ``error`` in the code inside after ``seconds``, and each second after that, in the main thread.

    The handler also runs within system calls that wait, long regular expressions and powers.
    """

    def end(number: int, frame: object) -> None:
        raise error

    previous = signal.signal(signal.SIGALRM, end)
    remaining, interval = signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
        if remaining:
            signal.setitimer(signal.ITIMER_REAL, remaining, interval)


def usable_cores() -> int:
    """Return the number of cores that this process may use, at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = min(_core_quotas(), default=float(cores))
    # Round down: with a thread more than cores, the kernel stops all of them for a part of each period.
    return max(1, min(cores, int(quota)))


def usable_memory() -> int:
    """Return the bytes of memory that this process may use."""
    import psutil

    return min([int(psutil.virtual_memory().total), *_memory_limits()])


def _core_quotas() -> Iterator[float]:
    """Yield the cores that each group of this process grants, if it has a limit."""
    for folder in _group_folders(""):
        words = _read(folder / "cpu.max").split()
        if len(words) == 2 and words[0].isdigit():
            yield int(words[0]) / int(words[1])
    for folder in _group_folders("cpu"):
        quota = _read(folder / "cpu.cfs_quota_us")
        period = _read(folder / "cpu.cfs_period_us")
        # Without a limit the quota is -1.
        if quota.isdigit() and period.isdigit():
            yield int(quota) / int(period)


def _memory_limits() -> Iterator[int]:
    """Yield the bytes that each group of this process grants, if it has a limit."""
    files = [folder / "memory.max" for folder in _group_folders("")]
    files += [folder / "memory.limit_in_bytes" for folder in _group_folders("memory")]
    for file in files:
        # Without a limit the first kind says ``max``, the second a number far above any machine's memory.
        limit = _read(file)
        if limit.isdigit():
            yield int(limit)


def _group_folders(controller: str) -> Iterator[Path]:
    """Yield the folders of this process's group and of all groups above it; ``controller`` is empty for version 2.

    In a container the path in ``/proc/self/cgroup`` may be the host's, of which only the root is mounted.
    """
    yield GROUPS / controller
    for line in _read(GROUPS_OF_PROCESS).splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            folder = GROUPS / controller
            for part in Path(path).parts[1:]:
                folder = folder / part
                yield folder


def _read(file: Path) -> str:
    """Return the text of a file; empty if there is none, or if it may not be read."""
    try:
        return file.read_text(encoding="utf-8").strip()
    except OSError:
        return ""


# ---- waiting of OpenMP's threads between two operations ----
#
# A thread that sleeps must be woken for each operation of a model, and on a virtual machine waking lasts as long as a
# small operation. A thread that spins starts at once. But two processes that spin on the same cores slow each other
# down: a step was ten times slower. So a process spins only while it holds a name that a machine has once; the kernel
# frees it when the process ends. ``docs/performance.md`` has the measurements.

SPINNING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "100000"}
"""libgomp's threads spin for about 2 ms before they sleep, which is longer than Python needs between operations."""
SLEEPING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}
"""Threads sleep at once; other work on the machine does not slow them down further."""
CLAIM = "\0align/spinning-threads"
"""Name of a socket without a file (``man 7 unix``), of which a machine, or a container, has one."""

_claims: list[socket.socket] = []
"""Sockets that this process holds until its end."""


@contextlib.contextmanager
def claim_spinning(name: str = CLAIM) -> Iterator[dict[str, str]]:
    """Yield the variables for processes that compute one after another inside this context.

    ``SPINNING`` for the first caller, ``SLEEPING`` while another process is inside, and none if the user has chosen.
    """
    if _user_has_chosen():
        yield {}
        return
    claim = _bind(name)
    try:
        yield SLEEPING if claim is None else SPINNING
    finally:
        if claim is not None:
            claim.close()


def set_waiting(name: str = CLAIM) -> None:
    """Choose for this process until its end, before torch is imported; it keeps what its parent has chosen for it."""
    if _user_has_chosen():
        return
    claim = _bind(name)
    if claim is not None:
        _claims.append(claim)
    os.environ.update(SLEEPING if claim is None else SPINNING)


def waiting_beside(environment: dict[str, str]) -> dict[str, str]:
    """Return the variables of a process that computes at the same time as the process with ``environment``."""
    return SLEEPING if SPINNING.items() <= environment.items() else {}


def _user_has_chosen() -> bool:
    return not SPINNING.keys().isdisjoint(os.environ)


def _bind(name: str) -> socket.socket | None:
    """Bind the name; None if another process has it, or if the system has no such names, like macOS."""
    try:
        claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    except (AttributeError, OSError):
        return None
    try:
        claim.bind(name)
    except OSError:
        claim.close()
        return None
    return claim


# ---- garbage collections of a process that imports torch, transformers and trl, and then works ----
#
# Such a process imports some 400,000 objects that live until its end. While they come in, Python walks all that are
# there time and again, and later each full collection walks them once more: a fifth of the CPU time of a short stage.

THRESHOLDS = gc.get_threshold()
IMPORT_THRESHOLDS = (50_000, 20, 100)
"""Collections are rare rather than off, because a stage that loads no model also needs them."""


def relax_collections() -> None:
    """Collect garbage rarely from now on; for the start of a process, before it imports its libraries."""
    gc.set_threshold(*IMPORT_THRESHOLDS)


def resume_collections() -> None:
    """Collect garbage as usual again, but never walk again what has been imported.

    Does nothing in a process that has not relaxed them, or the second time. Call it before the first model is loaded:
    what is frozen and becomes garbage later is never freed.
    """
    if gc.get_threshold() != IMPORT_THRESHOLDS:
        return
    gc.freeze()
    # Libraries that find frozen objects of theirs at the end, as triton does, report them as leaks.
    atexit.register(gc.unfreeze)
    gc.set_threshold(*THRESHOLDS)
