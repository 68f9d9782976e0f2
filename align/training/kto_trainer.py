"""trl's KTO trainer (arXiv 2402.01306) for tokenized rows, in fixed micro-batches.

Private methods of trl are overridden; ``tests/training/test_kto_trainer.py`` fails when an upgrade changes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import send_to_device
from trl.trainer.kto_trainer import KTOTrainer

from align.training.dpo_trainer import ScoredByReference
from align.training.held_out import scoring
from align.training.order import by_length
from align.training.rows import Encoded
from align.training.trainers import SCORING_TOKENS
from align.training.unpaired import GroupOrder


class PreparedKTO(ScoredByReference, KTOTrainer):  # type: ignore[misc]
    """Rows: ``prompt_ids``, ``completion_ids``, ``label``, ``ref_logps``, and ``KL_completion_ids``, ``ref_KL_logps``
    if the loss has a reference point. ``groups`` are the micro-batches of row indices.
    """

    groups: Sequence[Sequence[int]]

    def row_order(self) -> Any:
        """Return the sampler of the fixed micro-batches."""
        return GroupOrder(self.groups, self.args.seed)


def held_out(trainer: PreparedKTO, encoded: Encoded) -> dict[str, float]:
    """Return scores of a KTO trainer's model on held-out answers, with one reference point for all of them.

    ``loss`` is KTO's (eq. 7 and 8) or APO-zero's. ``reference_point`` is the mean drift on mismatched answers in nats,
    at least 0; ``accuracy`` the share of answers on the right side of it; ``margin`` beta times the difference of the
    mean drifts of desirable and undesirable answers. A kind of answer that does not occur counts as 0 in ``margin``.
    """
    drifts = _drifts(trainer, encoded, "completion_ids", "ref_logps")
    reference_point = 0.0
    if trainer.calculate_KL:
        reference_point = max(0.0, float(_drifts(trainer, encoded, "KL_completion_ids", "ref_KL_logps").mean()))
    is_desirable = torch.tensor([bool(row["label"]) for row in encoded.rows])
    # Each answer's distance from the reference point, positive on its correct side.
    margins = torch.where(is_desirable, drifts - reference_point, reference_point - drifts)
    weights = torch.where(is_desirable, trainer.desirable_weight, trainer.undesirable_weight)
    losses = weights * (1 - torch.sigmoid(trainer.beta * margins))
    means = [float(drifts[side].mean()) if bool(side.any()) else 0.0 for side in (is_desirable, ~is_desirable)]
    return {
        "loss": float(losses.mean()),
        "accuracy": float((margins > 0).double().mean()),
        "margin": trainer.beta * (means[0] - means[1]),
        "chosen_reward": trainer.beta * means[0],
        "rejected_reward": trainer.beta * means[1],
        "reference_point": reference_point,
    }


def _drifts(trainer: PreparedKTO, encoded: Encoded, answers: str, reference: str) -> torch.Tensor:
    """Return each answer's log-probability by the model minus by the reference, in nats: (N,) float64."""
    drifts = torch.zeros(len(encoded.rows), dtype=torch.float64)
    mask = answers.replace("_ids", "_mask")
    rows: list[dict[str, Any]] = [
        {**row, "completion_ids": row[answers], "completion_mask": row.get(mask)} for row in encoded.rows
    ]
    lengths = [len(row["prompt_ids"]) + len(row["completion_ids"]) for row in rows]
    # Held-out losses use the beta of the current step, as the next training step would.
    trainer.beta = trainer._beta_at(trainer.state.global_step)
    with scoring(trainer):
        for batch in by_length(lengths, SCORING_TOKENS):
            names = ("prompt_ids", "completion_ids", "completion_mask", "label")
            picked = [{name: rows[row][name] for name in names} for row in batch]
            inputs = send_to_device(trainer.data_collator(picked), trainer.args.device)
            labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
            outputs = trainer.model(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                labels=labels,
                use_cache=False,
                fused_lm_head=True,
            )
            # Methods with virtual tokens return more positions than the row has.
            sums = outputs.log_probs[:, -(labels.shape[1] - 1) :].double().sum(dim=1)
            reference_sums = torch.tensor([encoded.rows[row][reference] for row in batch], dtype=torch.float64)
            drifts[torch.tensor(batch)] = sums.cpu() - reference_sums
    return drifts
