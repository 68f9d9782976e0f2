"""Advantages of sampled responses: by a critic (GAE), or compared with other responses to the same prompt."""

from __future__ import annotations

from typing import Literal

import torch

from align.rl.masking import last_index, masked_mean_var, turn_ends

Truncation = Literal["bootstrap", "terminal"]
"""Value after a response cut at its maximum length: the critic's value of the state reached, or 0."""
Scale = Literal["group", "batch", "none"]
"""Standard deviation that centered scores are divided by: the group's, the batch's, or none."""

EPSILON = 1e-4
"""Term added to a standard deviation before dividing, as in trl; it bounds the result for nearly equal scores."""


# ---- with a critic: one advantage per token ----


def gae(
    rewards: torch.Tensor,
    values: torch.Tensor,
    response_mask: torch.Tensor,
    finished: torch.Tensor,
    *,
    gamma: float,
    lam: float,
    truncation: Truncation,
    turn_discount: float = 1.0,
    forced: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return advantages and returns, both (B, T), zero on padding (arXiv 1506.02438, equation 16).

    ``delta_t = r_t + gamma V_{t+1} - V_t``, ``A_t = delta_t + gamma lam A_{t+1}``, ``return_t = A_t + V_t``.
    ``rewards`` and ``response_mask`` are (B, T), ``finished`` (B,) is True if the response was not cut off: it reached
    EOS, in an episode after its last turn. ``values`` is (B, T+1): ``values[:, t]`` is the value of the state *before*
    token t, and the column after a row's last real token the value of the state the response ended in. The value at the
    end counts as 0 if the response is finished, because the episode is over. After truncation it is used
    (``bootstrap``, arXiv 1712.00378) or 0 (``terminal``). Values past a row's end are not read. If an environment's
    tokens leave a gap in the mask, the recursion skips the gap: ``V_{t+1}`` is the value before the next sampled token.
    ``turn_discount`` multiplies gamma at such a step, unless the gap has only ``forced`` tokens, (B, T).
    """
    batch, width = rewards.shape
    last = last_index(response_mask)  # (B,)
    rows = torch.arange(batch, device=rewards.device)
    value_at_end = values[rows, last + 1]  # (B,) value of the state each response ended in
    value_at_end = torch.where(finished, torch.zeros_like(value_at_end), value_at_end)
    if truncation == "terminal":
        value_at_end = torch.zeros_like(value_at_end)

    # Number of each token's turn, (B, T). Forced tokens belong to the turn in which they stand.
    ends = turn_ends(response_mask if forced is None else response_mask | forced)
    turns = ends.cumsum(dim=1) - ends.long()
    advantages = torch.zeros_like(rewards)
    next_turn = turns[rows, last]  # no turn follows the last
    next_value = value_at_end
    next_advantage = torch.zeros_like(value_at_end)
    # Go backward over the columns of all rows at once: A_t needs A_{t+1} and V_{t+1}.
    for t in range(width - 1, -1, -1):
        is_real = response_mask[:, t]
        # A step to a sampled token of another turn is also discounted by ``turn_discount``.
        discount = torch.where(turns[:, t] == next_turn, gamma, gamma * turn_discount).to(rewards.dtype)
        delta = rewards[:, t] + discount * next_value - values[:, t]
        advantage = delta + discount * lam * next_advantage
        # Padding and gaps carry both unchanged, so a row's recursion starts at its own last token.
        next_advantage = torch.where(is_real, advantage, next_advantage)
        next_value = torch.where(is_real, values[:, t], next_value)
        next_turn = torch.where(is_real, turns[:, t], next_turn)
        advantages[:, t] = torch.where(is_real, advantage, advantages[:, t])
    # The critic's targets stay in units of reward: they are computed before the advantages are whitened.
    returns = torch.where(response_mask, advantages + values[:, :-1], torch.zeros_like(advantages))
    return advantages, returns


def explained_variance(values: torch.Tensor, returns: torch.Tensor, response_mask: torch.Tensor) -> float:
    """Return ``1 - Var(returns - values) / Var(returns)``: 1 is a perfect critic, below 0 is worse than a constant.

    ``values``, ``returns`` and ``response_mask`` are (B, T). The result is 0 if the returns do not vary.
    """
    _, variance = masked_mean_var(returns, response_mask)
    _, residual = masked_mean_var(returns - values, response_mask)
    if float(variance) == 0.0:
        return 0.0
    return float(1.0 - residual / variance)


# ---- without a critic: one advantage per response; ``groups`` (B,) is equal for responses to the same prompt ----


def group_sums(values: torch.Tensor, groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sum of ``values`` (B,) over each response's group, and the group's size, both (B,)."""
    # Group numbers may have gaps, but index_add_ needs the indices 0 to count - 1.
    _, group_index = torch.unique(groups, return_inverse=True)
    count = int(group_index.max()) + 1
    totals = values.new_zeros(count).index_add_(0, group_index, values)
    sizes = values.new_zeros(count).index_add_(0, group_index, torch.ones_like(values))
    return totals[group_index], sizes[group_index]


def fill_failed(values: torch.Tensor, failed: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """Return values (B,) that replace failed responses by the mean of their group's others, or 0 without others.

    Such a response does not move its group's mean for the others. ``values``, ``failed`` and ``groups`` are (B,).
    """
    # Failed responses count as 0 in the sums, even if their score is missing (NaN).
    sums, _ = group_sums(torch.where(failed, torch.zeros_like(values), values), groups)
    counts, _ = group_sums((~failed).to(values.dtype), groups)
    return torch.where(failed, sums / counts.clamp(min=1), values)


def group_advantages(scores: torch.Tensor, groups: torch.Tensor, scale: Scale) -> torch.Tensor:
    """Return scores minus the group's mean, over a sample standard deviation, (B,) (arXiv 2402.03300, section 4.1.2).

    ``scores`` and ``groups`` are (B,). ``scale`` selects the standard deviation: within the group, over the batch
    (arXiv 2508.08221), or none: dividing favors prompts that are nearly always or nearly never solved (arXiv
    2503.20783). The result is 0 if a group's scores are all equal.
    """
    sums, sizes = group_sums(scores, groups)
    # The mean of equal scores may be off by rounding, which the division would make 1 / EPSILON times larger.
    centered = (scores - sums / sizes).masked_fill(without_variance(scores, groups), 0.0)
    if scale == "none":
        return centered
    if scale == "group":
        squares, _ = group_sums(centered**2, groups)
        # The sample variance. In a group of one the clamp avoids 0 / 0.
        return centered / ((squares / (sizes - 1).clamp(min=1)).sqrt() + EPSILON)
    return centered / (_standard_deviation(scores) + EPSILON)


def leave_one_out(scores: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """Return scores minus the mean of the *other* responses to the prompt, (B,); unbiased.

    ``scores`` and ``groups`` are (B,). Source: arXiv 2402.14740, equation 8.
    """
    sums, sizes = group_sums(scores, groups)
    # In a group of one there are no other responses, and the baseline is 0.
    return scores - (sums - scores) / (sizes - 1).clamp(min=1)


def whiten_responses(advantages: torch.Tensor) -> torch.Tensor:
    """Scale advantages (B,) to mean 0 and sample variance 1 over the responses of the rollout."""
    mean = advantages.sum() / len(advantages)
    return (advantages - mean) / (_standard_deviation(advantages) + EPSILON)


def _standard_deviation(values: torch.Tensor) -> torch.Tensor:
    """Return the sample standard deviation of ``values`` (B,), a scalar; 0 of a single value."""
    squares = ((values - values.sum() / len(values)) ** 2).sum()
    return (squares / max(1, len(values) - 1)).sqrt()


def overlong_penalty(lengths: torch.Tensor, max_tokens: int, buffer: int, penalty: float) -> torch.Tensor:
    """Return DAPO's soft overlong punishment, (B,): 0, rising to ``penalty`` over the last ``buffer`` tokens.

    ``lengths`` (B,) counts the tokens that the policy sampled. Source: arXiv 2503.14476, equation 13.
    """
    if buffer == 0:
        return torch.zeros_like(lengths, dtype=torch.float32)
    excess: torch.Tensor = (lengths - (max_tokens - buffer)).clamp(min=0).float() / buffer
    return penalty * excess


def without_variance(scores: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """Return True for responses whose group's scores are all equal, (B,): such a group has no learning signal.

    ``scores`` and ``groups`` are (B,).
    """
    _, group_index = torch.unique(groups, return_inverse=True)
    count = int(group_index.max()) + 1
    low = scores.new_full((count,), float("inf")).scatter_reduce_(0, group_index, scores, "amin")
    high = scores.new_full((count,), float("-inf")).scatter_reduce_(0, group_index, scores, "amax")
    return ((high - low) <= 1e-8)[group_index]
