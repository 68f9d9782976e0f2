"""Stages without torch, for tests of the spine: they count, and can fail in every way a stage can."""

import contextlib
import errno
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from pydantic import Field

from align.config.base import Config, PrecisionSetting, stage_input
from align.errors import UserError
from align.pipeline.context import StageContext
from align.pipeline.stop_signal import CAN_STOP, Stopped, is_stop_requested
from align.registry import Stage
from align.store.artifacts import Kind


class NumberConfig(Config):
    number: int = Field(1, ge=0, le=100)
    crash: str = ""
    steps: int = 3
    pause: float = 0.0
    stops: bool = False


class ProductsConfig(NumberConfig):
    precision: PrecisionSetting = "auto"


class SumConfig(Config):
    first: stage_input(Kind.PROMPTS)
    others: list[stage_input(Kind.PROMPTS)] = []
    scale: float = Field(1.0, gt=0)


def number(context: StageContext) -> dict[str, Any]:
    """Write a number, one checkpoint a step; an attempt continues where the last one was killed."""
    done = len(list(context.checkpoints.glob("step-*")))
    crash = context.config.crash
    if context.config.stops:
        context.emit(CAN_STOP)
    if crash == "noise":
        print("x" * 100_000)
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
        if context.config.stops and is_stop_requested(context.events.parent):
            raise Stopped(f"stopped as asked, at step {step + 1} of {context.config.steps}.")
    (context.output / "number.txt").write_text(str(context.config.number))
    return {"number": context.config.number, "resumed_at": done, "tokens": 7}


def products(context: StageContext) -> dict[str, Any]:
    """Name the type of the matrix products; no torch is needed for that once the processor has been measured."""
    (context.output / "type.txt").write_text(context.precision)
    return {}


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


def ranks(context: StageContext) -> dict[str, Any]:
    """What each of several processes found in its environment; one of them may die, stop or be at fault at a step."""
    rank, names = int(os.environ["RANK"]), ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS")
    done = len(list(context.checkpoints.glob("step-*")))
    (context.checkpoints / f"rank-{rank}.json").write_text(json.dumps({name: os.environ[name] for name in names}))
    print(f"rank {rank} is here")
    context.warn(f"from rank {rank}")
    import torch.distributed as dist

    for step in range(done, context.config.steps):
        if context.config.crash == "step" and step == 1:
            _fault(os.environ.get("ALIGN_TEST_FAULT", ""), rank)
        time.sleep(context.config.pause)
        dist.barrier()
        if rank == 0:
            (context.checkpoints / f"step-{step}").write_text("x")
        dist.barrier()
    if rank == 0:
        values = [json.loads(file.read_text()) for file in sorted(context.checkpoints.glob("rank-*.json"))]
        (context.output / "ranks.json").write_text(json.dumps(values))
    return {"rank": rank, "resumed_at": done}


def _fault(label: str, rank: int) -> None:
    """``kill 1`` kills rank 1."""
    kind, _, number = label.partition(" ")
    if number != str(rank):
        return
    if kind in ("kill", "stop"):
        os.kill(os.getpid(), signal.SIGKILL if kind == "kill" else signal.SIGSTOP)
    if kind == "user":
        raise UserError("the dataset is empty after filtering.")
    if kind == "bug":
        raise ValueError("a bug")
    if kind == "exit":
        os._exit(9)


RANKS = Stage(
    "ranks", 1, Kind.PROMPTS, "tests.support.toy:NumberConfig", "tests.support.toy:ranks",
    "processes", distributed=True,
    path="tests.support.toy:RANKS",
)  # fmt: skip
NUMBER = Stage(
    "number",
    1,
    Kind.PROMPTS,
    "tests.support.toy:NumberConfig",
    "tests.support.toy:number",
    "a number",
    "tests.support.toy:NUMBER",
)
SUM = Stage(
    "sum", 1, Kind.PROMPTS, "tests.support.toy:SumConfig", "tests.support.toy:add", "a sum", "tests.support.toy:SUM"
)
POLICY = Stage(
    "policy",
    1,
    Kind.POLICY,
    "tests.support.toy:NumberConfig",
    "tests.support.toy:number",
    "a policy",
    "tests.support.toy:POLICY",
)
PRODUCTS = Stage(
    "products",
    1,
    Kind.PROMPTS,
    "tests.support.toy:ProductsConfig",
    "tests.support.toy:products",
    "its type",
    "tests.support.toy:PRODUCTS",
)
ENV = Stage(
    "env",
    1,
    Kind.PROMPTS,
    "tests.support.toy:NumberConfig",
    "tests.support.toy:surroundings",
    "its environment",
    "tests.support.toy:ENV",
)
CARD = Stage(
    "card",
    1,
    Kind.SCORECARD,
    "tests.support.toy:NumberConfig",
    "tests.support.toy:number",
    "a card",
    "tests.support.toy:CARD",
)


def steps_kept(store: Path, stage: str) -> int:
    """Checkpoints of a stage that is being made."""
    result = 0
    for work in store.glob("*/*.partial/work.json"):
        with contextlib.suppress(OSError, ValueError):  # being published
            if json.loads(work.read_text())["name"] == stage:
                result = max(result, len(list((work.parent / "checkpoints").glob("step-*"))))
    return result


def pipeline(**changes: dict[str, Any]) -> dict[str, Any]:
    """A raw pipeline of two numbers and their sum; ``changes`` are merged into the stages."""
    stages: dict[str, dict[str, Any]] = {
        "one": {"stage": "tests.support.toy:NUMBER", "number": 1},
        "two": {"stage": "tests.support.toy:NUMBER", "number": 2},
        "total": {"stage": "tests.support.toy:SUM", "first": "one", "others": ["two"]},
    }
    for name, values in changes.items():
        stages.setdefault(name, {}).update(values)
    return {"name": "toy", "seed": 3, "stages": stages}
