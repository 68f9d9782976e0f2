"""PPO with a critic: advantages by GAE, a clipped surrogate and a value loss (arXiv 1707.06347, 1909.08593)."""

from __future__ import annotations

from typing import ClassVar

import torch

from align.config.stages.policy_gradient import PpoConfig
from align.rl.advantages import gae
from align.rl.losses import value_loss
from align.rl.masking import whiten
from align.rl.objectives import Step, mask_to_learn
from align.rl.objectives.policy import PolicyObjective, choose_loss
from align.rl.packing import Batch
from align.rl.rewards import KLPenalty, shape_rewards
from align.rl.rollout import STEP_REWARDS, Rollout


class PPOObjective(PolicyObjective):
    """Every token is an action. Its advantage compares the later rewards with the critic's expectation."""

    name: ClassVar[str] = "ppo"
    loss_inputs: tuple[str, ...] = (*PolicyObjective.loss_inputs, "values", "returns")
    config: PpoConfig

    def __init__(self, config: PpoConfig) -> None:
        super().__init__(config)
        clip = {"low": config.clip_range, "high": config.clip_range}
        self.policy_loss = choose_loss(config.loss, config.loss_aggregation, **clip, dual_clip=config.dual_clip)

    def advantages(self, rollout: Rollout, penalty: KLPenalty) -> None:
        """Add rewards per token, advantages by the critic, and returns, all (B, T), in float32 on the CPU."""
        config = self.config
        tensors = rollout.tensors
        mask = tensors["response_mask"]
        scores = self.adjusted_scores(rollout, scale=self.scale)
        early_rewards = self._early_rewards(rollout)
        if early_rewards is not None:
            # They are part of the score: the end earns the rest of it.
            scores = scores - early_rewards.sum(dim=1)
        # 1. Rewards per token: every token pays the KL penalty, the last token earns the score.
        rewards, tensors["kl"] = shape_rewards(
            scores, tensors["logprobs"], tensors["ref_logprobs"], mask, penalty.in_reward
        )
        if early_rewards is not None:
            rewards = rewards + early_rewards
        if config.whiten_rewards:
            # The mean stays (arXiv 2403.17031, detail 11).
            rewards = whiten(rewards, mask & rollout.judged[:, None], shift_mean=False)
        # 2. Advantages and returns, from the critic's values at the start of the update.
        advantages, returns = gae(
            rewards,
            tensors["values"],
            mask,
            tensors["finished"],
            gamma=config.gamma,
            lam=config.lam,
            truncation=config.truncation,
            turn_discount=config.turn_discount,
            forced=tensors.get("forced"),
        )
        tensors |= {"rewards": rewards, "raw_advantages": advantages, "returns": returns}
        # Whiten over the tokens that are learned from; metrics log the raw advantages.
        tensors["learn_mask"] = mask_to_learn(rollout, config.truncated)
        if config.whiten_advantages:
            advantages = whiten(advantages, tensors["learn_mask"], shift_mean=True)
        tensors["advantages"] = advantages
        tensors["group"] = torch.tensor(rollout.groups)[:, None]

    def _early_rewards(self, rollout: Rollout) -> torch.Tensor | None:
        """Return the scores of turns, or of steps, on the running scale, (B, T); None without any."""
        # Episodes have scores of turns, and single responses may have scores of steps.
        rewards = rollout.tensors.get("turn_rewards", rollout.tensors.get(STEP_REWARDS))
        if rewards is None or self.scale is None:
            return rewards
        # Only divided, not shifted: the whole score is shifted once, and the end gets the rest.
        return rewards / (self.scale.std or 1.0)

    def rests_policy(self, update: int) -> bool:
        """Return True while the critic warms up."""
        return bool(update < self.config.critic_warmup_updates)

    def loss(self, outputs: Batch, batch: Batch, step: Step) -> torch.Tensor:
        """Return the loss of those parts that ``outputs`` has: critic (``values``), policy (``logprobs``); a scalar.

        While the policy rests, its part has weight 0 but stays in the graph.
        """
        mask = batch["learn_mask"]
        loss: torch.Tensor = mask.new_zeros((), dtype=torch.float32)
        sums: dict[str, torch.Tensor] = {}
        if "values" in outputs:
            loss, sums = self._critic_loss(outputs, batch, step)
        if "logprobs" in outputs:
            policy_part, policy_sums = self.policy_terms(outputs, batch, step)
            # The term is multiplied by 0.0, not skipped: under DDP every parameter must get a gradient.
            loss = loss + (0.0 if self.rests_policy(step.update) else 1.0) * policy_part
            sums |= policy_sums
        self._log_sums(sums, mask.sum())
        return loss

    def _critic_loss(self, outputs: Batch, batch: Batch, step: Step) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return vf_coef x value loss, and its sums to log."""
        # The last column of the values is the state after the response. It has no return, so it has no loss.
        terms = value_loss(
            outputs["values"][:, :-1],
            batch["values"][:, :-1],
            batch["returns"],
            batch["learn_mask"],
            step.count,
            value_clip_range=self.config.value_clip_range,
            # Weighed as the policy's.
            aggregation=self.policy_loss.aggregation,
        )
        return self.config.vf_coef * terms.loss, dict(terms.sums)
