"""trl's DPO trainer on rows that are tokenized already and carry the reference's log-probabilities.

What is overridden is private in trl, so ``tests/training/test_dpo_trainer.py`` fails when an upgrade moves it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from trl.trainer.dpo_trainer import DPOTrainer

from align.training.trainers import Prepared


class _NoReference(torch.nn.Module):
    """Handed to trl as the reference model, so that it makes none: no copy of an adapter, whatever its method."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("the reference's log-probabilities are columns of the rows")


class ScoredByReference(Prepared):
    """Mixed in before trl's DPO or KTO trainer: the rows carry what a reference made of them, and beta may move.

    ``beta_at`` gives beta by the number of optimizer steps done.
    """

    state: Any
    beta: float
    _metrics: Any

    def __init__(self, *, model: Any, beta_at: Callable[[int], float], **kwargs: Any) -> None:
        self._beta_at = beta_at
        # trl copies a fresh adapter as its reference, which not every method can do.
        reference = _NoReference(model.config) if isinstance(model, PeftModel) else None
        super().__init__(model=model, ref_model=reference, **kwargs)  # type: ignore[call-arg]
        self.ref_model = None

    def _precompute_ref_logps(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        self.beta = self._beta_at(self.state.global_step)
        self._metrics["train" if self.model.training else "eval"]["beta"].append(self.beta)
        return super().compute_loss(*args, **kwargs)  # type: ignore[misc]


class PreparedDPO(ScoredByReference, DPOTrainer):  # type: ignore[misc]
    """Rows: ``prompt_ids``, ``chosen_ids``, ``rejected_ids``, ``ref_chosen_logps``, ``ref_rejected_logps``."""
