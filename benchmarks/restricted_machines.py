"""Run the smoke pipeline on machines that lack something, and print what happened; docs/testing.md has the result.

    python -m benchmarks.restricted_machines                        # all of them, as root on Linux with bubblewrap
    python -m benchmarks.restricted_machines "read-only home"

Each trial is this machine with one restriction: by bubblewrap's mounts, by a control group (version 1 or 2, if its
files may be written), by another folder. The environment of this Python is used, and nothing is installed into it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GROUPS = Path("/sys/fs/cgroup")
COMPILERS = ("cc", "c++", "gcc", "g++", "clang", "clang++")
DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
GIB = 2**30
LIMITS = "from align.pipeline.process_limits import *; print(usable_cores(), 'cores,', usable_memory() >> 30, 'GiB')"


class NotPossible(Exception):
    """A trial that this machine does not allow, and why."""


def bubblewrap(*options: str) -> list[str]:
    """Return a prefix for commands that see this machine with other mounts."""
    if shutil.which("bwrap") is None:
        raise NotPossible("bwrap is not installed (Debian's package bubblewrap)")
    return ["bwrap", "--dev-bind", "/", "/", "--die-with-parent", *options]


@contextlib.contextmanager
def no_compiler(folder: Path) -> Iterator[list[str]]:
    """Hide every C compiler behind a file that cannot be executed."""
    empty = folder / "empty"
    empty.touch(mode=0o644)
    found = {os.path.realpath(path) for name in COMPILERS for path in paths_of(name)}
    yield bubblewrap(*(word for path in sorted(found) for word in ("--ro-bind", str(empty), path)))


def paths_of(name: str) -> list[str]:
    """Return every file of this name in ``PATH``."""
    folders = os.environ.get("PATH", "").split(os.pathsep)
    return [str(Path(folder, name)) for folder in folders if Path(folder, name).exists()]


@contextlib.contextmanager
def read_only_home(folder: Path) -> Iterator[list[str]]:
    """Mount the home folder read-only."""
    home = str(Path.home())
    yield bubblewrap("--ro-bind", home, home)


@contextlib.contextmanager
def no_shared_memory(folder: Path) -> Iterator[list[str]]:
    """Replace /dev by one without shm."""
    devices = [word for name in DEVICES for word in ("--dev-bind", f"/dev/{name}", f"/dev/{name}")]
    yield bubblewrap("--tmpfs", "/dev", *devices)


@contextlib.contextmanager
def other_user(folder: Path) -> Iterator[list[str]]:
    """Be user 1000 without capabilities, in a user namespace: files of root's folders stay readable."""
    yield bubblewrap("--unshare-user", "--uid", "1000", "--gid", "1000", "--cap-drop", "ALL")


def control_group(cores: int, gib: int) -> Callable[[Path], contextlib.AbstractContextManager[list[str]]]:
    """Return a trial in a control group with this many cores and GiB of memory."""

    @contextlib.contextmanager
    def limited(folder: Path) -> Iterator[list[str]]:
        name = f"align-trial-{os.getpid()}"
        if (GROUPS / "cgroup.controllers").exists():
            files = {GROUPS / name: {"cpu.max": f"{cores * 100000} 100000", "memory.max": str(gib * GIB)}}
        else:
            quota = {"cpu.cfs_period_us": "100000", "cpu.cfs_quota_us": str(cores * 100000)}
            memory = {"memory.limit_in_bytes": str(gib * GIB)}
            files = {GROUPS / "cpu" / name: quota, GROUPS / "memory" / name: memory}
        try:
            for group, limits in files.items():
                group.mkdir()
                for file, text in limits.items():
                    (group / file).write_text(text)
        except OSError as error:
            raise NotPossible(f"control groups cannot be written: {error}") from None
        script = "; ".join(f"echo $$ > {group}/cgroup.procs" for group in files)
        try:
            yield ["sh", "-c", f'{script}; exec "$@"', "sh"]
        finally:
            for group in files:
                with contextlib.suppress(OSError):  # the kernel frees what a process had a moment after its end
                    time.sleep(1)
                    group.rmdir()

    return limited


@contextlib.contextmanager
def path_with_spaces(folder: Path) -> Iterator[list[str]]:
    """Install align, without what it requires, into an environment whose path has spaces, from a clone beside it."""
    spaced = folder / "a path with spaces"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(spaced)], check=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(spaced / ".venv")], check=True)
    (packages,) = (spaced / ".venv").glob("lib/python*/site-packages")
    (packages / "others.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")) + "\n")
    python = str(spaced / ".venv" / "bin" / "python")
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-build-isolation", "-e", "."]
    pip = [sys.executable, "-m", "pip", "--python", python]
    subprocess.run([*pip, "install", *options], cwd=spaced, check=True)
    (spaced / ".venv" / ".ready-run").touch()
    (spaced / ".venv" / ".ready").touch()
    yield ["make", "--silent", "-C", str(spaced), "smoke"]


TRIALS: dict[str, Callable[[Path], contextlib.AbstractContextManager[list[str]]]] = {
    "no C compiler": no_compiler,
    "2 CPUs, 8 GiB": control_group(2, 8),
    "1 CPU, 3 GiB": control_group(1, 3),
    "path with spaces": path_with_spaces,
    "read-only home": read_only_home,
    "no /dev/shm": no_shared_memory,
    "user 1000": other_user,
}


def run_trial(name: str) -> str:
    """Run the pipeline under a restriction; return what happened."""
    with tempfile.TemporaryDirectory(prefix="align-trial-") as text:
        folder = Path(text)
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [
            str(Path(sys.executable).with_name("align")),
            "run",
            "pipelines/smoke.yaml",
            "--store",
            str(folder / "store"),
        ]
        try:
            with TRIALS[name](folder) as prefix:
                if prefix[0] == "make":
                    command = []
                    environment.pop("PYTHONPATH")
                    limits = ""
                else:
                    check = [*prefix, sys.executable, "-c", LIMITS]
                    limits = subprocess.run(
                        check, cwd=ROOT, env=environment, capture_output=True, text=True
                    ).stdout.strip()
                started = time.monotonic()
                run = subprocess.run([*prefix, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
                seconds = time.monotonic() - started
        except NotPossible as error:
            return f"not possible here: {error}"
        if run.returncode == 0:
            return f"passed in {seconds:.0f} s {limits and f'({limits})'}".strip()
        return f"FAILED with exit code {run.returncode}\n{run.stdout[-2000:]}{run.stderr[-2000:]}"


def main() -> None:
    """Run the trials that are named, or all."""
    parser = argparse.ArgumentParser(description="Run the smoke pipeline on machines that lack something.")
    parser.add_argument("trials", nargs="*", metavar="TRIAL", help=", ".join(TRIALS))
    names = parser.parse_args().trials or list(TRIALS)
    for name in names:
        print(f"{name}: {run_trial(name)}", flush=True)


if __name__ == "__main__":
    main()
