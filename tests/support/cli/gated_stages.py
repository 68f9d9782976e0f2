"""Stages whose gates fail, or that fail while a file exists, for tests of the commands."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from align.config.base import Config
from align.pipeline.context import StageContext
from align.registry import Stage
from align.store.artifacts import Kind


class GatedConfig(Config):
    """Gates that the record reports as failed."""

    failed: list[str] = []


def gated(context: StageContext) -> dict[str, Any]:
    """Write a file and report the failed gates."""
    (context.output / "card.txt").write_text("card")
    return {"failed_gates": context.config.failed}


GATED = Stage(
    "gated", 1, Kind.PROMPTS, f"{__name__}:GatedConfig", f"{__name__}:gated", "a card with gates", f"{__name__}:GATED"
)


class SwitchedConfig(Config):
    """A file that makes the stage fail while it exists."""

    file: str


def switched(context: StageContext) -> dict[str, Any]:
    """Write a file, or fail."""
    if Path(context.config.file).exists():
        raise RuntimeError("switched off")
    (context.output / "file.txt").write_text("on")
    return {}


SWITCHED = Stage(
    "switched", 1, Kind.PROMPTS, f"{__name__}:SwitchedConfig", f"{__name__}:switched", "x", f"{__name__}:SWITCHED"
)


def waiting(context: StageContext) -> dict[str, Any]:
    """Write a file once the file of the config exists; fail after a minute without it."""
    deadline = time.monotonic() + 60
    while not Path(context.config.file).exists():
        if time.monotonic() > deadline:
            raise RuntimeError("nobody opened the gate")
        time.sleep(0.05)
    (context.output / "file.txt").write_text("on")
    return {"test_loss_before": 3.25, "test_loss_after": 1.5}


WAITING = Stage(
    "waiting", 1, Kind.PROMPTS, f"{__name__}:SwitchedConfig", f"{__name__}:waiting", "x", f"{__name__}:WAITING"
)
