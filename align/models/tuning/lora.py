"""LoRA: low-rank adapters beside frozen matrices (arXiv 2106.09685), put there by peft."""

from __future__ import annotations

from typing import Any

import torch

from align.errors import UserError
from align.tuning import LoraTuning


def wrap(model: Any, tuning: LoraTuning, seed: int) -> Any:
    """``model`` with LoRA adapters drawn from ``seed``.

    A reward model's score head is trained in full and saved with the adapters. The caller's randomness is untouched.
    Raises ``UserError`` where the targets fit no module.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    classifier = hasattr(model, "score")
    config = LoraConfig(
        r=tuning.rank,
        lora_alpha=tuning.alpha,  # type: ignore[arg-type]  # peft divides it, so a fraction is fine
        lora_dropout=tuning.dropout,
        target_modules=tuning.targets,
        task_type=TaskType.SEQ_CLS if classifier else TaskType.CAUSAL_LM,
        modules_to_save=["score"] if classifier else None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return get_peft_model(model, config)
        except ValueError as error:
            raise UserError(f"tuning.targets: {tuning.targets} fits no module of this model: {error}") from None
