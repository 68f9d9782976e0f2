"""A command of the preloaded Python does what the interpreter does, in a process that has the libraries."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from align.runner.fork_server import ForkServer
from tests.support.preloaded_server import PreloadedPython, preloaded_command

pytestmark = pytest.mark.skipif(not ForkServer.is_possible(), reason="only Linux forks a process with its libraries")
LIBRARY = "colorsys"
"""What the server imports; nothing else here does."""


@pytest.fixture(scope="module")
def python() -> Iterator[list[str]]:
    """What stands for the interpreter in a command."""
    server = PreloadedPython([LIBRARY])
    yield preloaded_command(server.address)
    server.close()
    assert not server.folder.exists()


def test_streams_arguments_variables_and_folder(python: list[str], tmp_path: Path) -> None:
    code = (
        f"import os, sys; print({LIBRARY!r} in sys.modules, sys.argv, os.getcwd(), dict(os.environ), input())\n"
        "sys.stderr.write('an error')\nsys.exit(7)"
    )
    variables = {"ALIGN_A": "1", "LC_ALL": "C.UTF-8"}
    done = subprocess.run(
        [*python, "-u", "-c", code, "word"],
        input="a line\n",
        cwd=tmp_path,
        env=variables,
        capture_output=True,
        text=True,
    )
    assert done.stdout == f"True ['-c', 'word'] {tmp_path} {variables} a line\n"
    assert (done.stderr, done.returncode) == ("an error", 7)


def test_a_module_and_its_errors(python: list[str]) -> None:
    done = subprocess.run([*python, "-m", "timeit", "-n1", "-r1", "1 / 0"], capture_output=True, text=True)
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr
    done = subprocess.run([*python, "-m", "no_such_module"], capture_output=True, text=True)
    assert done.returncode == 1 and "No module named no_such_module" in done.stderr
    done = subprocess.run([*python, "-c", "raise SystemExit('a reason')"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "a reason\n")


# 67: a number that the fork may give to a descriptor while it sorts them.
@pytest.mark.parametrize("lowest", [3, 67])
def test_descriptor_keeps_its_number(python: list[str], lowest: int) -> None:
    reader, low_writer = os.pipe()
    writer = fcntl.fcntl(low_writer, fcntl.F_DUPFD_CLOEXEC, lowest)
    os.close(low_writer)
    command = preloaded_command(python[4], [writer])
    process = subprocess.Popen([*command, "-c", f"import os; os.write({writer}, b'text')"], pass_fds=[writer])
    os.close(writer)
    with os.fdopen(reader) as stream:
        assert stream.read() == "text"  # to the end: neither the command nor the server has a copy
    assert process.wait(60) == 0


def test_a_killed_process_shows_as_one(python: list[str]) -> None:
    code = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    assert subprocess.run([*python, "-c", code]).returncode == -signal.SIGKILL


def test_without_a_server_the_interpreter_runs(tmp_path: Path) -> None:
    command = [*preloaded_command(str(tmp_path / "no socket")), "-c", "import sys; print(sys.argv); sys.exit(3)"]
    done = subprocess.run([*command, "word"], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("['-c', 'word']\n", 3)


def test_forks_end_with_their_server() -> None:
    server = PreloadedPython([LIBRARY])
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    process = subprocess.Popen([*preloaded_command(server.address), "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout as output:
        fork = psutil.Process(int(output.readline()))
    server.close()
    assert process.wait(60) == -signal.SIGKILL
    fork_end = time.monotonic() + 60
    while fork.is_running() and fork.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < fork_end
        time.sleep(0.02)
