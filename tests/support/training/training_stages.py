"""Contexts of small training stages on the tiny model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from align.data.rows import assistant, user, write_rows
from align.pipeline.context import StageContext
from align.pipeline.registry import STAGES
from align.store.artifacts import Artifact, Kind
from tests.support.training.harness import context, data_artifact

FULL: dict[str, Any] = {"method": "full"}


def make_stage(kind: str, root: Path, model: Path, tuning: dict[str, Any], **fields: Any) -> StageContext:
    """Return the context of a stage on preference pairs; a second one with the same ``root`` resumes the first."""
    source = "model" if kind in ("sft", "reward") else "policy"
    defaults = {"learning_rate": 3e-3, "epochs": 3, "batch_size": 8, "micro_batch_size": 4, "max_length": 128}
    config = STAGES[kind].config_class()(**{source: "model"}, data="data", tuning=tuning, **{**defaults, **fields})
    return context(root, config, model, data_artifact(root / "data", Kind.PREFERENCES), source)


def make_replay_stage(kind: str, root: Path, model: Path, **fields: Any) -> StageContext:
    """Return the context of a stage that replays general rows."""
    stage = make_stage(kind, root, model, FULL, replay="general", **fields)
    return dataclasses.replace(stage, inputs={**stage.inputs, "replay": general_rows(root / "general")})


def general_rows(folder: Path, count: int = 12) -> Artifact:
    """Write rows of another task, to count up."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        rows = [
            {
                "id": str(number),
                "source": "general",
                "checks": "",
                "prompt": [user(f"{number} {number + 1}")],
                "completion": [assistant(f"then {number + 2}")],
            }
            for number in range(count)
        ]
        write_rows(folder / f"{split}.parquet", rows)
    return Artifact("general", Kind.INSTRUCTIONS, folder, {})
