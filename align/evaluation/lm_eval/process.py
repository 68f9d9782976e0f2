"""Starts lm-eval's worker process and waits for its result. Torch-free.

lm-eval gets a process of its own for three reasons: a process can hold only one vLLM, lm-eval seeds and patches the
process it runs in, and the end of a process frees all its memory. A process that neither prints nor computes for too
long is killed.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from align.errors import UserError
from align.evaluation.lm_eval.worker import JOB, RESULT
from align.store.atomic_write import write_text_atomically
from align.store.json_files import DamagedFile, parse_object

MODULE = "align.evaluation.lm_eval.worker"
POLL_SECONDS = 0.1
LOG_LINES = 15
"""Last lines of the log that an error shows."""
BUSY_CPU_SECONDS = 5.0
"""CPU time that counts as work while the process is silent; less may be a process that waits for something."""
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def lm_eval_version() -> str:
    """Return the installed version. Raises ``UserError`` where lm-eval is not installed."""
    try:
        return importlib.metadata.version("lm_eval")
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            "tasks of the kind lm_eval need lm-eval, which is not installed: "
            "`pip install 'align-pipeline[evaluation]'`."
        ) from None


def run_lm_eval(job: Mapping[str, Any], base: Path, idle_timeout: float) -> dict[str, Any]:
    """Run ``job`` (see ``worker.py``) and return its result; relative paths in tasks start at ``base``.

    Raises ``UserError`` for a mistake in the settings, and ``RuntimeError`` with the end of the log where the process
    failed, or neither printed nor computed anything for ``idle_timeout`` seconds.
    """
    with tempfile.TemporaryDirectory(prefix="align-lm-eval-") as name:
        folder = Path(name)
        log, result = folder / "log.txt", folder / RESULT
        # The worker watches ``parent``, so that it does not outlive a stage that was killed.
        write_text_atomically(folder / JOB, json.dumps({**job, "parent": os.getpid()}))
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", MODULE, str(folder)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=base,
                env=_environment(),
            )
        try:
            is_stuck = _wait(process, log, idle_timeout)
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
        if is_stuck:
            raise RuntimeError(
                f"lm-eval did nothing for {idle_timeout:g} s and was killed (runtime.engine.timeout).{log_end(log)}"
            )
        if process.returncode != 0 or not result.is_file():
            raise RuntimeError(f"lm-eval ended with exit code {process.returncode}.{log_end(log)}")
        try:
            reply = parse_object(result.read_bytes())
        except DamagedFile as error:
            raise RuntimeError(f"lm-eval's result {error}.{log_end(log)}") from None
    if "refused" in reply:
        raise UserError(reply["refused"])
    return reply


def _wait(process: subprocess.Popen[bytes], log: Path, idle_timeout: float) -> bool:
    """Wait for the process; return True where it did nothing for ``idle_timeout`` seconds and still runs.

    The log alone is no evidence: a batch of long answers prints nothing for minutes, on a busy machine for many.
    """
    log_size = -1
    cpu_seconds = 0.0
    active_at = time.monotonic()
    while process.poll() is None:
        # Output or CPU time since the last look is a sign of life.
        size, seconds = log.stat().st_size, _cpu_seconds(process.pid)
        if size != log_size or seconds > cpu_seconds + BUSY_CPU_SECONDS:
            log_size, cpu_seconds, active_at = size, seconds, time.monotonic()
        elif time.monotonic() - active_at > idle_timeout:
            return True
        time.sleep(POLL_SECONDS)
    return False


def _cpu_seconds(pid: int) -> float:
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return float(times.user + times.system)


def log_end(log: Path) -> str:
    """Return the end of the log without progress bars, for an error; empty where the log is."""
    text = log.read_bytes()[-65536:].decode("utf-8", "replace").replace("\r", "\n")
    lines = [line.rstrip() for line in text.splitlines() if line.strip() and "%|" not in line and "it/s" not in line]
    return "\nThe end of its log:\n" + "\n".join(lines[-LOG_LINES:]) if lines else ""


def _environment() -> dict[str, str]:
    variables = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    paths = [str(Path(__file__).resolve().parents[3]), variables.get("PYTHONPATH", "")]
    # The process starts in another folder, where a relative path to align would not hold.
    variables["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    return {"LMEVAL_LOG_LEVEL": "WARNING", "TOKENIZERS_PARALLELISM": "false", **variables}
