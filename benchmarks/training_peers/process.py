"""Run a command; the time of every line that it prints, its wall time and the peak memory of its process tree."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

INTERVAL = 0.1
"""Seconds between two looks at the memory."""


@dataclass
class Measured:
    """A command that has ended. ``lines`` are (seconds since the epoch, text); ``peak`` is bytes."""

    code: int
    seconds: float
    peak: int
    lines: list[tuple[float, str]] = field(default_factory=list)

    @property
    def failure(self) -> str | None:
        """The way in which it failed, with the end of its output; None where it ended well."""
        if self.code == 0:
            return None
        reason = f"exit code {self.code}"
        if self.code < 0:
            reason = signal.Signals(-self.code).name
            if self.code == -signal.SIGKILL:
                reason += " (out of memory or out of time)"
        return "\n".join([reason, *(text for _, text in self.lines[-15:])])


def resident(process: psutil.Process) -> int:
    """Return the resident bytes of a process and its descendants; shared pages count for each that maps them."""
    total = 0
    with contextlib.suppress(psutil.Error):
        for member in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                total += member.memory_info().rss
    return total


def run_measured(
    command: list[str], environment: dict[str, str], folder: Path, log: Path, timeout: float | None = None
) -> Measured:
    """Run ``command`` in ``folder`` and measure it; output goes to ``log`` too. After ``timeout`` seconds it is killed.

    Lines are timed when they arrive, so the command must not buffer them (``PYTHONUNBUFFERED``).
    """
    start = time.perf_counter()
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    root = psutil.Process(process.pid)
    peak = [0]
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(INTERVAL):
            peak[0] = max(peak[0], resident(root))
            if timeout is not None and time.perf_counter() - start > timeout:
                kill_group(process.pid)
                return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    lines = []
    assert process.stdout is not None
    try:
        with log.open("w", buffering=1, encoding="utf-8") as file:
            for line in process.stdout:
                lines.append((time.time(), line.rstrip("\n")))
                file.write(line)
        code = process.wait()
    finally:
        # An interrupt must not leave the command behind: it would disturb whatever is measured next.
        kill_group(process.pid)
        process.wait()
        ended.set()
        watcher.join()
    return Measured(code, time.perf_counter() - start, peak[0], lines)


def kill_group(group: int) -> None:
    """Kill what is left of a process group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)
