"""trl's ORPO trainer (arXiv 2403.07691) for tokenized rows.

Experimental in trl; ``tests/training/test_cpo_trainer.py`` covers the overridden methods. It is a separate module,
because trl may drop ORPO and keep CPO.
"""

from __future__ import annotations

import torch

from align.training.experimental import PairForward, experimental

ORPOTrainer = experimental("orpo", "ORPOTrainer")
Arguments = experimental("orpo", "ORPOConfig")


class PreparedORPO(PairForward, ORPOTrainer):  # type: ignore[misc,valid-type]
    """Rows: ``prompt_ids``, ``chosen_ids``, ``rejected_ids``. No reference: the loss is on the policy's own odds."""

    averaged = True
    own_weight = 1.0

    def __init__(self, *, prompt_too: bool, **kwargs: object) -> None:
        self.prompt_too = prompt_too
        super().__init__(**kwargs)  # type: ignore[arg-type]

    def pair_losses(self, chosen: torch.Tensor, rejected: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return losses and both sides' rewards, each (B,), from log-probabilities (B,).

        The trained loss is their mean plus the chosen sides' loss per token.
        """
        log_odds, chosen_rewards, rejected_rewards, _, _ = self.odds_ratio_loss(chosen, rejected)
        return -log_odds, chosen_rewards, rejected_rewards
