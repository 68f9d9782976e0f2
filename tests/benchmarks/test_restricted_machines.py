"""Machines that lack something: how they are made."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import restricted_machines
from benchmarks.restricted_machines import TRIALS


def test_control_group_gets_its_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restricted_machines, "GROUPS", tmp_path)
    (tmp_path / "cgroup.controllers").write_text("cpu memory\n")
    with TRIALS["2 CPUs, 8 GiB"](tmp_path) as prefix:
        (group,) = (path for path in tmp_path.iterdir() if path.is_dir())
        assert (group / "cpu.max").read_text() == "200000 100000"
        assert (group / "memory.max").read_text() == str(8 * 2**30)
        assert f"> {group}/cgroup.procs" in prefix[2] and prefix[2].endswith('exec "$@"')
        for file in group.iterdir():  # the kernel removes them with the folder
            file.unlink()
    assert not group.exists()


def test_missing_control_groups_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restricted_machines, "GROUPS", tmp_path / "none")
    assert restricted_machines.run_trial("2 CPUs, 8 GiB").startswith("not possible here: control groups cannot be")


def test_missing_bubblewrap_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("no C compiler", "read-only home", "no /dev/shm", "user 1000"):
        assert restricted_machines.run_trial(name).startswith("not possible here: bwrap is not installed"), name


def test_every_compiler_is_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("gcc-12", "bwrap"):
        (tmp_path / name).touch(mode=0o755)
    for link in ("cc", "gcc"):
        (tmp_path / link).symlink_to("gcc-12")
    monkeypatch.setenv("PATH", str(tmp_path))
    with TRIALS["no C compiler"](tmp_path) as prefix:
        assert prefix[-3:] == ["--ro-bind", str(tmp_path / "empty"), str(tmp_path / "gcc-12")]
