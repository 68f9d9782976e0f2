"""The shipped losses, one function for each method: of sampled responses, of pairs of answers, of reward models.

Keyword arguments are values of the stage's fields. ``align`` takes the mean over the optimizer step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch.nn.functional import logsigmoid

from align.methods.records import PairLogprobs, PairScores, ResponseTokens

# ---- losses of sampled responses: a number per token, (B, T), and metrics ------------------------------------------
#
# The methods differ in four places: the ratio that is clipped, the clip range, the divisor of the sum over tokens, and
# the advantage. The first two are here; ``align.config.stages.policy_gradient.PRESETS`` has the divisors and
# ``align.rl.advantages`` the advantages. ``low`` and ``high`` are the clip ranges below and above a ratio of 1.

TokenLosses = tuple[torch.Tensor, dict[str, torch.Tensor]]
"""Losses of tokens, (B, T), and metrics of tokens, (B, T) each."""


def ppo(tokens: ResponseTokens, *, low: float, high: float, dual_clip: float | None = None) -> TokenLosses:
    """PPO: the clipped ratio of each token, with a critic's advantage (arXiv 1707.06347, equation 7).

    ``dual_clip`` c bounds the loss by ``-c A`` if A < 0 (arXiv 1912.09729, equation 5). Without it, the loss of a token
    that the new policy has made very likely grows as the ratio does.
    """
    losses, metrics = _clipped(tokens, tokens.log_ratio, low, high)
    if dual_clip is not None:
        bounded = torch.minimum(losses, -dual_clip * tokens.advantages)
        losses = torch.where(tokens.advantages < 0, bounded, losses)
    return losses, metrics


def grpo(tokens: ResponseTokens, *, low: float, high: float) -> TokenLosses:
    """GRPO: PPO's surrogate, in which every response weighs the same (arXiv 2402.03300, equation 3)."""
    return _clipped(tokens, tokens.log_ratio, low, high)


def bnpo(tokens: ResponseTokens, *, low: float, high: float) -> TokenLosses:
    """GRPO in which every token of the optimizer step weighs the same (the variant of this name in trl)."""
    return _clipped(tokens, tokens.log_ratio, low, high)


def dr_grpo(tokens: ResponseTokens, *, low: float, high: float) -> TokenLosses:
    """Dr. GRPO: sums of tokens over a constant, without a bias by length or deviation (arXiv 2503.20783, figure 1)."""
    return _clipped(tokens, tokens.log_ratio, low, high)


def dapo(tokens: ResponseTokens, *, low: float, high: float) -> TokenLosses:
    """DAPO: tokens weigh the same, and ``high`` is larger than ``low`` (arXiv 2503.14476, equation 8)."""
    return _clipped(tokens, tokens.log_ratio, low, high)


def gspo(tokens: ResponseTokens, *, low: float, high: float) -> TokenLosses:
    """GSPO: the geometric mean of a response's ratios in the place of each (arXiv 2507.18071, equations 5 and 7)."""
    return _clipped(tokens, tokens.mean_log_ratio, low, high)


def rloo(tokens: ResponseTokens, *, low: float, high: float) -> TokenLosses:
    """RLOO: a response is one action, whose ratio is the product of its tokens' ratios (arXiv 2402.14740)."""
    return _clipped(tokens, tokens.response_log_ratio, low, high)


def cispo(tokens: ResponseTokens, *, high: float) -> TokenLosses:
    """CISPO: the capped ratio is a weight of the policy gradient (arXiv 2506.13585, equation 4).

    The gradient flows only through log pi, so a capped token keeps the gradient that a clip would remove.
    """
    ratio = torch.exp(tokens.log_ratio)
    losses = -tokens.advantages * ratio.clamp(max=1.0 + high).detach() * tokens.new_logprobs
    return losses, _metrics(tokens, tokens.log_ratio, ratio > 1.0 + high)


def _clipped(tokens: ResponseTokens, log_ratio: torch.Tensor, low: float, high: float) -> TokenLosses:
    """Return PPO's surrogate, ``-min(A rho, A clip(rho, 1 - low, 1 + high))``.

    ``log_ratio``, the log of rho, is (B, T), or (B, 1) for one ratio per response.
    """
    ratio = torch.exp(log_ratio)
    unclipped = -tokens.advantages * ratio
    # The larger loss is pessimistic: clipping removes gain, never loss.
    losses = torch.maximum(unclipped, -tokens.advantages * ratio.clamp(1.0 - low, 1.0 + high))
    return losses, _metrics(tokens, log_ratio, losses > unclipped)


@torch.no_grad()
def _metrics(tokens: ResponseTokens, log_ratio: torch.Tensor, is_clipped: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the ratio, whether it is clipped, and the KL to the sampling policy to second order, (B, T) each."""
    metrics = {"ratio": torch.exp(log_ratio), "clipfrac": is_clipped.to(log_ratio.dtype), "approx_kl": log_ratio**2 / 2}
    return {name: values.expand_as(tokens.mask) for name, values in metrics.items()}


POLICY_LOSSES: Mapping[str, Callable[..., TokenLosses]] = {
    loss.__name__: loss for loss in (ppo, grpo, bnpo, dr_grpo, dapo, gspo, rloo, cispo)
}
"""The losses that ``loss`` of grpo names, and the losses of ppo and rloo."""


# ---- losses of pairs, DPO (arXiv 2305.18290) and its relatives: a number per pair, (B,) -----------------------------
#
# ``pairs.margins`` is the difference of the two answers' log-ratios between policy and reference, in nats.


def sigmoid(pairs: PairLogprobs, *, beta: float) -> torch.Tensor:
    """DPO (arXiv 2305.18290, equation 7)."""
    return -logsigmoid(beta * pairs.margins)


def sigmoid_norm(pairs: PairLogprobs, *, beta: float) -> torch.Tensor:
    """DPO with log-ratios per token, against growing length (arXiv 2411.15124)."""
    return -logsigmoid(beta * pairs.mean_margins)


def hinge(pairs: PairLogprobs, *, beta: float) -> torch.Tensor:
    """SLiC's hinge on DPO's margin (arXiv 2305.10425)."""
    return torch.relu(1 - beta * pairs.margins)


def ipo(pairs: PairLogprobs, *, beta: float) -> torch.Tensor:
    """IPO: a target margin of 1 / (2 beta), per token as in its authors' code (arXiv 2310.12036, equation 17)."""
    return (pairs.mean_margins - 1 / (2 * beta)) ** 2


def robust(pairs: PairLogprobs, *, beta: float, label_smoothing: float) -> torch.Tensor:
    """DPO without the bias of a known share of flipped labels (arXiv 2403.00409)."""
    clean = -(1 - label_smoothing) * logsigmoid(beta * pairs.margins)
    flipped = -label_smoothing * logsigmoid(-beta * pairs.margins)
    return (clean - flipped) / (1 - 2 * label_smoothing)


def exo_pair(pairs: PairLogprobs, *, beta: float, label_smoothing: float) -> torch.Tensor:
    """EXO: KL from the policy's to the smoothed preference, over two answers (arXiv 2402.00856, equation 16)."""
    epsilon = torch.tensor(label_smoothing, device=pairs.margins.device)
    better, log_better = torch.sigmoid(beta * pairs.margins), logsigmoid(beta * pairs.margins)
    worse, log_worse = torch.sigmoid(-beta * pairs.margins), logsigmoid(-beta * pairs.margins)
    return better * (log_better - torch.log1p(-epsilon)) + worse * (log_worse - torch.log(epsilon))


def nca_pair(pairs: PairLogprobs, *, beta: float) -> torch.Tensor:
    """NCA: absolute likelihoods instead of their difference (arXiv 2402.05369)."""
    chosen = beta * pairs.chosen_logratios
    rejected = beta * pairs.rejected_logratios
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


def bco_pair(pairs: PairLogprobs, *, beta: float) -> torch.Tensor:
    """BCO: a classifier of each answer by itself, without its shift (arXiv 2404.04656)."""
    return -logsigmoid(beta * pairs.chosen_logratios) - logsigmoid(-(beta * pairs.rejected_logratios))


def sppo_hard(pairs: PairLogprobs, *, beta: float) -> torch.Tensor:
    """SPPO with win probabilities of 1 and 0 (arXiv 2405.00675, equation 4.7)."""
    return (pairs.chosen_logratios - 0.5 / beta) ** 2 + (pairs.rejected_logratios + 0.5 / beta) ** 2


def aot(pairs: PairLogprobs, *, beta: float, label_smoothing: float) -> torch.Tensor:
    """AOT: margins of policy and reference, each sorted over the micro-batch (arXiv 2406.05882)."""
    policy, _ = torch.sort(pairs.chosen_logprobs - pairs.rejected_logprobs, dim=0)
    reference, _ = torch.sort(pairs.ref_chosen_logprobs - pairs.ref_rejected_logprobs, dim=0)
    return _smoothed(policy - reference, beta, label_smoothing)


def aot_unpaired(pairs: PairLogprobs, *, beta: float, label_smoothing: float) -> torch.Tensor:
    """AOT: log-ratios of the two sides, each sorted over the micro-batch (arXiv 2406.05882)."""
    chosen, _ = torch.sort(pairs.chosen_logratios, dim=0)
    rejected, _ = torch.sort(pairs.rejected_logratios, dim=0)
    return _smoothed(chosen - rejected, beta, label_smoothing)


def apo_zero(pairs: PairLogprobs, *, beta: float) -> torch.Tensor:
    """APO for chosen answers better than the policy's: raise them, lower the others (arXiv 2408.06266, equation 7)."""
    return 1 - torch.sigmoid(beta * pairs.chosen_logratios) + torch.sigmoid(beta * pairs.rejected_logratios)


def apo_down(pairs: PairLogprobs, *, beta: float) -> torch.Tensor:
    """APO for chosen answers worse than the policy's: lower both, the rejected more (arXiv 2408.06266, equation 8)."""
    logratios = pairs.chosen_logratios - pairs.rejected_logratios
    return torch.sigmoid(beta * pairs.chosen_logratios) + (1 - torch.sigmoid(beta * logratios))


def discopop(pairs: PairLogprobs, *, beta: float, discopop_tau: float) -> torch.Tensor:
    """DiscoPOP: a blend of logistic and exponential loss, found by a language model (arXiv 2406.08414, equation 5)."""
    logits = pairs.margins * beta
    blend = torch.sigmoid(logits / discopop_tau)
    return -logsigmoid(logits) * (1 - blend) + torch.exp(-logits) * blend


def sft(pairs: PairLogprobs) -> torch.Tensor:
    """The negative log-likelihood of the chosen answers, per token of the micro-batch."""
    return (-pairs.chosen_token_logprobs[pairs.chosen_mask].mean()).expand(len(pairs))


def cdpo(pairs: PairLogprobs, *, beta: float, label_smoothing: float) -> torch.Tensor:
    """Conservative DPO: a share of the labels is flipped (E. Mitchell's note on cDPO, 2023). Stage ``online_dpo``'s."""
    right, wrong = logsigmoid(beta * pairs.margins), logsigmoid(-beta * pairs.margins)
    return -(1 - label_smoothing) * right - label_smoothing * wrong


def _smoothed(margins: torch.Tensor, beta: float, label_smoothing: float) -> torch.Tensor:
    """Return the logistic loss with a share of the labels flipped, (B,)."""
    return -logsigmoid(beta * margins) * (1 - label_smoothing) - logsigmoid(-beta * margins) * label_smoothing


PAIR_LOSSES: Mapping[str, Callable[..., torch.Tensor]] = {
    loss.__name__: loss
    for loss in (
        sigmoid, sigmoid_norm, hinge, ipo, robust, exo_pair, nca_pair, bco_pair, sppo_hard, aot, aot_unpaired,
        apo_zero, apo_down, discopop, sft,
    )
}  # fmt: skip
"""The losses that ``loss`` of dpo names."""


# ---- losses of reward models: their scores instead of log-probabilities --------------------------------------------


def bradley_terry(pairs: PairScores, *, label_smoothing: float) -> torch.Tensor:
    """Bradley-Terry with a margin (arXiv 2307.09288, equation 2) and a share of wrong labels (2403.00409)."""
    gap = pairs.chosen_scores - pairs.rejected_scores - pairs.margins
    # (1 - e) -log s(x) + e -log s(-x) = -log s(x) + e x
    return -logsigmoid(gap) + label_smoothing * gap


# ---- divergences from the reference (arXiv 2309.16240): f'(t) of the probability ratio t, of log t -----------------


def forward_kl(logratios: torch.Tensor) -> torch.Tensor:
    """Return ``1 - 1/t``."""
    return 1 - torch.exp(-logratios)


def js_divergence(logratios: torch.Tensor) -> torch.Tensor:
    """Return ``log(2t / (t + 1))``."""
    return math.log(2) + logsigmoid(logratios)


def alpha_divergence(logratios: torch.Tensor, alpha: float) -> torch.Tensor:
    """Return ``(t^(alpha - 1) - 1) / (alpha - 1)``, which is ``log t`` in the limit of alpha 1."""
    if abs(alpha - 1.0) < 1e-6:
        return logratios
    # exp(80) still fits in float32 and bfloat16.
    exponent = torch.clamp((alpha - 1.0) * logratios.float(), max=80.0)
    return (torch.exp(exponent) - 1.0).to(logratios.dtype) * (1.0 / (alpha - 1.0))
