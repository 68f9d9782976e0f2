"""trl's RewardTrainer with smoothed labels and margins, and with numbers to predict in place of pairs.

The pairs' loss is trl's own, to which smoothing adds one term. What is private in trl is overridden in ``trainers.py``.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from trl.trainer.reward_trainer import RewardTrainer

from align.training.trainers import PreparedReward

ScoreLoss = Literal["mse", "bce"]


class _SmoothedPairs(RewardTrainer):  # type: ignore[misc]
    label_smoothing: float = 0.0

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if self.label_smoothing:
            chosen, rejected = outputs.logits.squeeze(-1).chunk(2)
            gap = chosen - rejected - inputs.get("margin", 0.0)
            # (1 - e) -log s(x) + e -log s(-x) = -log s(x) + e x
            loss = loss + self.label_smoothing * gap.mean()
        return (loss, outputs) if return_outputs else loss


class PairReward(PreparedReward, _SmoothedPairs):  # type: ignore[misc]
    """Rows: ``chosen_ids``, ``rejected_ids`` and perhaps ``margin``. Loss: Bradley-Terry, the chosen side ``margin``
    ahead (arXiv 2307.09288, eq. 2), a share ``label_smoothing`` of the labels taken to be wrong (2403.00409).
    """


class _Numbers(RewardTrainer):  # type: ignore[misc]
    score_loss: ScoreLoss = "mse"
    label_smoothing: float = 0.0

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean over answers, or over steps; trl's own metrics are of pairs, so none is kept."""
        scores, outputs = scores_at(model, inputs)
        loss = number_loss(scores, inputs["targets"], self.score_loss, self.label_smoothing)
        return (loss, outputs) if return_outputs else loss


class NumberReward(PreparedReward, _Numbers):  # type: ignore[misc]
    """Rows: ``input_ids``, ``places`` (tokens where a score is read) and ``targets`` (what it should be)."""

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["input_ids", "places", "targets"]  # type: ignore[assignment]


def number_loss(scores: torch.Tensor, targets: torch.Tensor, loss: ScoreLoss, smoothing: float) -> torch.Tensor:
    """Squared error, or cross-entropy with ``targets`` in [0, 1] moved ``smoothing`` of the way to the other side."""
    if loss == "mse":
        return F.mse_loss(scores, targets)
    return F.binary_cross_entropy_with_logits(scores, targets * (1 - smoothing) + (1 - targets) * smoothing)


def scores_at(model: Any, inputs: Any) -> tuple[torch.Tensor, Any]:
    """The score head's values at ``places`` (row, token), (P,), by one forward pass, and the model's own output.

    transformers' classifiers run the head at every token and then keep the last one's; the others are taken from the
    head itself.
    """
    seen: list[torch.Tensor] = []
    handle = score_head(model).register_forward_hook(lambda module, given, found: seen.append(found))
    try:
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
    finally:
        handle.remove()
    rows, tokens = inputs["places"].unbind(dim=1)
    return seen[-1][rows, tokens, 0].float(), outputs


def score_head(model: Any) -> torch.nn.Module:
    """The module named ``score``, with what PEFT may have put around it."""
    found = [(name.count("."), module) for name, module in model.named_modules() if name.rpartition(".")[2] == "score"]
    return min(found, key=lambda one: one[0])[1]  # type: ignore[no-any-return]


class NumberCollator:
    """Right-padded rows; ``places`` (P, 2) are row and token, ``targets`` (P,) one number for each."""

    def __init__(self, pad: int) -> None:
        self.pad = pad

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        width = max(len(row["input_ids"]) for row in rows)
        ids = torch.full((len(rows), width), self.pad)  # (B, T)
        mask = torch.zeros((len(rows), width), dtype=torch.long)
        for at, row in enumerate(rows):
            ids[at, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
            mask[at, : len(row["input_ids"])] = 1
        places = [[at, place] for at, row in enumerate(rows) for place in row["places"]]
        targets = [target for row in rows for target in row["targets"]]
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "places": torch.tensor(places),
            "targets": torch.tensor(targets, dtype=torch.float32),
        }
