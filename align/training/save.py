"""Save a stage's trained weights; for a reward model, verify that the saved copy scores like the trained model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from align.config.runtime.launch import rank
from align.models.checkpoints.conversion import plain_of, stored_types
from align.models.checkpoints.sharding import full_model
from align.models.compute.precision import float32_products
from align.models.compute.processes import trim_malloc
from align.models.loading import load_reward, load_rounded_reward
from align.models.tuning.apply import save_tuned
from align.pipeline.context import StageContext
from align.training.held_out import scores
from align.training.thoughts import own_template

TOLERANCE = 1e-3
"""Largest difference of a score, relative to its size (at least 1), that folding in float32 may cause."""
NARROW_TOLERANCE = 5e-2
"""The same for a base in bfloat16, which the files hold in float32, or whose sums are rounded to bfloat16.

A score head that was not saved differs by about 1.
"""


def save(context: StageContext, trainer: Any, tokenizer: Any) -> None:
    """Write the trained model to ``model/``, from the first process; call it in all processes."""
    with full_model(unwrapped_model(trainer)) as trained:
        restore_router_fields(trainer, trained)
        tokenizer.chat_template = own_template(tokenizer)
        if rank() == 0:
            save_tuned(trained, tokenizer, context.output / "model")


def restore_router_fields(trainer: Any, model: Any) -> None:
    """Undo trl's changes to a mixture's config: a model that returns its routers' logits is slower to sample from."""
    config = plain_of(model).config.get_text_config()
    for name, value in getattr(trainer, "router_fields", {}).items():
        setattr(config, name, value)


def unwrapped_model(trainer: Any) -> Any:
    """Return the trainer's model without its parallel wrapper; ``full_model`` gathers a sharded model."""
    return trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)


def save_reward(trainer: Any, tokenizer: Any, out_dir: Path, probe: Sequence[Sequence[int]]) -> float:
    """Write the trainer's reward model to ``out_dir``, LoRA merged; return the largest score difference on ``probe``.

    transformers replaces a score head that is missing from the file by a random head, with no more than a log line. So
    both models are scored in float32. Raises ``RuntimeError`` when they differ by more than rounding.
    """
    with full_model(unwrapped_model(trainer)) as live:
        return 0.0 if rank() else _save_and_compare(live.eval(), tokenizer, out_dir, probe)


def _save_and_compare(live: Any, tokenizer: Any, out_dir: Path, probe: Sequence[Sequence[int]]) -> float:
    save_tuned(live, tokenizer, out_dir)
    trim_malloc()
    # Score a few rows by the live model and by the saved copy, one after the other on the device.
    pad = int(tokenizer.pad_token_id)
    device = next(live.parameters()).device
    has_narrow_files = stored_types(out_dir) != {"F32"}
    is_narrow = any(parameter.dtype == torch.bfloat16 for parameter in live.parameters())
    with torch.no_grad():
        with float32_products(live):
            trained = scores(live, probe, pad)
        live.to("cpu")
        copy = load_rounded_reward(out_dir) if has_narrow_files else load_reward(out_dir)
        with float32_products(copy):
            loaded = scores(copy.to(device), probe, pad)
        del copy
        live.to(device)
    gaps = [abs(a - b) for a, b in zip(trained, loaded, strict=True)]
    tolerance = NARROW_TOLERANCE if is_narrow else TOLERANCE
    if any(gap > tolerance * max(1.0, abs(score)) for gap, score in zip(gaps, trained, strict=True)):
        raise RuntimeError(f"the saved reward model scores {loaded} where the trained one scores {trained}")
    return max(gaps)
