"""Contexts of stages that train or merge, ready to run, on tiny models and a few rows."""

from __future__ import annotations

import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from align.config.runtime import Runtime
from align.config.stages.merge import MergeConfig
from align.config.stages.reward import RewardConfig
from align.config.stages.sft import DistillConfig, PretrainConfig
from align.data.rows import write_rows
from align.pipeline.context import StageContext
from align.pipeline.registry import STAGES
from align.store.artifacts import Artifact, Kind
from tests.support.training.harness import context, data_artifact

TRANSFORMERS = Runtime.model_validate({"device": "cpu", "engine": {"name": "transformers"}})
"""Sampling by transformers on a CPU."""

# ---- preferences ----

PREFERENCE_KINDS: dict[str, dict[str, Any]] = {
    "dpo": {"losses": {"sigmoid": 1.0, "bco_pair": 0.3, "sft": 0.2}, "beta_schedule": "cosine", "final_beta": 0.02},
    "kto": {"batch_size": 16},  # three steps an epoch, as the others
    "orpo": {},
    "cpo": {"loss": "hinge"},
    "simpo": {},
}
"""Stages on preferences, with settings that use much of each."""


def preference_stage(root: Path, model: Path, kind: str, **fields: Any) -> StageContext:
    """Return a stage on 24 pairs that trains ``model``."""
    defaults = {
        "learning_rate": 3e-3,
        "batch_size": 8,
        "max_steps": 6,
        "epochs": 2,
        "max_length": 128,
        "precision": "float32",
    }
    config = STAGES[kind].config_class()(policy="model", data="data", **(defaults | fields))
    return context(root, config, model, data_artifact(root / "data", Kind.PREFERENCES, train=24), "policy")


# ---- distill, pretrain, reward ----


def distill_stage(root: Path, student: Path, teacher: Path, /, **fields: Any) -> StageContext:
    """Return a stage on 24 answers; the cache is next to ``root``, so that stages share it."""
    defaults = {"learning_rate": 3e-3, "batch_size": 8, "max_length": 64, "precision": "float32"}
    config = DistillConfig(**({"model": "model", "teacher": "teacher", "data": "data"} | defaults | fields))
    stage = context(root, config, student, data_artifact(root / "data", Kind.INSTRUCTIONS, train=24, test=8))
    folder = root / "teacher"
    if not folder.exists():
        folder.mkdir()
        (folder / "model").symlink_to(teacher)
    teacher_artifact = Artifact("teacher", Kind.MODEL, folder, {"key": str(teacher)})
    inputs = {**stage.inputs, "teacher": teacher_artifact}
    return replace(stage, inputs=inputs, runtime=TRANSFORMERS, cache=root.parent / "cache")


PRETRAIN_FIELDS: dict[str, Any] = {
    "model": "model",
    "data": "data",
    "learning_rate": 1e-2,
    "batch_size": 4,
    "max_length": 64,
    "precision": "float32",
}


def verse(number: int) -> str:
    """Return a text of 2 to 13 words of a small vocabulary."""
    chance = random.Random(number)
    return " ".join(chance.choice(["kilo", "lima", "mike", "oscar"]) for _ in range(chance.randrange(2, 14))) + "."


def texts_artifact(folder: Path, train: int = 60, test: int = 12) -> Artifact:
    """Write verses as an artifact of plain texts."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, numbers in (("train", range(train)), ("test", range(train, train + test))):
        write_rows(folder / f"{split}.parquet", [{"id": str(n), "source": "t", "text": verse(n)} for n in numbers])
    return Artifact("data", Kind.TEXTS, folder, {})


def pretrain_stage(root: Path, model: Path, **fields: Any) -> StageContext:
    """Return a stage on 60 verses."""
    config = PretrainConfig(**(PRETRAIN_FIELDS | fields))
    return context(root, config, model, texts_artifact(root / "data"))


def reward_config(**fields: Any) -> RewardConfig:
    """Return settings of a few quick steps in float32."""
    defaults = {"learning_rate": 3e-3, "batch_size": 8, "max_length": 128, "precision": "float32"}
    return RewardConfig(model="model", data="data", **(defaults | fields))


def reward_stage(root: Path, model: Path, data: Artifact, **fields: Any) -> StageContext:
    """Return a stage that trains a reward model on ``data``."""
    return context(root, reward_config(**fields), model, data)


# ---- merge ----


def perturbed_copy(source: Path, folder: Path, seed: int, size: float = 0.01) -> Path:
    """Copy a checkpoint with noise on its weights, as if it had been trained from ``source``."""
    shutil.copytree(source, folder)
    generator = torch.Generator().manual_seed(seed)
    weights = load_file(source / "model.safetensors")
    for name in sorted(weights):
        if name != "lm_head.weight":
            weights[name] = weights[name] + size * torch.randn(weights[name].shape, generator=generator)
    if "lm_head.weight" in weights:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def model_artifact(name: str, model: Path, kind: Kind) -> Artifact:
    """Return the artifact that holds the folder ``model``."""
    return Artifact(name, kind, model.parent, {})


def merge_stage(root: Path, folders: dict[str, Path], kind: Kind = Kind.POLICY, **fields: Any) -> StageContext:
    """Return a stage that merges the checkpoints in ``folders``, by their stages' names."""
    config = MergeConfig(**fields)
    inputs: dict[str, Any] = {
        name: [model_artifact(stage, folders[stage], kind) for stage in getattr(config, name)]
        for name in ("policies", "rewards")
    }
    inputs["base"] = None
    if config.base is not None:
        inputs["base"] = model_artifact(config.base, folders[config.base], Kind.MODEL)
    for folder in ("output", "checkpoints"):
        (root / folder).mkdir(parents=True)
    return StageContext(
        "soup", config, inputs, 5, Runtime(device="cpu"), root / "output", root / "checkpoints", root / "events.jsonl"
    )
