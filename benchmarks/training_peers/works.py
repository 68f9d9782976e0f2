"""The works that ``training_vs_peers`` measures, and the settings that every side gets alike. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["sft", "reward", "dpo", "kto"]
Tuning = Literal["lora", "full"]

RANK, ALPHA = 16, 32
"""LoRA on every linear layer but the head, without dropout."""
BETA = 0.1
"""Of DPO and KTO."""
SEED = 17


@dataclass(frozen=True)
class Work:
    """One kind of training. ``rows`` is the default number of rows (or pairs) of its epoch."""

    name: str
    kind: Kind
    tuning: Tuning
    max_length: int
    learning_rate: float
    rows: int

    @property
    def has_reference(self) -> bool:
        """True if the loss compares with a reference model."""
        return self.kind in ("dpo", "kto")


WORKS = {
    work.name: work
    for work in (
        Work("sft_lora", "sft", "lora", 256, 2e-4, 64),
        Work("sft_full", "sft", "full", 256, 2e-5, 64),
        Work("reward_full", "reward", "full", 512, 1e-5, 32),
        Work("dpo_lora", "dpo", "lora", 512, 5e-5, 32),
        Work("dpo_full", "dpo", "full", 512, 1e-6, 32),
        Work("kto_lora", "kto", "lora", 512, 5e-5, 48),
    )
}


@dataclass(frozen=True)
class Settings:
    """Settings that are equal on all sides.

    Args:
        checkpointing: Recompute activations in the backward pass.
        precision: Type of the matrix products, ``bfloat16`` or ``float32``.
    """

    batch: int = 8
    micro_batch: int = 8
    checkpointing: bool = False
    precision: str = "bfloat16"

    @property
    def accumulation(self) -> int:
        """Micro-batches of an optimizer step."""
        return self.batch // self.micro_batch
