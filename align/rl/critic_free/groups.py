"""GRPO and its variants, and RLOO: a response is worth what it scores above the others to its prompt."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch

from align.rl.critic_free.advantages import (
    group_advantages,
    leave_one_out,
    overlong_penalty,
    whiten_responses,
    without_variance,
)
from align.rl.critic_free.config import GRPOConfig, RLOOConfig
from align.rl.critic_free.losses import RatioOf, group_loss
from align.rl.critic_free.presets import Preset
from align.rl.critic_free.resampling import resampled
from align.rl.critic_free.trainer import CriticFreeTrainer
from align.rl.kl import estimate_kl
from align.rl.ppo.losses import aggregate, importance_weights, loss_count
from align.rl.rollout import Rollout, adjusted_scores


class GroupTrainer(CriticFreeTrainer):
    """What GRPO and RLOO share: one advantage a response, drift in the reward or in the loss, a clipped surrogate."""

    learned_from: ClassVar[tuple[str, ...]] = (
        *("logprobs", "sampler_logprobs", "ref_logprobs", "advantages", "learn_mask"),
    )
    args: GRPOConfig | RLOOConfig

    @property
    @abstractmethod
    def preset(self) -> Preset:
        """How the loss is put together."""

    @property
    def ratio_of(self) -> RatioOf:
        """Whose probability ratio the surrogate has."""
        return self.preset.ratio

    @abstractmethod
    def advantages(self, totals: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
        """From what each response earned in all, (B,), to how much better it was than the others, (B,)."""

    def penalty(self, lengths: torch.Tensor) -> torch.Tensor:
        """Subtracted from the scores of responses of these lengths, (B,)."""
        return torch.zeros_like(lengths, dtype=torch.float32)

    def estimate(self, rollout: Rollout, kl_coef: float) -> None:
        """A response's score, less what its drift costs in all, against its group: the same for each of its tokens."""
        tensors = rollout.tensors
        mask = tensors["response_mask"]
        scores = adjusted_scores(rollout, self.args, scale=self.scale) - self.penalty(mask.sum(dim=1))
        kl = torch.where(mask, estimate_kl(tensors["logprobs"], tensors["ref_logprobs"]), torch.zeros(()))
        totals = scores - kl_coef * kl.sum(dim=1)
        groups = torch.tensor(rollout.groups)
        advantages = self.advantages(totals, groups)[:, None] * mask
        learned = mask & tensors["finished"][:, None] if self.args.truncated == "mask" else mask
        tensors |= {"kl": kl, "rewards": totals, "raw_advantages": advantages, "advantages": advantages}
        tensors["learn_mask"] = learned
        flat = without_variance(tensors["scores"], groups) if rollout.drawn is None else _flat(rollout.drawn)
        self._averages.add("zero_variance", flat.sum(), len(flat))

    def count_learned(self, learns: list[dict[str, torch.Tensor]]) -> float:
        """Tokens or responses of an optimizer step, by the loss's aggregation."""
        return loss_count([learn["learn_mask"] for learn in learns], self.preset.aggregation, self.args.max_tokens)

    def loss_of(
        self, out: dict[str, torch.Tensor], learn: dict[str, torch.Tensor], count: torch.Tensor
    ) -> torch.Tensor:
        """Surrogate, less an entropy bonus, plus a KL term where drift is paid for in the loss."""
        args, mask = self.args, learn["learn_mask"]
        weights = importance_weights(
            learn["logprobs"], learn["sampler_logprobs"], mask, args.importance_cap, args.importance_sequence_cap
        )
        kind = self.preset.aggregation
        terms = group_loss(
            out["logprobs"],
            learn["logprobs"],
            learn["advantages"],
            mask,
            count,
            clip=args.clip,
            of=self.ratio_of,
            clips=self.preset.clips,
            weights=weights,
            aggregation=kind,
        )
        loss = terms.loss
        if args.entropy_coef:
            loss = loss - args.entropy_coef * aggregate(out["entropy"], mask, count, kind)
        if self._loss_kl_coef and args.kl_estimator:
            drift = estimate_kl(out["logprobs"], learn["ref_logprobs"], args.kl_estimator)
            loss = loss + self._loss_kl_coef * aggregate(drift, mask, count, kind)
        for name, total in {**terms.sums, "importance_weight": (weights * mask).sum()}.items():
            self._averages.add(name, total, mask.sum())
        return loss


class GRPOTrainer(GroupTrainer):
    """Group-relative policy optimization (arXiv 2402.03300) and its variants (``align.rl.critic_free.presets``)."""

    method: ClassVar[str] = "grpo"
    args: GRPOConfig

    @property
    def preset(self) -> Preset:
        """Of the loss's name."""
        return self.args.preset

    def advantages(self, totals: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
        """Less the group's mean, over a spread by ``scale_rewards``."""
        return group_advantages(totals, groups, self.args.scale)

    def penalty(self, lengths: torch.Tensor) -> torch.Tensor:
        """DAPO's, for the last ``overlong_buffer`` tokens."""
        return overlong_penalty(lengths, self.args.max_tokens, self.args.overlong_buffer, self.args.overlong_penalty)

    def choose(self, rollout: Rollout) -> Rollout:
        """With ``zero_variance: resample``, groups without variance give way to those of other prompts (DAPO)."""
        if self.args.zero_variance == "keep":
            return rollout
        chosen = resampled(self, rollout, self.args.resample_rounds)
        left = without_variance(chosen.tensors["scores"], torch.tensor(chosen.groups))
        self._averages.add("zero_variance_left", left.sum(), len(left))
        return chosen


class RLOOTrainer(GroupTrainer):
    """REINFORCE with the mean of the other responses as the baseline (arXiv 2402.14740).

    The response is one action: its whole probability is what is raised, lowered and clipped.
    """

    method: ClassVar[str] = "rloo"
    args: RLOOConfig

    @property
    def preset(self) -> Preset:
        """Every response weighs the same."""
        return Preset("sequence")

    @property
    def ratio_of(self) -> RatioOf:
        """The response is one action."""
        return "whole"

    def advantages(self, totals: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
        """Less the mean of the others."""
        found = leave_one_out(totals, groups)
        return whiten_responses(found) if self.args.whiten_advantages else found


def _flat(rollout: Rollout) -> torch.Tensor:
    return without_variance(rollout.tensors["scores"], torch.tensor(rollout.groups))
