"""Stages that "train" a checkpoint by copying a folder: a chain of records without the time that training takes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from align.config.base import Config, stage_input
from align.pipeline.context import StageContext
from align.pipeline.registry import Stage
from align.store.artifacts import GENERATORS, Kind


class TrainedConfig(Config):
    """What it is trained from, and the folder that it comes to."""

    model: stage_input(*GENERATORS)  # type: ignore[valid-type]
    folder: str


class FoundConfig(Config):
    """A base model's folder."""

    folder: str


def found(context: StageContext) -> dict[str, Any]:
    """Copy the folder."""
    shutil.copytree(context.config.folder, context.output / "model")
    return {}


def trained(context: StageContext) -> dict[str, Any]:
    """Copy the folder."""
    assert (context.artifact("model").model / "config.json").is_file()
    shutil.copytree(context.config.folder, context.output / "model")
    for step in range(1, 4):
        context.log(step, loss=1.0 / (step + len(Path(context.config.folder).parent.name)))
    return {}


def _stage(name: str, makes: Kind) -> Stage:
    return Stage(name, 1, makes, f"{__name__}:TrainedConfig", f"{__name__}:trained", name, f"{__name__}:{name.upper()}")


POLICY = _stage("policy", Kind.POLICY)
REWARD = _stage("reward", Kind.REWARD)
MODEL = Stage("found", 1, Kind.MODEL, f"{__name__}:FoundConfig", f"{__name__}:found", "found", f"{__name__}:MODEL")
