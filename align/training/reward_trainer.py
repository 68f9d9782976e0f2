"""trl's RewardTrainer with losses of ``align.methods``, a variant that predicts numbers, and its held-out scores.

Private methods of trl are overridden in ``trainers.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from trl.trainer.reward_trainer import DataCollatorForPreference, RewardTrainer

from align.evaluation.calibration import ranks
from align.methods.call import Method
from align.methods.losses import bradley_terry
from align.methods.records import PairScores
from align.models.reward import Aggregate, combine_steps
from align.training.held_out import pair_accuracy, row_batches, scoring
from align.training.rows import ROW, Encoded, Row, collate_numbers, pad_right
from align.training.trainers import PreparedReward

ScoreLoss = Literal["mse", "bce"]


@dataclass
class RewardCollator(DataCollatorForPreference):  # type: ignore[misc]
    """Collates pairs, chosen answers above rejected answers, and the rows' numbers if an own loss needs them."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return trl's batch with the rows' numbers."""
        batch: dict[str, Any] = super().torch_call(examples)
        return batch | collate_numbers(examples)


class _PairLoss(RewardTrainer):  # type: ignore[misc]
    model: Any
    args: Any
    _signature_columns: Any
    pair_loss: Method = Method(bradley_terry)
    label_smoothing: float = 0.0
    sources: Sequence[Row] = ()

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the mean of the pairs' losses, and the term that centers scores; trl's part logs its metrics."""
        rows = [self.sources[row] for row in inputs.pop(ROW).tolist()] if ROW in inputs else []
        _, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        # trl stacks the chosen sides above the rejected sides.
        chosen, rejected = outputs.logits.squeeze(-1).chunk(2)
        pairs = PairScores(chosen, rejected, inputs.get("margin", torch.zeros_like(chosen)), rows)
        when = f"at step {self.state.global_step + 1}"
        result = self.pair_loss(pairs, (len(pairs),), when, fields={"label_smoothing": self.label_smoothing})
        for name, value in result.means().items():
            self._metrics["train" if self.model.training else "eval"][name].append(value)
        loss = result.values.mean()
        if self.args.center_rewards_coefficient is not None:
            loss = loss + self.args.center_rewards_coefficient * ((chosen + rejected) ** 2).mean()
        return (loss, outputs) if return_outputs else loss


class PairReward(PreparedReward, _PairLoss):  # type: ignore[misc]
    """Rows: ``chosen_ids``, ``rejected_ids`` and optionally ``margin``. The loss is ``pair_loss``."""

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            self._signature_columns = [*(self._signature_columns or []), ROW]


class _Numbers(RewardTrainer):  # type: ignore[misc]
    score_loss: ScoreLoss = "mse"
    label_smoothing: float = 0.0

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the scalar mean over answers, or over steps, without trl's metrics, which are for pairs."""
        scores, outputs = scores_at(model, inputs)
        loss = number_loss(scores, inputs["targets"], self.score_loss, self.label_smoothing)
        return (loss, outputs) if return_outputs else loss


class NumberReward(PreparedReward, _Numbers):  # type: ignore[misc]
    """Rows: ``input_ids``, ``places`` (tokens with a score) and ``targets`` (the scores to predict)."""

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["input_ids", "places", "targets"]  # type: ignore[assignment]


def number_loss(scores: torch.Tensor, targets: torch.Tensor, loss: ScoreLoss, smoothing: float) -> torch.Tensor:
    """Return the scalar squared error, or cross-entropy, of scores (P,) against targets (P,).

    For cross-entropy targets are in [0, 1] and move towards the other side by the share ``smoothing``.
    """
    if loss == "mse":
        return F.mse_loss(scores, targets)
    return F.binary_cross_entropy_with_logits(scores, targets * (1 - smoothing) + (1 - targets) * smoothing)


def scores_at(model: Any, inputs: Any) -> tuple[torch.Tensor, Any]:
    """Return the scores (P,) at ``places`` (P, 2) of (row, token), by one forward pass, and the model's output.

    transformers' classifiers apply the head at every token and return the last token's score, so a hook reads the
    head's output.
    """
    head_outputs: list[torch.Tensor] = []
    handle = score_head(model).register_forward_hook(lambda module, inputs_, output: head_outputs.append(output))
    try:
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
    finally:
        handle.remove()
    # The head's output is (B, T, 1).
    rows, tokens = inputs["places"].unbind(dim=1)
    return head_outputs[-1][rows, tokens, 0].float(), outputs


def score_head(model: Any) -> torch.nn.Module:
    """Return the outermost module named ``score``, which includes peft's wrapper."""
    heads = [(name, module) for name, module in model.named_modules() if name.rpartition(".")[2] == "score"]
    _, outermost = min(heads, key=lambda head: head[0].count("."))
    return outermost  # type: ignore[no-any-return]


class NumberCollator:
    """Collate right-padded rows; ``places`` (P, 2) are row and token, ``targets`` (P,) their numbers."""

    def __init__(self, pad: int) -> None:
        self.pad = pad

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids, mask = pad_right([row["input_ids"] for row in rows], self.pad)
        places = [[index, place] for index, row in enumerate(rows) for place in row["places"]]
        targets = [target for row in rows for target in row["targets"]]
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "places": torch.tensor(places),
            "targets": torch.tensor(targets, dtype=torch.float32),
        }


def predictions(trainer: Any, encoded: Encoded) -> list[list[float]]:
    """Return the score at every place of every row."""
    scores_of_rows: list[list[float]] = [[] for _ in encoded.rows]
    with scoring(trainer):
        for batch, inputs in row_batches(trainer, encoded):
            scores = iter(scores_at(trainer.model, inputs)[0].tolist())
            for row in batch:
                scores_of_rows[row] = [next(scores) for _ in encoded.rows[row]["places"]]
    return scores_of_rows


def numbers(trainer: Any, encoded: Encoded) -> dict[str, float]:
    """Return a regression's ``loss``, ``pearson``, ``spearman``, and ``accuracy`` over ``disjoint_pairs``."""
    scores = [row[0] for row in predictions(trainer, encoded)]
    targets = [float(row["targets"][0]) for row in encoded.rows]
    better, worse = disjoint_pairs(scores, targets)
    return {
        "loss": _loss(trainer, scores, targets),
        "pearson": correlation(scores, targets),
        "spearman": correlation(ranks(scores), ranks(targets)),
        "accuracy": pair_accuracy(better, worse) if better else 0.5,
    }


def steps(trainer: Any, encoded: Encoded) -> dict[str, float]:
    """Return a process reward model's scores.

    ``loss``; ``step_accuracy`` at even odds; ``accuracy``, right steps above wrong steps over disjoint pairs;
    ``answer_accuracy_<aggregate>``, answers without a wrong step above answers with a wrong step.
    """
    rows = predictions(trainer, encoded)
    scores = [score for row in rows for score in row]
    targets = [float(target) for row in encoded.rows for target in row["targets"]]
    better, worse = disjoint_pairs(scores, [float(target >= 0.5) for target in targets])
    # A score is a logit: above 0, a right step is more likely than a wrong one.
    right = sum((score > 0) == (target >= 0.5) for score, target in zip(scores, targets, strict=True))
    scores_by_name = {
        "loss": _loss(trainer, scores, targets),
        "step_accuracy": right / len(scores),
        "accuracy": pair_accuracy(better, worse) if better else 0.5,
    }
    sound = [float(min(row["targets"]) >= 0.5) for row in encoded.rows]
    for how in get_args(Aggregate):
        better, worse = disjoint_pairs([combine_steps(row, how) for row in rows], sound)
        if better:
            scores_by_name[f"answer_accuracy_{how}"] = pair_accuracy(better, worse)
    return scores_by_name


def disjoint_pairs(scores: Sequence[float], targets: Sequence[float]) -> tuple[list[float], list[float]]:
    """Return the scores of the better and the worse side of pairs; each row is in one pair at most.

    Rows are sorted by target, and the lower half is paired with the upper one. Pairs of equal targets are skipped. The
    pairs share no rows, so they are independent.
    """
    order = sorted(range(len(scores)), key=lambda row: (targets[row], row))
    half = len(order) // 2
    upper = order[len(order) - half :]
    pairs = [(high, low) for low, high in zip(order[:half], upper, strict=True) if targets[high] > targets[low]]
    return [scores[high] for high, _ in pairs], [scores[low] for _, low in pairs]


def correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Return Pearson's correlation; 0 if either does not vary."""
    a = torch.tensor(first, dtype=torch.float64)
    b = torch.tensor(second, dtype=torch.float64)
    a = a - a.mean()
    b = b - b.mean()
    norm = float(a.norm() * b.norm())
    return float(a @ b) / norm if norm > 0 else 0.0


def _loss(trainer: Any, scores: Sequence[float], targets: Sequence[float]) -> float:
    return float(number_loss(torch.tensor(scores), torch.tensor(targets), trainer.score_loss, 0.0))
