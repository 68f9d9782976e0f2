"""A studio as a process of its own, as ``align studio`` starts it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

SECONDS_TO_START = 120


@dataclass
class RunningStudio:
    """A studio that listens: its process, and the address with its token."""

    process: subprocess.Popen[str]
    address: str

    @property
    def origin(self) -> str:
        """The address without path and token."""
        return self.address.partition("/?")[0]

    @property
    def token(self) -> str:
        """The token of the address."""
        return self.address.partition("token=")[2]

    def client(self, timeout: float = 60.0) -> httpx.Client:
        """Return a client that sends the token."""
        return httpx.Client(
            base_url=self.origin, headers={"authorization": f"Bearer {self.token}"}, timeout=timeout, trust_env=False
        )


@contextmanager
def running_studio(store: Path, *options: str, cwd: Path | None = None) -> Iterator[RunningStudio]:
    """Start a studio about ``store`` on a free port; it is ended after the context."""
    words = ["studio", "--store", str(store), "--port", "0", "--json", *options]
    process = subprocess.Popen(
        [sys.executable, "-m", "align.cli.main", *words],
        stdout=subprocess.PIPE, text=True, cwd=cwd, env=dict(os.environ), start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    try:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line == "}\n":
                break
        yield RunningStudio(process, json.loads("".join(lines))["address"])
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
