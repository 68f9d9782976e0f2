"""A two-layer model that tells tokens apart as a trained one does, and checkpoints of it tuned by a method."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from align.models.loading import load_tokenizer
from align.models.tuning.apply import apply_tuning, load_for_tuning, save_tuned

SHARPER = 8.0
"""Logits of the tiny model are about 1, so tokens without a row in its head would have a share of the probability."""


def confident_copy(model_dir: Path, out_dir: Path) -> Path:
    """``model_dir`` with its last norm's weights and so its logits ``SHARPER`` times as large."""
    shutil.copytree(model_dir, out_dir)
    file = out_dir / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"] *= SHARPER
    save_file(weights, file, metadata={"format": "pt"})
    return out_dir


def changed(model: Any, seed: int = 1, size: float = 0.3) -> Any:
    """``model`` after a pretended training: every trained tensor moved at random."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += size * torch.randn(parameter.shape, generator=generator)
    return model


def tuned(source: Path, tuning: Any, *, reward: bool = False, seed: int = 1, size: float = 0.3) -> tuple[Any, Any]:
    """Model and tokenizer of ``source``, as a stage has them after training by ``tuning``."""
    tokenizer = load_tokenizer(source, tuning)
    model = apply_tuning(load_for_tuning(source, tuning, reward=reward), tuning, 3, tokenizer=tokenizer)
    return changed(model, seed, size).eval(), tokenizer


def saved(source: Path, tuning: Any, out_dir: Path, *, reward: bool = False, seed: int = 1) -> Path:
    """The same as a checkpoint in ``out_dir``."""
    model, tokenizer = tuned(source, tuning, reward=reward, seed=seed)
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    save_tuned(model, tokenizer, out_dir)
    return out_dir
