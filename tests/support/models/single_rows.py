"""Losses of a stage's micro-batch by a plain model on single rows without padding, for the support matrix."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from typing import Any

import torch

from align.models.experts import router_loss_weight

BETA = 0.1
CENTER = 0.01
"""Default of ``center_rewards``."""


def reference_loss(model: Any, inputs: dict[str, torch.Tensor], column: str) -> torch.Tensor:
    """Return the loss of a column's micro-batch ``inputs`` (scalar) from passes over single rows without padding.

    At the first step of DPO and KTO policy and reference agree, so a loss with the same gradient is linear in the
    answers' log-probabilities: -beta/2 (chosen - rejected), and -+beta/4 for desirable and undesirable answers.
    """
    if column == "reward":
        scores = [model(input_ids=row[None], use_cache=False).logits.flatten()[0] for row in rows(inputs)]
        pairs = len(scores) // 2
        gaps = torch.stack(scores[:pairs]) - torch.stack(scores[pairs:])
        totals = torch.stack(scores[:pairs]) + torch.stack(scores[pairs:])
        return (-torch.nn.functional.logsigmoid(gaps) + CENTER * totals**2).mean()
    answers = answers_of(inputs)
    sums = [answer_sum(model, ids, mask) for ids, mask in answers]
    if column == "dpo":
        pairs = len(sums) // 2
        return -BETA / 2 * (torch.stack(sums[:pairs]) - torch.stack(sums[pairs:])).mean()
    if column == "kto":
        signs = torch.where(inputs["label"].bool(), -BETA / 4, BETA / 4)
        return (signs * torch.stack(sums)).mean()
    loss = -torch.stack(sums).sum() / sum(int(mask.sum()) for _, mask in answers)
    return loss + router_loss(model, [ids for ids, _ in answers])


def router_loss(model: Any, sequences: Sequence[torch.Tensor]) -> torch.Tensor | float:
    """Return the load-balancing loss over the tokens of all rows together, with the config's weight; 0 if dense.

    Its shares of tokens and probabilities are means over the batch, so single rows give their routers' logits only.
    """
    weight = router_loss_weight(model)
    if not weight:
        return 0.0
    model.config.output_router_logits = True
    logits = [model(input_ids=ids[None], use_cache=False, output_router_logits=True).router_logits for ids in sequences]
    model.config.output_router_logits = False
    layers = tuple(torch.cat([layer.flatten(0, -2) for layer in of_rows]) for of_rows in zip(*logits, strict=True))
    balance = sys.modules[type(model).__module__].load_balancing_loss_func  # type: ignore[attr-defined]
    return weight * balance(layers, model.num_experts, model.num_experts_per_tok)  # type: ignore[no-any-return]


def answer_sum(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(T,) ids and mask (T - 1,) of predicted answer tokens -> the sum of their log-probabilities."""
    logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
    logprobs = logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    total: torch.Tensor = (logprobs * mask).sum()
    return total


def rows(inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Return the rows of a padded batch without their padding."""
    return [row[keep.bool()] for row, keep in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]


def answers_of(inputs: dict[str, torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return ids (T,) and the mask (T - 1,) of predicted answer tokens of each row, also of packed rows."""
    ids = inputs["input_ids"]
    answer = inputs["completion_mask"].bool() if "completion_mask" in inputs else inputs["labels"] != -100
    if "position_ids" in inputs:
        starts = [*(inputs["position_ids"][0] == 0).nonzero().flatten().tolist(), ids.shape[1]]
        spans = itertools.pairwise(starts)
        return [(ids[0, start:end], answer[0, start + 1 : end]) for start, end in spans]
    real = inputs["attention_mask"].bool()
    return [(row[keep], mask[keep][1:]) for row, mask, keep in zip(ids, answer, real, strict=True)]
