"""Contexts of stages with checkpoints as inputs, and edits of their weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file

from align.config.base import Config
from align.config.runtime import Runtime
from align.pipeline.context import StageContext

WEIGHTS = "model.safetensors"


class Learner(Config):
    """What a stage like PPO says of itself."""

    reward_floor: float | None = 0.5
    critic_source: Literal["reward", "policy"] = "reward"


def context(
    folder: Path, inputs: dict[str, Any], waive: list[str] | None = None, config: Config | None = None
) -> StageContext:
    folder.mkdir(parents=True, exist_ok=True)
    runtime = Runtime.model_validate({"handover": {"waive": waive or []}})
    return StageContext("ppo", config or Learner(), inputs, 0, runtime, folder, folder, folder / "events.jsonl")


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS, {"format": "pt"})
