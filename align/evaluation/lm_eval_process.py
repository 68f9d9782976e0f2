"""Starts ``lm_eval_run`` as a process and waits for it. Torch-free.

A process of its own, because a process can hold one vLLM, because lm-eval seeds and patches what it runs in, and
because what it held is gone when it ends. One that says and computes nothing for too long is ended.
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
from align.evaluation.lm_eval_run import JOB, RESULT
from align.store.atomic_write import write_text_atomically
from align.store.json_files import DamagedFile, parse_object

MODULE = "align.evaluation.lm_eval_run"
POLL_SECONDS = 0.1
LAST_LINES = 15
WORKING_SECONDS = 5.0
"""Of CPU time, while it is silent: less than that, and it is waiting for something."""
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def lm_eval_version() -> str:
    """The version installed. Raises ``UserError`` where there is none."""
    try:
        return importlib.metadata.version("lm_eval")
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            "tasks of the kind lm_eval need lm-eval, which is not installed: `pip install 'align[evaluation]'`."
        ) from None


def run_lm_eval(job: Mapping[str, Any], base: Path, quiet_seconds: float) -> dict[str, Any]:
    """Do ``job`` (see ``lm_eval_run``) and return its result; relative paths in tasks start at ``base``.

    Raises ``UserError`` for what the user has to change, and ``RuntimeError`` with the end of its log where it failed
    or neither printed nor computed anything for ``quiet_seconds``.
    """
    with tempfile.TemporaryDirectory(prefix="align-lm-eval-") as name:
        folder = Path(name)
        log, result = folder / "log.txt", folder / RESULT
        write_text_atomically(folder / JOB, json.dumps({**job, "parent": os.getpid()}))
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", MODULE, str(folder)], stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, cwd=base, env=_environment(),
            )  # fmt: skip
        try:
            quiet = _wait(process, log, quiet_seconds)
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
        if quiet:
            raise RuntimeError(
                f"lm-eval did nothing for {quiet_seconds:g} s and was ended (runtime.engine.timeout).{last_words(log)}"
            )
        if process.returncode != 0 or not result.is_file():
            raise RuntimeError(f"lm-eval ended with exit code {process.returncode}.{last_words(log)}")
        try:
            found = parse_object(result.read_bytes())
        except DamagedFile as error:
            raise RuntimeError(f"lm-eval's result {error}.{last_words(log)}") from None
    if "refused" in found:
        raise UserError(found["refused"])
    return found


def _wait(process: subprocess.Popen[bytes], log: Path, quiet_seconds: float) -> bool:
    """Whether it stood still before it ended.

    Its log alone would not tell: a batch of long answers is minutes without a word, on a busy machine many.
    """
    said, worked, since = -1, 0.0, time.monotonic()
    while process.poll() is None:
        size, seconds = log.stat().st_size, _cpu_seconds(process.pid)
        if size != said or seconds > worked + WORKING_SECONDS:
            said, worked, since = size, seconds, time.monotonic()
        elif time.monotonic() - since > quiet_seconds:
            return True
        time.sleep(POLL_SECONDS)
    return False


def _cpu_seconds(pid: int) -> float:
    try:
        used = psutil.Process(pid).cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return float(used.user + used.system)


def last_words(log: Path) -> str:
    """The end of the log without its progress bars, as a sentence; nothing where it is empty."""
    text = log.read_bytes()[-65536:].decode("utf-8", "replace").replace("\r", "\n")
    lines = [line.rstrip() for line in text.splitlines() if line.strip() and "%|" not in line and "it/s" not in line]
    return "\nThe end of its log:\n" + "\n".join(lines[-LAST_LINES:]) if lines else ""


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
    places = [str(Path(__file__).resolve().parents[2]), kept.get("PYTHONPATH", "")]
    kept["PYTHONPATH"] = os.pathsep.join(place for place in places if place)  # the process starts in another folder
    return {"LMEVAL_LOG_LEVEL": "WARNING", "TOKENIZERS_PARALLELISM": "false", **kept}
