"""trl's ORPO trainer (arXiv 2403.07691) on rows tokenized already.

Experimental in trl. What is overridden is held by ``tests/training/test_cpo_trainer.py``.
"""

from __future__ import annotations

import torch

from align.training.experimental import PairForward, experimental

ORPOTrainer = experimental("orpo", "ORPOTrainer")
Arguments = experimental("orpo", "ORPOConfig")


class PreparedORPO(PairForward, ORPOTrainer):  # type: ignore[misc,valid-type]
    """Rows: ``prompt_ids``, ``chosen_ids``, ``rejected_ids``. No reference: odds of the policy's own answers."""

    averaged = True
    own_weight = 1.0

    def __init__(self, *, prompt_too: bool, **kwargs: object) -> None:
        self.prompt_too = prompt_too
        super().__init__(**kwargs)  # type: ignore[arg-type]

    def pair_losses(self, chosen: torch.Tensor, rejected: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Losses and rewards of pairs; the loss that is trained is their mean and the chosen sides' loss per token."""
        gains, one, other, _, _ = self.odds_ratio_loss(chosen, rejected)
        return -gains, one, other
