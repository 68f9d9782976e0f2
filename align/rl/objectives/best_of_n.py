"""Best-of-N fine-tuning, or rejection sampling (RAFT, arXiv 2304.06767; ReST, 2308.08998).

A round samples N responses to each prompt, selects the best, and trains on them by supervised steps. The next round
samples from the result.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from align.config.stages.rejection import RejectionConfig
from align.rl.kl import KLPenalty
from align.rl.losses import aggregate, loss_count
from align.rl.masking import masked_sum
from align.rl.objectives.base import Objective, Step, failures, masked_kl
from align.rl.packing import Batch, group_members
from align.rl.rollout import Rollout
from align.rl.sampler import RolloutSampler


class BestOfNObjective(Objective):
    """An update is a round: ``num_epochs`` passes over the best responses, by their likelihood only."""

    name: ClassVar[str] = "rejection"
    loss_inputs: ClassVar[tuple[str, ...]] = ("learn_mask",)
    learns_likelihood: ClassVar[bool] = True
    config: RejectionConfig

    def select(self, rollout: Rollout, sampler: RolloutSampler) -> Rollout:
        """Return the best of each group, and which of them are ``good`` (B,) enough to learn from.

        A response is not good if its score is below the threshold, if it is truncated and ``truncated`` is ``mask``, or
        if it is a duplicate. Such responses fill up the batch if a group has too few good responses, but have no loss.
        """
        scores = self.adjusted_scores(rollout)
        threshold = self.config.threshold_of(rollout.update)
        good = torch.ones_like(scores, dtype=torch.bool) if threshold is None else scores >= threshold
        if self.config.truncated == "mask":
            good = good & rollout.tensors["finished"]
        good = good & ~torch.tensor(failures(rollout))
        selected: list[int] = []
        for members in group_members(rollout.groups):
            earlier: set[tuple[int, ...]] = set()
            for i in members:
                # Equal responses to a prompt are learned from only once.
                good[i] &= tuple(rollout.responses[i]) not in earlier
                earlier.add(tuple(rollout.responses[i]))
            # Good ones first, by score; ``best`` of them from every group keep the batch size fixed.
            order = sorted(members, key=lambda i: (bool(good[i]), float(scores[i])), reverse=True)
            selected += order[: self.config.best]
        best = rollout.subset(selected)
        good = good[torch.tensor(selected)]
        best.tensors["good"] = good
        self.averages.add("selected", good.sum(), len(best))
        self.averages.add("selected_score", (best.tensors["scores"] * good).sum(), good.sum())
        return best

    def advantages(self, rollout: Rollout, penalty: KLPenalty) -> None:
        """Add the KL to log, and the mask of tokens to learn from. There are no advantages."""
        tensors = rollout.tensors
        tensors |= {"kl": masked_kl(rollout), "learn_mask": tensors["response_mask"] & tensors["good"][:, None]}

    def token_count(self, batches: list[Batch]) -> float:
        """Return the tokens of an optimizer step."""
        return loss_count([batch["learn_mask"] for batch in batches], "token", self.config.max_tokens)

    def loss(self, outputs: Batch, batch: Batch, step: Step) -> torch.Tensor:
        """Return the mean negative log-likelihood per token at temperature 1, a scalar: SFT's loss."""
        mask = batch["learn_mask"]
        loss = aggregate(-outputs["logprobs"], mask, step.count, "token")
        self.averages.add("nll", masked_sum(-outputs["logprobs"].detach(), mask), mask.sum())
        return loss
