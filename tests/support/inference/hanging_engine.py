"""A stage, torch-free, that makes one engine call of a kind that no test could make in its own process."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from typing import Any, Literal

from align.config.base import Config
from align.inference.protocol import Watchdog
from align.pipeline.context import StageContext
from align.registry import Stage
from align.store.artifacts import Kind

TIMEOUT = 1.0


class HangConfig(Config):
    """What the call does."""

    how: Literal["sleeps", "locks", "stops"]


def run(context: StageContext) -> dict[str, Any]:
    """Leave a checkpoint, then call an engine that does not answer; an attempt that finds the checkpoint is done."""
    (context.output / "done.txt").touch()
    if list(context.checkpoints.iterdir()):
        return {}
    (context.checkpoints / "one").touch()
    with Watchdog("toy", TIMEOUT, context.fail_at_once).watch("generate"):
        {"sleeps": native_sleep, "locks": sleep_with_the_interpreter_locked, "stops": stop_for_a_while}[
            context.config.how
        ]()
    return {}


def native_sleep() -> None:
    """Hang where no exception arrives: signals are handled between two instructions of Python, and there is none."""
    for _ in range(20):
        ctypes.CDLL(None).sleep(60)


def sleep_with_the_interpreter_locked() -> None:
    """Hang so that no other thread of Python runs either."""
    for _ in range(20):
        ctypes.PyDLL(None).sleep(60)


def stop_for_a_while() -> None:
    """Stand still as a whole, as a suspended job does, for longer than the timeout."""
    wake = f"import os, time; time.sleep({1.5 * TIMEOUT}); os.kill({os.getpid()}, {int(signal.SIGCONT)})"
    waker = subprocess.Popen([sys.executable, "-I", "-c", wake])
    began = time.monotonic()
    os.kill(os.getpid(), signal.SIGSTOP)
    assert time.monotonic() - began > TIMEOUT
    waker.wait()


HANG = Stage("hang", 1, Kind.PROMPTS, f"{__name__}:HangConfig", f"{__name__}:run", "hangs", f"{__name__}:HANG")
