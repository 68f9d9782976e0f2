"""Save a reward model and prove that what was saved scores as what was trained.

A head that is missing from the file is drawn anew on loading, with no more than a line in a log.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from align.config.launch import rank
from align.models.loading import load_reward
from align.models.malloc import give_back
from align.models.sharding import whole
from align.models.tuning.apply import save_tuned
from align.training.held_out import scores
from align.training.saving import trained_model

TOLERANCE = 1e-3
"""Largest difference of a score, relative to its size (at least 1), that merging in float32 may leave."""


def save_reward(trainer: Any, tokenizer: Any, out_dir: Path, probe: Sequence[Sequence[int]]) -> float:
    """Write the trainer's model to ``out_dir`` with LoRA merged; returns the largest difference on ``probe``.

    Both are scored in float32. Raises ``RuntimeError`` when they differ by more than rounding.
    """
    with whole(trained_model(trainer)) as live:
        return 0.0 if rank() else _save(live.eval(), tokenizer, out_dir, probe)


def _save(live: Any, tokenizer: Any, out_dir: Path, probe: Sequence[Sequence[int]]) -> float:
    save_tuned(live, tokenizer, out_dir)
    give_back()
    pad = int(tokenizer.pad_token_id)
    with torch.no_grad():
        trained = scores(live, probe, pad)
        loaded = scores(load_reward(out_dir).to(next(live.parameters()).device), probe, pad)
    gaps = [abs(a - b) for a, b in zip(trained, loaded, strict=True)]
    if any(gap > TOLERANCE * max(1.0, abs(score)) for gap, score in zip(gaps, trained, strict=True)):
        raise RuntimeError(f"the saved reward model scores {loaded} where the trained one scores {trained}")
    return max(gaps)
