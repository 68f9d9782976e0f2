"""vLLM's OpenAI-compatible server with a tiny model, for slow tests over HTTP."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from align.inference.servers.server_process import MODULE, LocalServer, free_port

LONGEST_START = 480
"""Seconds; half a minute on idle cores."""


@contextmanager
def vllm_server(model_dir: Path, folder: Path, *options: str) -> Iterator[str]:
    """Serve ``model_dir`` as ``tiny`` inside the context; yield the address with the version."""
    port = free_port()
    command = [
        sys.executable, "-m", MODULE, "--host", "127.0.0.1", "--port", str(port), "--model", str(model_dir),
        "--served-model-name", "tiny", "--enforce-eager", "--dtype", "float32", "--max-num-seqs", "8",
        "--max-model-len", "2048", *options,
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        server = LocalServer(command, [folder])
    try:
        deadline = time.monotonic() + LONGEST_START
        while not _answers(port):
            assert server.process.poll() is None and time.monotonic() < deadline, server.log_tail(30)
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.end()


def _answers(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health", timeout=2, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False
