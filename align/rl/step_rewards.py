"""Process rewards of a rollout: the score of each step on the step's last token."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Any

import torch

from align.data.process_rewards import StepScore
from align.errors import UserError
from align.rl.rollout import Rollout

STEP_REWARDS = "step_rewards"
"""Tensor (B, T) of a rollout: the score of each step on its last token, 0 elsewhere."""


def place_steps(rollout: Rollout, steps: Sequence[Sequence[StepScore]], tokenizer: Any) -> torch.Tensor:
    """Return the scores of steps on the last token of each step, (B, T). ``steps`` has the steps of each response.

    The ends of steps count the characters of the answers. Steps that end in one token add up.
    """
    mask = rollout.tensors["response_mask"]
    rewards = torch.zeros(mask.shape)
    for row, (answer, row_steps) in enumerate(zip(rollout.answers, steps, strict=True)):
        sampled = mask[row].nonzero().flatten().tolist()
        for step in row_steps:
            token = last_token(rollout.responses[row], len(answer.thought) + step.end, tokenizer)
            # Only sampled tokens earn rewards: the last one up to the step's end, else the first one.
            place = max(0, bisect.bisect_right(sampled, token) - 1)
            rewards[row, sampled[place]] += step.score
    return rewards


def last_token(token_ids: Sequence[int], end: int, tokenizer: Any) -> int:
    """Return the index of the token that has the character before ``end`` of the response's text."""

    def characters(count: int) -> int:
        return len(tokenizer.decode(list(token_ids[:count]), skip_special_tokens=True))

    # The fewest tokens whose text reaches the end.
    count = bisect.bisect_left(range(len(token_ids)), end, key=characters)
    return max(0, count - 1)


def refuse_steps(rollout: Rollout, method: str, has_token_credit: bool) -> None:
    """Raise ``UserError`` if a scorer gives scores to steps and the method has one advantage per response."""
    if STEP_REWARDS in rollout.tensors and not has_token_credit:
        raise UserError(
            f"{method}: the scorer returns a score for each step, and {method} has one advantage per response, so the "
            "steps would have no effect. Use PPO, or return their sum."
        )
