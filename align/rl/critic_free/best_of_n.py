"""Best-of-N fine-tuning, or rejection sampling (RAFT, arXiv 2304.06767; ReST, 2308.08998): learn the best of one's own.

A round samples N responses to each prompt, keeps the best, and takes supervised steps on them; the next round samples
from what came out.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from align.rl.critic_free.config import BestOfNConfig
from align.rl.critic_free.trainer import CriticFreeTrainer
from align.rl.kl import estimate_kl
from align.rl.masking import masked_sum
from align.rl.ppo.losses import aggregate, loss_count
from align.rl.rollout import Rollout, adjusted_scores


class BestOfNTrainer(CriticFreeTrainer):
    """An update is a round: ``num_epochs`` passes over the best responses, by their likelihood alone."""

    method: ClassVar[str] = "rejection"
    learned_from: ClassVar[tuple[str, ...]] = ("learn_mask",)
    learns_likelihood: ClassVar[bool] = True
    args: BestOfNConfig

    def choose(self, rollout: Rollout) -> Rollout:
        """The best of each group; those below the threshold, cut off or said twice are there but not learned from."""
        scores = adjusted_scores(rollout, self.args)
        lowest = self.args.lowest(rollout.update)
        good = torch.ones_like(scores, dtype=torch.bool) if lowest is None else scores >= lowest
        if self.args.truncated == "mask":
            good = good & rollout.tensors["finished"]
        members: dict[int, list[int]] = {}
        for i, group in enumerate(rollout.groups):
            members.setdefault(group, []).append(i)
        chosen: list[int] = []
        for of_prompt in members.values():
            said: set[tuple[int, ...]] = set()
            for i in of_prompt:
                good[i] &= tuple(rollout.responses[i]) not in said
                said.add(tuple(rollout.responses[i]))
            order = sorted(of_prompt, key=lambda i: (bool(good[i]), float(scores[i])), reverse=True)
            chosen += order[: self.args.best]
        best = rollout.subset(chosen)
        best.tensors["good"] = good[torch.tensor(chosen)]
        self._averages.add("selected", best.tensors["good"].sum(), len(best))
        self._averages.add(
            "selected_score", (best.tensors["scores"] * best.tensors["good"]).sum(), best.tensors["good"].sum()
        )
        return best

    def estimate(self, rollout: Rollout, kl_coef: float) -> None:
        """Nothing but which tokens are learned from."""
        tensors = rollout.tensors
        mask = tensors["response_mask"]
        kl = estimate_kl(tensors["logprobs"], tensors["ref_logprobs"])
        tensors |= {"kl": torch.where(mask, kl, kl.new_zeros(())), "learn_mask": mask & tensors["good"][:, None]}

    def count_learned(self, learns: list[dict[str, torch.Tensor]]) -> float:
        """Tokens of an optimizer step."""
        return loss_count([learn["learn_mask"] for learn in learns], "token", self.args.max_tokens)

    def loss_of(
        self, out: dict[str, torch.Tensor], learn: dict[str, torch.Tensor], count: torch.Tensor
    ) -> torch.Tensor:
        """Mean negative log-likelihood per token, at temperature 1: SFT's loss."""
        mask = learn["learn_mask"]
        loss = aggregate(-out["logprobs"], mask, count, "token")
        self._averages.add("nll", masked_sum(-out["logprobs"].detach(), mask), mask.sum())
        return loss
