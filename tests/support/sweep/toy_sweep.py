"""Sweeps over the toy pipeline: two numbers and their sum, scaled; and a stage that evaluates without a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from align.config.base import Config, stage_input
from align.extensions.sweep.config import load_sweep
from align.extensions.sweep.plan import Sweep
from align.extensions.sweep.study import Study
from align.pipeline.context import StageContext
from align.registry import Stage
from align.store.artifacts import Kind
from align.store.store import Store
from tests.support import toy


class CurveConfig(Config):
    """A training run without a model: its curve rises to ``height``."""

    number: stage_input(Kind.PROMPTS)
    height: float = 1.0
    penalty: float = 1.0
    steps: int = 8
    kind: str = "plain"
    crash: bool = False
    pause: float = 0.0
    chooses: bool = False
    """True when validation rows choose the checkpoint, as in stages that train."""


def curve(context: StageContext) -> dict[str, Any]:
    import time

    if context.config.crash:
        raise RuntimeError("diverged")
    done = len(list(context.checkpoints.glob("step-*")))
    for step in range(done + 1, context.config.steps + 1):
        time.sleep(context.config.pause)
        (context.checkpoints / f"step-{step}").write_text("x")
        score = context.config.height * step / context.config.steps
        held_out = "validation_loss" if context.config.chooses else "test_loss"
        context.log(step, score=score, loss=1.0, **{held_out: 1.0 - score})
    (context.output / "height.txt").write_text(str(context.config.height))
    return {"height": context.config.height, "label": "x", "resumed_at": done}


class CardConfig(Config):
    """An evaluation without a model."""

    policies: list[stage_input(Kind.PROMPTS)]
    spoilt: bool = False


def card(context: StageContext) -> dict[str, Any]:
    estimates = {}
    for policy in context.inputs["policies"]:
        config = policy.record["config"]
        height, penalty = config["height"], config["penalty"]
        estimates[policy.stage] = {
            "gold": {"value": None if context.config.spoilt else height, "low": height - 0.1, "high": height + 0.1},
            "kl": {"value": height**2 / penalty, "low": None, "high": None},
            "ifeval.strict": {"value": 0.5, "low": 0.4, "high": 0.6},
        }
    (context.output / "scorecard.json").write_text(json.dumps({"estimates": estimates}))
    return {}


def _stage(kind: str, makes: Kind, name: str) -> Stage:
    base = "tests.support.sweep.toy_sweep"
    return Stage(kind, 1, makes, f"{base}:{kind.capitalize()}Config", f"{base}:{kind}", "", f"{base}:{name}")


# no checkpoint, so that nobody looks into it for weights
CURVE = _stage("curve", Kind.PROMPTS, "CURVE")
CARDS = _stage("card", Kind.SCORECARD, "CARDS")


def pipeline() -> dict[str, Any]:
    return {
        "name": "trained",
        "seed": 3,
        "stages": {
            "one": {"stage": "tests.support.toy:NUMBER", "number": 1},
            "ppo": {"stage": CURVE.path, "number": "one", "height": 0.5},
            "evaluate": {"stage": CARDS.path, "policies": ["ppo"]},
        },
    }


def write(folder: Path, raw: dict[str, Any] | None = None, **sweep: Any) -> str:
    """The sweep's file, beside that of its pipeline; ``sweep`` changes and adds keys, None takes one out."""
    (folder / "p.yaml").write_text(yaml.safe_dump(raw or pipeline(), sort_keys=False))
    block = {
        "name": "sw",
        "pipeline": str(folder / "p.yaml"),
        "space": {"stages.ppo.height": {"low": 0.0, "high": 1.0}},
        "maximize": "ppo.gold",
        "trials": 4,
        **sweep,
    }
    file = folder / "sweep.yaml"
    file.write_text(yaml.safe_dump({k: v for k, v in block.items() if v is not None}, sort_keys=False))
    return str(file)


def check(folder: Path, raw: dict[str, Any] | None = None, **sweep: Any) -> Sweep:
    file = write(folder, raw, **sweep)
    return Sweep.check(load_sweep(file), "sweep.yaml")


def opened(sweep: Sweep, folder: Path, lease: float | None = None, **options: Any) -> Study:
    return Study.open(Store.open(folder, lease=lease), sweep, **options)


__all__ = ["CARDS", "CURVE", "check", "opened", "pipeline", "toy", "write"]
