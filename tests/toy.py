"""Stages without torch, for tests of the spine: they count, and can fail in every way a stage can."""

import errno
import json
import os
import signal
import time
from typing import Any

from pydantic import Field

from align.artifacts import Kind
from align.errors import UserError
from align.stage import Config, Stage, StageContext, stage_input


class NumberConfig(Config):
    number: int = Field(1, ge=0, le=100)
    crash: str = ""
    steps: int = 3
    pause: float = 0.0


class SumConfig(Config):
    first: stage_input(Kind.PROMPTS)
    others: list[stage_input(Kind.PROMPTS)] = []
    scale: float = Field(1.0, gt=0)


def number(context: StageContext) -> dict[str, Any]:
    """Write a number, one checkpoint a step; an attempt continues where the last one was killed."""
    done = len(list(context.checkpoints.glob("step-*")))
    crash = context.config.crash
    for step in range(done, context.config.steps):
        if crash == "kill" and step == 2 and done == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        if crash == "user":
            raise UserError("the dataset is empty after filtering.")
        if crash == "bug":
            raise ValueError("a bug")
        if crash == "disk":
            raise OSError(28, "No space left on device")
        if crash == "away" and step == 2 and done == 0:
            raise OSError(errno.ESTALE, "Stale file handle")
        if crash == "gone":
            raise OSError(errno.EIO, "Input/output error")
        if crash == "exit":
            os._exit(9)
        time.sleep(context.config.pause)
        (context.checkpoints / f"step-{step}").write_text("x")
        context.progress(step + 1, context.config.steps, loss=1.0 / (step + 1))
        context.log(step + 1, loss=1.0 / (step + 1))
    (context.output / "number.txt").write_text(str(context.config.number))
    return {"number": context.config.number, "resumed_at": done, "tokens": 7}


def add(context: StageContext) -> dict[str, Any]:
    """Sum the inputs."""
    artifacts = [context.inputs["first"], *context.inputs["others"]]
    total = sum(int((artifact.path / "number.txt").read_text()) for artifact in artifacts)
    (context.output / "number.txt").write_text(str(int(total * context.config.scale)))
    return {"total": total}


def surroundings(context: StageContext) -> dict[str, Any]:
    """What the process found in its environment."""
    (context.output / "environment.json").write_text(json.dumps(dict(os.environ)))
    return {}


NUMBER = Stage("number", 1, Kind.PROMPTS, "tests.toy:NumberConfig", "tests.toy:number", "a number", "tests.toy:NUMBER")
SUM = Stage("sum", 1, Kind.PROMPTS, "tests.toy:SumConfig", "tests.toy:add", "a sum", "tests.toy:SUM")
POLICY = Stage("policy", 1, Kind.POLICY, "tests.toy:NumberConfig", "tests.toy:number", "a policy", "tests.toy:POLICY")
ENV = Stage(
    "env", 1, Kind.PROMPTS, "tests.toy:NumberConfig", "tests.toy:surroundings", "its environment", "tests.toy:ENV"
)
CARD = Stage("card", 1, Kind.SCORECARD, "tests.toy:NumberConfig", "tests.toy:number", "a card", "tests.toy:CARD")


def pipeline(**changes: dict[str, Any]) -> dict[str, Any]:
    """A raw pipeline of two numbers and their sum; ``changes`` are merged into the stages."""
    stages: dict[str, dict[str, Any]] = {
        "one": {"stage": "tests.toy:NUMBER", "number": 1},
        "two": {"stage": "tests.toy:NUMBER", "number": 2},
        "total": {"stage": "tests.toy:SUM", "first": "one", "others": ["two"]},
    }
    for name, values in changes.items():
        stages.setdefault(name, {}).update(values)
    return {"name": "toy", "seed": 3, "stages": stages}
