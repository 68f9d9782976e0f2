"""Cores and memory come from the control groups of a container, not from the machine below it."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from align.pipeline.machine_limits import usable_cores, usable_memory

GIB = 2**30


@pytest.fixture(autouse=True)
def _machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of 16 cores and 64 GiB."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    memory = psutil.virtual_memory()._replace(total=64 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)


def limits(folder: Path, own: str, files: dict[str, str]) -> tuple[int, int]:
    """Return cores and GiB for a folder of control groups with these files."""
    for name, text in files.items():
        file = folder / "cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")
    own_groups = folder / "own"
    own_groups.write_text(own)
    groups = folder / "cgroup"
    return usable_cores(groups, own_groups), usable_memory(groups, own_groups) // GIB


def test_container_root_group_limits(tmp_path: Path) -> None:
    files = {"cpu.max": "200000 100000", "memory.max": str(8 * GIB)}
    assert limits(tmp_path, "0::/\n", files) == (2, 8)


def test_group_above_limits_too(tmp_path: Path) -> None:
    files = {
        "a/cpu.max": "400000 100000", "a/memory.max": str(6 * GIB),
        "a/b/cpu.max": "max 100000", "a/b/memory.max": str(8 * GIB),
    }  # fmt: skip
    assert limits(tmp_path, "0::/a/b\n", files) == (4, 6)


def test_version_one_groups_limit(tmp_path: Path) -> None:
    files = {
        "cpu,cpuacct/job/cpu.cfs_quota_us": "1",
        "cpu/job/cpu.cfs_quota_us": "300000", "cpu/job/cpu.cfs_period_us": "100000",
        "memory/job/memory.limit_in_bytes": str(5 * GIB),
    }  # fmt: skip
    own = "3:cpu,cpuacct:/job\n2:memory:/job\n0::/\n"
    assert limits(tmp_path, own, files) == (3, 5)


def test_fraction_of_a_core_is_one_core(tmp_path: Path) -> None:
    assert limits(tmp_path, "0::/\n", {"cpu.max": "50000 100000"})[0] == 1
    assert limits(tmp_path, "0::/\n", {"cpu.max": "190000 100000"})[0] == 1


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"cpu.max": "max 100000", "memory.max": "max"},
        {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"},
        {"memory/memory.limit_in_bytes": "9223372036854771712"},
        {"cpu.max": "6400000 100000", "memory.max": str(512 * GIB)},
    ],
)
def test_machine_limits_without_groups(tmp_path: Path, files: dict[str, str]) -> None:
    assert limits(tmp_path, "0::/\n", files) == (16, 64)


def test_host_path_in_container_is_ignored(tmp_path: Path) -> None:
    own = "0::/kubepods/pod1/container\n"
    assert limits(tmp_path, own, {"cpu.max": "200000 100000"})[0] == 2


def test_missing_control_groups_are_no_error(tmp_path: Path) -> None:
    assert usable_cores(tmp_path / "none", tmp_path / "no-file") == 16
