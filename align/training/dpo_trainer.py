"""trl's DPO trainer for tokenized rows with the reference's log-probabilities, and the schedule of beta.

Private methods of trl are overridden; ``tests/training/test_dpo_trainer.py`` fails when an upgrade changes them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from peft import PeftModel
from trl.trainer.dpo_trainer import DPOTrainer

from align.training.answer_collators import MASKS
from align.training.trainers import Prepared


class _NoReference(torch.nn.Module):
    """Placeholder for trl's reference model. With it trl creates no reference and copies no adapter."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("the reference's log-probabilities are columns of the rows")


class ScoredByReference(Prepared):
    """Mixin before trl's DPO or KTO trainer: rows contain the reference's log-probabilities, and beta may change.

    ``beta_at`` returns beta for the number of finished optimizer steps.
    """

    state: Any
    beta: float
    _metrics: Any
    _signature_columns: list[str] | None

    def __init__(self, *, model: Any, beta_at: Callable[[int], float], **kwargs: Any) -> None:
        self._beta_at = beta_at
        # trl would copy a new adapter as its reference, which not every method supports.
        reference = _NoReference(model.config) if isinstance(model, PeftModel) else None
        super().__init__(model=model, ref_model=reference, **kwargs)  # type: ignore[call-arg]
        # The placeholder must not be prepared, moved or saved with the trainer.
        self.ref_model = None

    def _precompute_ref_logps(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        # Columns that are not named here would be removed from the rows.
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()  # type: ignore[misc]
            self._signature_columns = [*(self._signature_columns or []), *MASKS]

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        self.beta = self._beta_at(self.state.global_step)
        self._metrics["train" if self.model.training else "eval"]["beta"].append(self.beta)
        return super().compute_loss(*args, **kwargs)  # type: ignore[misc]


class PreparedDPO(ScoredByReference, DPOTrainer):  # type: ignore[misc]
    """Rows: ``prompt_ids``, ``chosen_ids``, ``rejected_ids``, ``ref_chosen_logps``, ``ref_rejected_logps``."""


BetaSchedule = Literal["constant", "linear", "cosine"]


def beta_at(step: int, steps: int, initial: float, final: float | None, schedule: BetaSchedule) -> float:
    """Return beta of optimizer step ``step`` (0 for the first) of ``steps``: ``initial`` to ``final``.

    It depends on the step only, so a resumed run continues the schedule. Steps after the last keep the final value,
    which scores the result.
    """
    if schedule == "constant" or final is None:
        return initial
    progress = min(step, steps - 1) / max(1, steps - 1)
    if schedule == "cosine":
        progress = (1 - math.cos(math.pi * progress)) / 2
    return initial + (final - initial) * progress
