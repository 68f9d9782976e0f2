"""trl's CPO trainer (arXiv 2401.08417), whose losses include SimPO's and AlphaPO's, for tokenized rows.

Experimental in trl; ``tests/training/test_cpo_trainer.py`` covers the overridden methods.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import send_to_device

from align.training.experimental import PairForward, experimental
from align.training.held_out import scoring
from align.training.order import by_length
from align.training.rows import Encoded
from align.training.trainers import SCORING_TOKENS

CPOTrainer = experimental("cpo", "CPOTrainer")
Arguments = experimental("cpo", "CPOConfig")


class PreparedCPO(PairForward, CPOTrainer):  # type: ignore[misc,valid-type]
    """Rows: ``prompt_ids``, ``chosen_ids``, ``rejected_ids``. No reference: the policy's own log-probabilities."""

    loss_type: str
    cpo_alpha: float

    @property
    def averaged(self) -> bool:  # type: ignore[override]
        return self.loss_type in ("ipo", "simpo")

    def pair_losses(self, chosen: torch.Tensor, rejected: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return losses and both sides' rewards, each (B,), from log-probabilities (B,).

        The trained loss is their mean plus ``own_weight`` times the chosen sides' loss per token.
        """
        losses, *rewards = self.cpo_loss(chosen, rejected)
        return losses, *rewards

    @property
    def own_weight(self) -> float:
        return self.cpo_alpha


def held_out(trainer: Any, encoded: Encoded) -> dict[str, float]:
    """Return scores of a CPO or ORPO trainer's model on held-out pairs: means over pairs, ``nll`` over tokens.

    ``loss`` is the trained loss, ``accuracy`` the share of pairs whose chosen side has the larger reward, ``margin``
    the mean difference. A reward is beta times a side's log-probability, or times its mean over tokens if the loss uses
    the mean.
    """
    sums = {"loss": 0.0, "accuracy": 0.0, "margin": 0.0, "chosen_reward": 0.0, "rejected_reward": 0.0}
    total, tokens = 0.0, 0
    with scoring(trainer):
        for batch in by_length(encoded.lengths, SCORING_TOKENS // 2):
            inputs = send_to_device(trainer.data_collator([encoded.rows[row] for row in batch]), trainer.args.device)
            chosen_logps, rejected_logps, _, _, loss = trainer.concatenated_forward(trainer.model, inputs)[:5]
            losses, chosen_rewards, rejected_rewards = trainer.pair_losses(chosen_logps, rejected_logps)
            token_count = inputs["attention_mask" if trainer.prompt_too else "completion_mask"][: len(batch), 1:].sum()
            total += float(loss) * int(token_count)
            tokens += int(token_count)
            # In the order of the keys of `sums`.
            values = (
                losses,
                (chosen_rewards > rejected_rewards).float(),
                chosen_rewards - rejected_rewards,
                chosen_rewards,
                rejected_rewards,
            )
            for name, value in zip(sums, values, strict=True):
                sums[name] += float(value.double().sum())
    means = {name: value / len(encoded.rows) for name, value in sums.items()}
    nll = total / tokens
    return {**means, "loss": means["loss"] + trainer.own_weight * nll, "nll": nll}
