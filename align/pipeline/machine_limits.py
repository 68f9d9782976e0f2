"""Cores and memory that this process may use: the machine's, or what a container or scheduler grants. Torch-free.

Two limits count: the cores of the process's affinity mask (``taskset``, ``docker --cpuset-cpus``, Slurm), and the
control groups of the kernel (``docker --cpus --memory``, Kubernetes, systemd), which Python does not know. A group is
limited by every group above it, so all of them are read. Version 2 of control groups is described in the kernel's
``Documentation/admin-guide/cgroup-v2.rst``; version 1 has a folder for each kind of limit.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

GROUPS = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")


def usable_cores(groups: Path = GROUPS, own_groups: Path = OWN_GROUPS) -> int:
    """Return the number of cores that this process may use, at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = min(_core_quotas(groups, own_groups), default=float(cores))
    # Rounded down: with a thread more than cores, the kernel stops all of them for a part of each period.
    return max(1, min(cores, int(quota)))


def usable_memory(groups: Path = GROUPS, own_groups: Path = OWN_GROUPS) -> int:
    """Return the bytes of memory that this process may use."""
    import psutil

    total = int(psutil.virtual_memory().total)
    return min([total, *_memory_limits(groups, own_groups)])


def _core_quotas(groups: Path, own_groups: Path) -> Iterator[float]:
    """Yield the cores that each group of this process grants, if it has a limit."""
    for folder in _folders("", groups, own_groups):
        words = _read(folder / "cpu.max").split()
        if len(words) == 2 and words[0].isdigit():
            yield int(words[0]) / int(words[1])
    for folder in _folders("cpu", groups, own_groups):
        quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
        # Without a limit the quota is -1.
        if quota.isdigit() and period.isdigit():
            yield int(quota) / int(period)


def _memory_limits(groups: Path, own_groups: Path) -> Iterator[int]:
    """Yield the bytes that each group of this process grants, if it has a limit."""
    files = [folder / "memory.max" for folder in _folders("", groups, own_groups)]
    files += [folder / "memory.limit_in_bytes" for folder in _folders("memory", groups, own_groups)]
    for file in files:
        # Without a limit the first kind says ``max``, the second a number far above any machine's memory.
        limit = _read(file)
        if limit.isdigit():
            yield int(limit)


def _folders(controller: str, groups: Path, own_groups: Path) -> Iterator[Path]:
    """Yield the folders of this process's group and of all groups above it; ``controller`` is empty for version 2.

    In a container the path in ``/proc/self/cgroup`` may be the host's, of which only the root is mounted.
    """
    root = groups / controller
    yield root
    for line in _read(own_groups).splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            folder = root
            for part in Path(path).parts[1:]:
                folder = folder / part
                yield folder


def _read(file: Path) -> str:
    """Return the text of a file; empty if there is none, or if it may not be read."""
    try:
        return file.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
