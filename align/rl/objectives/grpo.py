"""GRPO and its variants, and RLOO (arXiv 2402.14740): responses to a prompt are compared, without a critic.

In GRPO a response's advantage is its score above the others to its prompt. RLOO is REINFORCE with the mean score of
the other responses as the baseline.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch

from align.config.stages.policy_gradient import GrpoConfig, RlooConfig
from align.methods.call import Method
from align.rl.advantages import (
    group_advantages,
    leave_one_out,
    overlong_penalty,
    whiten_responses,
    without_variance,
)
from align.rl.objectives import Step, mask_to_learn, masked_kl
from align.rl.objectives.policy import PolicyObjective, choose_loss, own_advantages
from align.rl.packing import Batch
from align.rl.prompts import derive_seed
from align.rl.rewards import KLPenalty
from align.rl.rollout import Rollout, join_rollouts
from align.rl.sampler import RolloutSampler


class GroupObjective(PolicyObjective):
    """Base of GRPO and RLOO: one advantage per response, and a KL penalty in score or loss."""

    config: Any
    own_advantage: Method | None = None

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        if config.advantage is not None:
            self.own_advantage = Method.own(config.advantage, "advantage")

    @abstractmethod
    def compare(self, totals: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
        """Return advantages (B,) of responses that earned ``totals`` (B,), penalties included; ``groups`` is (B,)."""

    def score_penalty(self, lengths: torch.Tensor) -> torch.Tensor:
        """Return the penalties to subtract from the scores of responses of these lengths, both (B,)."""
        return torch.zeros_like(lengths, dtype=torch.float32)

    def advantages(self, rollout: Rollout, penalty: KLPenalty) -> None:
        """Compare each response's score, minus its KL penalty, with its group's. All its tokens get the result."""
        tensors = rollout.tensors
        mask = tensors["response_mask"]
        # The policy pays only for tokens that it sampled, as with ``length_penalty``.
        scores = self.adjusted_scores(rollout, scale=self.scale) - self.score_penalty(mask.sum(dim=1))
        kl = masked_kl(rollout)
        # In the reward, a response pays for its whole drift before it is compared with its group.
        totals = scores - penalty.in_reward * kl.sum(dim=1)
        if self.own_advantage is not None:
            advantages = own_advantages(self.own_advantage, rollout, totals, kl)
        else:
            # Failed episodes move no baseline and no deviation, and have no advantage.
            judged = rollout.judged
            relative = torch.zeros_like(totals)
            if judged.any():
                relative[judged] = self.compare(totals[judged], torch.tensor(rollout.groups)[judged])
            advantages = relative[:, None] * mask
        tensors |= {"kl": kl, "rewards": totals, "raw_advantages": advantages, "advantages": advantages}
        tensors["learn_mask"] = mask_to_learn(rollout, self.config.truncated)
        tensors["group"] = torch.tensor(rollout.groups)[:, None]
        # Log this for the prompts as they came, before any resampling.
        self._log_flat("zero_variance", rollout.candidates or rollout)

    def _log_flat(self, name: str, rollout: Rollout) -> None:
        """Add the share of responses whose group's scores are all equal, without failed episodes."""
        judged = rollout.judged
        self.averages.add(name, (_is_flat(rollout) & judged).sum(), judged.sum())

    def loss(self, outputs: Batch, batch: Batch, step: Step) -> torch.Tensor:
        """Return the policy's loss, a scalar."""
        loss, sums = self.policy_terms(outputs, batch, step)
        self._log_sums(sums, batch["learn_mask"].sum())
        return loss


class GRPOObjective(GroupObjective):
    """Group-relative policy optimization (arXiv 2402.03300) and its variants (``GrpoConfig.loss``)."""

    name: ClassVar[str] = "grpo"
    config: GrpoConfig

    def __init__(self, config: GrpoConfig) -> None:
        super().__init__(config)
        self.policy_loss = choose_loss(config.loss, config.preset.aggregation, **config.loss_options)

    def select(self, rollout: Rollout, sampler: RolloutSampler) -> Rollout:
        """With ``zero_variance: resample``, replace groups without variance by groups of other prompts (DAPO)."""
        if self.config.zero_variance == "keep":
            return rollout
        selected = resample(rollout, sampler, self.config.resample_rounds)
        self._log_flat("zero_variance_left", selected)
        return selected

    def compare(self, totals: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
        """Return ``totals`` minus the group's mean, over a standard deviation by ``scale_rewards``, (B,)."""
        return group_advantages(totals, groups, self.config.scale)

    def score_penalty(self, lengths: torch.Tensor) -> torch.Tensor:
        """Return DAPO's penalty for the last ``overlong_buffer`` tokens, (B,)."""
        return overlong_penalty(
            lengths, self.config.max_tokens, self.config.overlong_buffer, self.config.overlong_penalty
        )


def _is_flat(rollout: Rollout) -> torch.Tensor:
    """Return True for responses in groups whose scores are all equal, (B,)."""
    return without_variance(rollout.tensors["scores"], torch.tensor(rollout.groups))


def resample(rollout: Rollout, sampler: RolloutSampler, rounds: int) -> Rollout:
    """Return ``rollout`` with groups without variance replaced, as far as ``rounds`` of sampling yield others."""
    selected = rollout
    resampled: list[Rollout] = []
    for number in range(rounds):
        flat = _groups(selected, varying=False)
        if not flat:
            break
        # Rounds are numbered by update, so a resumed run draws the same prompts and seeds again.
        extra = _sample_more(sampler, rollout, rounds * rollout.update + number, len(flat))
        extra.tensors["place"] += len(rollout) + sum(len(part) for part in resampled)
        resampled.append(extra)
        # As many flat groups go as varying groups came, so the number of prompts stays the same.
        varying = set(_groups(extra, varying=True))
        replaced = set(flat[: len(varying)])
        if replaced:
            parts = []
            remaining = [i for i, group in enumerate(selected.groups) if group not in replaced]
            if remaining:
                parts.append(selected.subset(remaining))
            parts.append(extra.subset([i for i, group in enumerate(extra.groups) if group in varying]))
            selected = join_rollouts(parts)
    if selected is not rollout:
        selected.candidates = rollout
    selected.resampled = resampled
    return selected


def _groups(rollout: Rollout, varying: bool) -> list[int]:
    """Return the groups whose scores vary, or those whose scores are all equal."""
    is_flat = without_variance(rollout.tensors["scores"], torch.tensor(rollout.groups)).tolist()
    return sorted({group for group, flat in zip(rollout.groups, is_flat, strict=True) if flat != varying})


def _sample_more(sampler: RolloutSampler, rollout: Rollout, round_number: int, count: int) -> Rollout:
    """Return responses to ``count`` other prompts; the time counts as the rollout's.

    ``round_number`` counts rounds over all updates. Each has room for a rollout's prompts in an endless sequence of its
    own, so no two rounds get the same seeds.
    """
    args = sampler.args
    start = round_number * sampler.config.prompts_per_update
    indices = sampler.prompts.draw(start, count, derive_seed(args.seed, "resampled prompts"))
    seeds = [derive_seed(args.seed, "resampling", number) for number in range(start, start + count)]
    extra = sampler.sample(rollout.update, indices, seeds)
    for phase, seconds in extra.seconds.items():
        rollout.seconds[phase] += seconds
    return extra


class RLOOObjective(GroupObjective):
    """A response is one action: its probability is what the loss raises, lowers and clips."""

    name: ClassVar[str] = "rloo"
    config: RlooConfig

    def __init__(self, config: RlooConfig) -> None:
        super().__init__(config)
        low, high = config.clip
        self.policy_loss = choose_loss(config.loss, "sequence", low=low, high=high)

    def compare(self, totals: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
        """Return ``totals`` minus the mean of the other responses, (B,)."""
        advantages = leave_one_out(totals, groups)
        return whiten_responses(advantages) if self.config.whiten_advantages else advantages
