"""Losses of papers that align does not ship, each a function of a few lines (docs/own_methods.md).

``loss: {function: "examples.methods:sapo"}`` in a pipeline names one. Responses: grpo and ppo; pairs: dpo; scores:
reward; tokens: sft.
"""

from __future__ import annotations

import torch
from torch.nn.functional import logsigmoid

from align.methods.records import AnswerTokens, PairLogprobs, PairScores, ResponseTokens

# ---- sampled responses ---------------------------------------------------------------------------------------------


def gpg(tokens: ResponseTokens) -> torch.Tensor:
    """GPG: the plain policy gradient, -A log pi, without ratio and clip (arXiv 2504.02546)."""
    return -tokens.advantages * tokens.new_logprobs


def sapo(tokens: ResponseTokens, tau_pos: float = 1.0, tau_neg: float = 1.05) -> torch.Tensor:
    """SAPO: a soft gate, sigmoid(tau (r - 1)) 4 / tau, in place of the clip (arXiv 2511.20347)."""
    tau = torch.where(tokens.advantages > 0, tau_pos, tau_neg)
    return -tokens.advantages * torch.sigmoid(tau * (tokens.ratio - 1)) * 4 / tau


def high_entropy(tokens: ResponseTokens, share: float = 0.2, low: float = 0.2, high: float = 0.28) -> torch.Tensor:
    """DAPO's surrogate on the tokens with the highest entropy of each response only (arXiv 2506.01939)."""
    entropy = tokens.entropy.detach().masked_fill(~tokens.mask, -torch.inf)
    rank = entropy.argsort(dim=1, descending=True).argsort(dim=1)
    kept = rank < (share * tokens.mask.sum(dim=1, keepdim=True)).ceil()
    clipped = tokens.ratio.clamp(1 - low, 1 + high)
    return torch.maximum(-tokens.advantages * tokens.ratio, -tokens.advantages * clipped) * kept


def topr(tokens: ResponseTokens) -> torch.Tensor:
    """TOPR: REINFORCE on responses above the mean, a ratio of at most 1 below it (arXiv 2503.14286)."""
    advantage = tokens.advantages[:, 0]
    weight = torch.exp(_log_ratio(tokens)).clamp(max=1).detach()
    return -torch.where(advantage > 0, 1.0, weight) * advantage * (tokens.new_logprobs * tokens.mask).sum(dim=1)


def kimi(tokens: ResponseTokens, tau: float = 0.1) -> torch.Tensor:
    """Kimi k1.5: the policy gradient, and the squared log-ratio to the sampling policy (arXiv 2501.12599, eq. 3).

    With ``scale_rewards: none``, since its advantage is the score minus the group's mean.
    """
    logprob = (tokens.new_logprobs * tokens.mask).sum(dim=1)
    return -tokens.advantages[:, 0] * logprob + tau / 2 * _log_ratio(tokens) ** 2


def gmpo(tokens: ResponseTokens, limit: float = 0.4) -> torch.Tensor:
    """GMPO: the geometric mean of the tokens' ratios, each clipped to exp(+-limit) (arXiv 2507.20673)."""
    sign = torch.sign(tokens.advantages)
    gap = sign * (tokens.new_logprobs - tokens.logprobs)
    clipped = sign * torch.minimum(gap, gap.clamp(-limit, limit)) * tokens.mask
    return -tokens.advantages[:, 0] * torch.exp(clipped.sum(dim=1) / tokens.mask.sum(dim=1).clamp(min=1))


def _log_ratio(tokens: ResponseTokens) -> torch.Tensor:
    """Return the log of each response's probability ratio, (B,)."""
    return ((tokens.new_logprobs - tokens.logprobs) * tokens.mask).sum(dim=1)


# ---- pairs ---------------------------------------------------------------------------------------------------------


def cdpo(pairs: PairLogprobs, beta: float, flipped: float = 0.1) -> torch.Tensor:
    """Conservative DPO: cross-entropy for labels of which a share is flipped (E. Mitchell's note on cDPO, 2023)."""
    logits = beta * pairs.margins
    return -(1 - flipped) * logsigmoid(logits) - flipped * logsigmoid(-logits)


def dpop(pairs: PairLogprobs, beta: float, weight: float = 50.0) -> torch.Tensor:
    """DPO-Positive: a penalty if the chosen answer gets less likely than under the reference (arXiv 2402.13228)."""
    return -logsigmoid(beta * (pairs.margins - weight * torch.relu(-pairs.chosen_logratios)))


def simper(pairs: PairLogprobs) -> torch.Tensor:
    """SimPER: inverse perplexities of both answers, no reference and no hyperparameter (arXiv 2502.00883)."""
    chosen = pairs.chosen_logprobs / pairs.chosen_lengths
    return torch.exp(pairs.rejected_logprobs / pairs.rejected_lengths) - torch.exp(chosen)


def score_hinge(pairs: PairScores, target: float = 1.0) -> torch.Tensor:
    """A reward model's hinge: no loss once the scores differ by ``target`` (support vector ranking)."""
    return torch.relu(target - (pairs.chosen_scores - pairs.rejected_scores))


# ---- answers -------------------------------------------------------------------------------------------------------


def focal(tokens: AnswerTokens, gamma: float = 1.0) -> torch.Tensor:
    """Focal loss: tokens that are likely already count less, -(1 - p)^gamma log p (arXiv 1708.02002)."""
    return -((1 - tokens.logprobs.exp()) ** gamma) * tokens.logprobs


def dft(tokens: AnswerTokens) -> torch.Tensor:
    """DFT: each token's loss times its probability, without gradient (arXiv 2508.05629)."""
    return -tokens.logprobs.exp().detach() * tokens.logprobs
