"""trl's KTO trainer (arXiv 2402.01306) on rows that are tokenized already, in micro-batches that stay together.

What is overridden is private in trl, so ``tests/training/test_kto_trainer.py`` fails when an upgrade moves it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from trl.trainer.kto_trainer import KTOTrainer

from align.training.dpo_trainer import ScoredByReference
from align.training.held_out import scoring
from align.training.order import by_length
from align.training.rows import Encoded
from align.training.trainers import SCORING_TOKENS
from align.training.unpaired import GroupOrder


class PreparedKTO(ScoredByReference, KTOTrainer):  # type: ignore[misc]
    """Rows: ``prompt_ids``, ``completion_ids``, ``label``, ``ref_logps``, and ``KL_completion_ids``, ``ref_KL_logps``
    where the loss has a reference point. ``groups`` are the micro-batches of row numbers.
    """

    groups: Sequence[Sequence[int]]

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return GroupOrder(self.groups, self.args.seed)


def held_out(trainer: PreparedKTO, encoded: Encoded) -> dict[str, float]:
    """Scores of a KTO trainer's model on held-out answers, with one reference point for all of them.

    ``loss`` is KTO's (eq. 7 and 8) or APO-zero's; ``reference_point`` the mean drift on mismatched answers in nats, at
    least 0; ``accuracy`` the share of answers on the right side of it; ``margin`` beta times how much more the wanted
    drifted than the unwanted. A kind of answer that does not occur counts as 0 in ``margin``.
    """
    drifts = _drifts(trainer, encoded, "completion_ids", "ref_logps")
    point = 0.0
    if trainer.calculate_KL:
        point = max(0.0, float(_drifts(trainer, encoded, "KL_completion_ids", "ref_KL_logps").mean()))
    wanted = torch.tensor([bool(row["label"]) for row in encoded.rows])
    beyond = torch.where(wanted, drifts - point, point - drifts)
    weights = torch.where(wanted, trainer.desirable_weight, trainer.undesirable_weight)
    losses = weights * (1 - torch.sigmoid(trainer.beta * beyond))
    means = [float(drifts[side].mean()) if bool(side.any()) else 0.0 for side in (wanted, ~wanted)]
    return {
        "loss": float(losses.mean()),
        "accuracy": float((beyond > 0).double().mean()),
        "margin": trainer.beta * (means[0] - means[1]),
        "chosen_reward": trainer.beta * means[0],
        "rejected_reward": trainer.beta * means[1],
        "reference_point": point,
    }


def _drifts(trainer: PreparedKTO, encoded: Encoded, answers: str, reference: str) -> torch.Tensor:
    """Log-probability of each answer by the model less by the reference, nats. (N,), float64."""
    found = torch.zeros(len(encoded.rows), dtype=torch.float64)
    rows = [{**row, "completion_ids": row[answers]} for row in encoded.rows]
    lengths = [len(row["prompt_ids"]) + len(row["completion_ids"]) for row in rows]
    trainer.beta = trainer._beta_at(trainer.state.global_step)
    with scoring(trainer):
        for batch in by_length(lengths, SCORING_TOKENS):
            picked = [{name: rows[at][name] for name in ("prompt_ids", "completion_ids", "label")} for at in batch]
            inputs = trainer._prepare_inputs(trainer.data_collator(picked))
            labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
            outputs = trainer.model(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                labels=labels,
                use_cache=False,
                fused_lm_head=True,
            )
            sums = outputs.log_probs[:, -(labels.shape[1] - 1) :].double().sum(dim=1)
            given = torch.tensor([encoded.rows[at][reference] for at in batch], dtype=torch.float64)
            found[torch.tensor(batch)] = sums.cpu() - given
    return found
