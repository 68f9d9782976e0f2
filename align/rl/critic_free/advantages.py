"""Advantages without a critic: a response is compared with others to the same prompt.

All are one number per response, (B,); ``groups`` (B,) is equal for responses to the same prompt.
"""

from __future__ import annotations

import torch

from align.rl.critic_free.presets import Scale
from align.rl.masking import Reduce, local

EPSILON = 1e-4
"""Added to a spread that is divided by, as in trl: of equal scores nothing is learned, of near ones not everything."""


def group_sums(values: torch.Tensor, groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum over each response's group, and the group's size, both (B,)."""
    _, place = torch.unique(groups, return_inverse=True)
    count = int(place.max()) + 1
    totals = values.new_zeros(count).index_add_(0, place, values)
    sizes = values.new_zeros(count).index_add_(0, place, torch.ones_like(values))
    return totals[place], sizes[place]


def group_advantages(scores: torch.Tensor, groups: torch.Tensor, scale: Scale, reduce: Reduce = local) -> torch.Tensor:
    """Score less the group's mean, divided by a sample standard deviation (arXiv 2402.03300, section 4.1.2).

    ``scale``: the deviation within the group; over the whole batch (arXiv 2508.08221); or none, as dividing favors
    prompts that are nearly always or nearly never solved (arXiv 2503.20783).
    """
    sums, sizes = group_sums(scores, groups)
    centerd = scores - sums / sizes
    if scale == "none":
        return centerd
    if scale == "group":
        squares, _ = group_sums(centerd**2, groups)
        return centerd / ((squares / (sizes - 1).clamp(min=1)).sqrt() + EPSILON)
    return centerd / (_deviation(scores, reduce) + EPSILON)


def leave_one_out(scores: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """Score less the mean of the *other* responses to the prompt (arXiv 2402.14740, equation 8); unbiased."""
    sums, sizes = group_sums(scores, groups)
    return scores - (sums - scores) / (sizes - 1).clamp(min=1)


def whiten_responses(advantages: torch.Tensor, reduce: Reduce = local) -> torch.Tensor:
    """Mean zero and sample variance one over the responses of all processes."""
    count, total = reduce(torch.stack([advantages.new_tensor(float(len(advantages))), advantages.sum()]))
    whitened: torch.Tensor = (advantages - total / count) / (_deviation(advantages, reduce) + EPSILON)
    return whitened


def _deviation(values: torch.Tensor, reduce: Reduce) -> torch.Tensor:
    """Sample standard deviation over all processes, a scalar."""
    count, total = reduce(torch.stack([values.new_tensor(float(len(values))), values.sum()]))
    squares = reduce(((values - total / count) ** 2).sum())
    deviation: torch.Tensor = (squares / (count - 1).clamp(min=1)).sqrt()
    return deviation


def overlong_penalty(lengths: torch.Tensor, max_tokens: int, buffer: int, penalty: float) -> torch.Tensor:
    """What the last ``buffer`` tokens before ``max_tokens`` cost: 0 rising in a line to ``penalty``, (B,).

    DAPO's soft overlong punishment (arXiv 2503.14476, equation 13). ``lengths`` (B,) in tokens.
    """
    if buffer == 0:
        return torch.zeros_like(lengths, dtype=torch.float32)
    over: torch.Tensor = (lengths - (max_tokens - buffer)).clamp(min=0).float() / buffer
    return penalty * over


def without_variance(scores: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """True for responses whose group has one and the same score: nothing can be learned from them, (B,)."""
    _, place = torch.unique(groups, return_inverse=True)
    count = int(place.max()) + 1
    low = scores.new_full((count,), float("inf")).scatter_reduce_(0, place, scores, "amin")
    high = scores.new_full((count,), float("-inf")).scatter_reduce_(0, place, scores, "amax")
    return ((high - low) <= 1e-8)[place]
