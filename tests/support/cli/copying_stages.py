"""Stages that "train" a checkpoint by copying a folder, which gives a chain of records in no time."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from align.config.base import Config, stage_input
from align.pipeline.context import StageContext
from align.registry import Stage
from align.store.artifacts import GENERATORS, Kind


class TrainedConfig(Config):
    """The checkpoint to train, and the folder that is copied as the result."""

    model: stage_input(*GENERATORS)  # type: ignore[valid-type]
    folder: str


class BaseConfig(Config):
    """A base model's folder."""

    folder: str


def copy_base(context: StageContext) -> dict[str, Any]:
    """Copy the folder as a base model."""
    shutil.copytree(context.config.folder, context.output / "model")
    return {}


def copy_trained(context: StageContext) -> dict[str, Any]:
    """Copy the folder."""
    assert (context.artifact("model").model / "config.json").is_file()
    shutil.copytree(context.config.folder, context.output / "model")
    for step in range(1, 4):
        context.log(step, loss=1.0 / (step + len(Path(context.config.folder).parent.name)))
    return {}


def _stage(name: str, makes: Kind) -> Stage:
    return Stage(
        name, 1, makes, f"{__name__}:TrainedConfig", f"{__name__}:copy_trained", name, f"{__name__}:{name.upper()}"
    )


POLICY = _stage("policy", Kind.POLICY)
REWARD = _stage("reward", Kind.REWARD)
MODEL = Stage("found", 1, Kind.MODEL, f"{__name__}:BaseConfig", f"{__name__}:copy_base", "found", f"{__name__}:MODEL")
