"""Scores on held-out rows. Exact means over tokens or rows, whatever the batches and their padding.

trl averages batch means, so its numbers move with the batch size; these do not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from align.models.malloc import give_back
from align.models.sharding import forget_gathered
from align.training.order import by_length
from align.training.rows import MASKED, Encoded
from align.training.trainers import SCORING_TOKENS


@contextmanager
def scoring(trainer: Any) -> Iterator[None]:
    """Evaluation mode, no gradients, the stage's precision; training mode is restored."""
    training = trainer.model.training
    trainer.model.eval()
    give_back(garbage=False)
    try:
        with torch.no_grad(), trainer.accelerator.autocast():
            yield
    finally:
        trainer.model.train(training)
        forget_gathered(trainer.model)


def supervised(trainer: Any, encoded: Encoded) -> dict[str, float]:
    """``loss`` (nats per supervised token), ``token_accuracy`` and ``perplexity`` of an SFT trainer's model."""
    total, tokens, right = 0.0, 0, 0
    with scoring(trainer):
        for batch in by_length(encoded.lengths, SCORING_TOKENS):
            inputs = trainer._prepare_inputs(trainer.data_collator([encoded.rows[at] for at in batch]))
            outputs = trainer.model(**inputs, use_cache=False, fused_lm_head=True)
            total -= outputs.log_probs.double().sum().item()
            tokens += int(outputs.label_mask.sum())
            right += int(outputs.is_top1.sum())
    loss = total / tokens
    return {"loss": loss, "perplexity": float(torch.exp(torch.tensor(loss))), "token_accuracy": right / tokens}


def texts(trainer: Any, encoded: Encoded, size: int) -> dict[str, float]:
    """As ``supervised`` of plain texts, and ``bits_per_byte``, their cost over their ``size`` in bytes of UTF-8.

    Bits per byte compare models whatever their tokenizers; loss per token does not.
    """
    found = supervised(trainer, encoded)
    tokens = sum(label != MASKED for row in encoded.rows for label in row["labels"])
    return found | {"bits_per_byte": found["loss"] * tokens / math.log(2) / size}


def preferences(trainer: Any, encoded: Encoded) -> dict[str, float]:
    """``loss``, ``accuracy`` and reward ``margin`` (nats times beta) of a DPO trainer, means over pairs.

    The rows of ``encoded`` have had their reference log-probabilities added by the trainer.
    """
    sums = {"loss": 0.0, "accuracy": 0.0, "margin": 0.0, "chosen_reward": 0.0, "rejected_reward": 0.0}
    names = {
        "accuracy": "rewards/accuracies",
        "margin": "rewards/margins",
        "chosen_reward": "rewards/chosen",
        "rejected_reward": "rewards/rejected",
    }
    kept = {mode: dict(values) for mode, values in trainer._metrics.items()}
    with scoring(trainer):
        for batch in by_length(encoded.lengths, SCORING_TOKENS // 2):
            inputs = trainer._prepare_inputs(trainer.data_collator([encoded.rows[at] for at in batch]))
            trainer._metrics["eval"].clear()
            sums["loss"] += float(trainer.compute_loss(trainer.model, inputs)) * len(batch)
            for name, key in names.items():
                sums[name] += trainer._metrics["eval"][key][-1] * len(batch)
    for mode, values in kept.items():
        trainer._metrics[mode].clear()
        trainer._metrics[mode].update(values)
    return {name: value / len(encoded.rows) for name, value in sums.items()}


def scores(model: Any, sequences: Sequence[Sequence[int]], pad: int) -> list[float]:
    """A reward model's score of each sequence of token ids, in the precision of the surrounding context."""
    found = [0.0] * len(sequences)
    device = next(model.parameters()).device
    for batch in by_length([len(ids) for ids in sequences], SCORING_TOKENS):
        longest = len(sequences[batch[0]])
        ids = torch.full((len(batch), longest), pad)  # (B, T)
        mask = torch.zeros((len(batch), longest), dtype=torch.long)
        for at, row in enumerate(batch):
            ids[at, : len(sequences[row])] = torch.tensor(sequences[row])
            mask[at, : len(sequences[row])] = 1
        outputs = model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)
        for row, score in zip(batch, outputs.logits[:, 0].float().tolist(), strict=True):
            found[row] = score
    return found


def pair_accuracy(chosen: Sequence[float], rejected: Sequence[float]) -> float:
    """Share of pairs whose chosen side scores higher; a tie is half right, so a constant model gets 0.5."""
    return sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in zip(chosen, rejected, strict=True)) / len(chosen)


def pairs(trainer: Any, encoded: Encoded, pad: int) -> dict[str, float]:
    """``loss``, ``accuracy`` on the labels as given, ``accuracy_true`` where true scores are known, and margins.

    A pair whose true scores are equal has no right answer and is left out of ``accuracy_true``.
    """
    sequences = [row[side] for row in encoded.rows for side in ("chosen_ids", "rejected_ids")]
    with scoring(trainer):
        found = scores(trainer.model, sequences, pad)
    chosen, rejected = found[0::2], found[1::2]
    gaps = torch.tensor(chosen) - torch.tensor(rejected)
    result = {
        "loss": float(-torch.nn.functional.logsigmoid(gaps).mean()),
        "accuracy": pair_accuracy(chosen, rejected),
        "margin": float(gaps.mean()),
        "score_mean": float(torch.tensor(found).mean()),
        "score_std": float(torch.tensor(found).std(correction=0)),
    }
    flips = mislabeled(encoded)
    if flips:
        better = [rejected[at] if flipped else chosen[at] for at, flipped in flips.items()]
        worse = [chosen[at] if flipped else rejected[at] for at, flipped in flips.items()]
        result["accuracy_true"] = pair_accuracy(better, worse)
    return result


def mislabeled(encoded: Encoded) -> dict[int, bool]:
    """For each row number with two different true scores: whether the side called rejected is the better one."""
    known: dict[int, bool] = {}
    for at, row in enumerate(encoded.sources):
        chosen, rejected = row.get("chosen_score"), row.get("rejected_score")
        if chosen is not None and rejected is not None and chosen != rejected:
            known[at] = chosen < rejected
    return known


def pair_facts(encoded: Encoded) -> dict[str, float]:
    """What a reward model is measured against: ``test_length_accuracy``, the accuracy of preferring the longer side,
    and ``test_mislabeled``, the share of pairs labeled against their true scores, where those are known.
    """
    lengths = [[len(row[side]) for row in encoded.rows] for side in ("chosen_ids", "rejected_ids")]
    facts = {"test_length_accuracy": pair_accuracy(*lengths)}
    flips = mislabeled(encoded)
    return facts | ({"test_mislabeled": sum(flips.values()) / len(flips)} if flips else {})
