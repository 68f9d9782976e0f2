"""Scores on held-out rows: exact means over tokens or rows, independent of batches and padding.

trl averages the means of batches, so its numbers depend on the batch size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import send_to_device

from align.models.checkpoints.sharding import reshard
from align.models.compute.processes import trim_malloc
from align.pipeline.context import StageContext
from align.training.order import by_length
from align.training.rows import MASKED, Encoded, pad_right
from align.training.trainers import SCORING_TOKENS, ReportCount, report_nothing

DIVERGED = 1.5
"""Held-out loss of answers, as a multiple of the loss before training, above which training has diverged."""


@contextmanager
def scoring(trainer: Any) -> Iterator[None]:
    """Inside: evaluation mode, no gradients, the stage's precision. Restores training mode."""
    training = trainer.model.training
    trainer.model.eval()
    trim_malloc(garbage=False)
    try:
        with torch.no_grad(), trainer.accelerator.autocast():
            yield
    finally:
        trainer.model.train(training)
        # Without a backward pass FSDP2 leaves the parameters outside the layers gathered.
        reshard(trainer.model)


def row_batches(trainer: Any, encoded: Encoded, sides: int = 1) -> Iterator[tuple[list[int], Any]]:
    """Yield the row indices of each batch, and its inputs on the trainer's device; ``sides`` is 2 for pairs."""
    done = 0
    for batch in by_length(encoded.lengths, SCORING_TOKENS // sides):
        yield batch, send_to_device(trainer.data_collator([encoded.rows[row] for row in batch]), trainer.args.device)
        done += len(batch)
        trainer.report_scored(done, len(encoded.rows))


def supervised(trainer: Any, encoded: Encoded) -> dict[str, float]:
    """Return ``loss`` (nats per supervised token), ``token_accuracy`` and ``perplexity`` of an SFT trainer's model."""
    total = 0.0
    tokens = 0
    right = 0
    with scoring(trainer):
        for _, inputs in row_batches(trainer, encoded):
            outputs = trainer.model(**inputs, use_cache=False, fused_lm_head=True)
            total -= outputs.log_probs.double().sum().item()
            tokens += int(outputs.label_mask.sum())
            right += int(outputs.is_top1.sum())
    loss = total / tokens
    return {"loss": loss, "perplexity": float(torch.exp(torch.tensor(loss))), "token_accuracy": right / tokens}


def texts(trainer: Any, encoded: Encoded, size: int) -> dict[str, float]:
    """Return ``supervised`` of plain texts, and ``bits_per_byte`` over their ``size`` in bytes of UTF-8.

    Bits per byte compare models with different tokenizers, which loss per token does not.
    """
    scores = supervised(trainer, encoded)
    tokens = sum(label != MASKED for row in encoded.rows for label in row["labels"])
    return scores | {"bits_per_byte": scores["loss"] * tokens / math.log(2) / size}


def preferences(trainer: Any, encoded: Encoded) -> dict[str, float]:
    """Return ``loss``, ``accuracy`` and reward ``margin`` (nats times beta) of a DPO trainer, means over pairs.

    The rows of ``encoded`` have columns with the reference's log-probabilities.
    """
    sums = {"loss": 0.0, "accuracy": 0.0, "margin": 0.0, "chosen_reward": 0.0, "rejected_reward": 0.0}
    names = {
        "accuracy": "rewards/accuracies",
        "margin": "rewards/margins",
        "chosen_reward": "rewards/chosen",
        "rejected_reward": "rewards/rejected",
    }
    # compute_loss writes its metrics into the trainer, so save and restore the metrics of the training steps.
    metrics = {mode: dict(values) for mode, values in trainer._metrics.items()}
    with scoring(trainer):
        # Lengths are per pair, and both sides of a pair are rows of the batch.
        for batch, inputs in row_batches(trainer, encoded, sides=2):
            trainer._metrics["eval"].clear()
            sums["loss"] += float(trainer.compute_loss(trainer.model, inputs)) * len(batch)
            for name, key in names.items():
                sums[name] += trainer._metrics["eval"][key][-1] * len(batch)
    for mode, values in metrics.items():
        trainer._metrics[mode].clear()
        trainer._metrics[mode].update(values)
    return {name: value / len(encoded.rows) for name, value in sums.items()}


def scores(
    model: Any, sequences: Sequence[Sequence[int]], pad: int, group_size: int = 1, report: ReportCount = report_nothing
) -> list[float]:
    """Return a reward model's score of each sequence of token ids, in the surrounding context's precision.

    ``group_size`` sequences after each other share a prompt, and stay in one batch.
    """
    done = 0
    values = [0.0] * len(sequences)
    device = next(model.parameters()).device
    groups = [range(start, start + group_size) for start in range(0, len(sequences), group_size)]
    for batch in by_length([len(ids) for ids in sequences], SCORING_TOKENS, groups):
        ids, mask = pad_right([sequences[row] for row in batch], pad)
        outputs = model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)
        for row, score in zip(batch, outputs.logits[:, 0].float().tolist(), strict=True):
            values[row] = score
        done += len(batch)
        report(done, len(sequences))
    return values


def pair_accuracy(chosen: Sequence[float], rejected: Sequence[float]) -> float:
    """Return the share of pairs whose chosen side scores higher; a tie counts half, so a constant model gets 0.5."""
    correct = sum(a > b for a, b in zip(chosen, rejected, strict=True))
    ties = sum(a == b for a, b in zip(chosen, rejected, strict=True))
    return (correct + 0.5 * ties) / len(chosen)


def pairs(trainer: Any, encoded: Encoded, pad: int) -> dict[str, float]:
    """Return ``loss``, ``accuracy`` on the labels, ``accuracy_true`` if true scores are known, and margins.

    Pairs with equal true scores have no right answer, so ``accuracy_true`` excludes them.
    """
    sequences = [row[side] for row in encoded.rows for side in ("chosen_ids", "rejected_ids")]
    with scoring(trainer):
        values = scores(trainer.model, sequences, pad, group_size=2, report=trainer.report_scored)
    # The sequences alternate between chosen and rejected.
    chosen = values[0::2]
    rejected = values[1::2]
    gaps = torch.tensor(chosen) - torch.tensor(rejected)
    result = {
        "loss": float(-torch.nn.functional.logsigmoid(gaps).mean()),
        "accuracy": pair_accuracy(chosen, rejected),
        "margin": float(gaps.mean()),
        "score_mean": float(torch.tensor(values).mean()),
        "score_std": float(torch.tensor(values).std(correction=0)),
    }
    flips = mislabeled(encoded)
    if flips:
        better = [rejected[row] if flipped else chosen[row] for row, flipped in flips.items()]
        worse = [chosen[row] if flipped else rejected[row] for row, flipped in flips.items()]
        result["accuracy_true"] = pair_accuracy(better, worse)
    return result


def mislabeled(encoded: Encoded) -> dict[int, bool]:
    """Return for each row with two different true scores if the rejected side is better."""
    flips: dict[int, bool] = {}
    for index, row in enumerate(encoded.sources):
        chosen = row.get("chosen_score")
        rejected = row.get("rejected_score")
        if chosen is not None and rejected is not None and chosen != rejected:
            flips[index] = chosen < rejected
    return flips


def pair_facts(encoded: Encoded) -> dict[str, float]:
    """Return a reward model's baselines: ``test_length_accuracy``, the accuracy of preferring the longer side, and
    ``test_mislabeled``, the share of pairs labeled against their true scores, if these are known.
    """
    lengths = [[len(row[side]) for row in encoded.rows] for side in ("chosen_ids", "rejected_ids")]
    facts = {"test_length_accuracy": pair_accuracy(*lengths)}
    flips = mislabeled(encoded)
    return facts | ({"test_mislabeled": sum(flips.values()) / len(flips)} if flips else {})


def divergence_alarm(
    context: StageContext, step: int, before: Mapping[str, float], after: Mapping[str, float]
) -> dict[str, list[str]]:
    """Return ``alarms``, and warn, if held-out answers became much less likely; empty if not.

    Losses of pairs are no evidence: they may rise while more pairs are in order.
    """
    if "token_accuracy" not in after or "loss" not in before or not math.isfinite(before["loss"]):
        return {}
    if after["loss"] <= DIVERGED * before["loss"]:  # False for NaN
        return {}
    context.warn(
        f"{context.name}: step {step}: divergence: the held-out loss rose from {before['loss']:.4g} to "
        f"{after['loss']:.4g} nats a token, so the model answers worse than before training. Do not use it. Lower "
        f"learning_rate ({context.config.learning_rate:g}), or train for fewer steps if the training loss fell."
    )
    return {"alarms": [f"step {step}: divergence"]}
