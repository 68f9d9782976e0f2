"""Methods that select responses to learn from: best-of-N fine-tuning and online DPO.

Best-of-N, or rejection sampling (RAFT, arXiv 2304.06767; ReST, 2308.08998), works in rounds: it samples N responses to
each prompt, selects the best, and trains on them by supervised steps. Online DPO (arXiv 2402.04792) learns from pairs
of the policy's own responses, ranked by the scorer in every update.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from align.config.stages.best_of_n import OnlineDpoConfig, RejectionConfig
from align.rl.losses import aggregate, loss_count, pair_loss
from align.rl.masking import masked_sum
from align.rl.objectives import Objective, Step, mask_to_learn, masked_kl
from align.rl.packing import Batch, group_members
from align.rl.rewards import KLPenalty
from align.rl.rollout import Rollout
from align.rl.sampler import RolloutSampler


class BestOfNObjective(Objective):
    """An update is a round: ``num_epochs`` passes over the best responses, by their likelihood only."""

    name: ClassVar[str] = "rejection"
    loss_inputs = ("learn_mask",)
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
        good = good & rollout.judged
        selected: list[int] = []
        for members in group_members(rollout.groups):
            earlier: set[tuple[int, ...]] = set()
            for i in members:
                # Equal responses to a prompt are learned from only once.
                good[i] &= tuple(rollout.responses[i]) not in earlier
                earlier.add(tuple(rollout.responses[i]))
            # Good responses first, by score; ``best`` of them from every group keep the batch size fixed.
            order = sorted(members, key=lambda i: (bool(good[i]), float(scores[i])), reverse=True)
            selected += order[: self.config.best]
        best = rollout.subset(selected)
        good = good[torch.tensor(selected)]
        best.tensors["good"] = good
        self.averages.add("selected", good.sum(), best.judged.sum())
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


class OnlineDPOObjective(Objective):
    """The best and the worst response to a prompt are a pair for DPO's loss against the reference."""

    name: ClassVar[str] = "online_dpo"
    loss_inputs = ("ref_logprobs", "sides", "learn_mask")
    config: OnlineDpoConfig

    def select(self, rollout: Rollout, sampler: RolloutSampler) -> Rollout:
        """Return the best and the worst of each group, one after the other, and their ``sides`` (B, 1).

        A side is 1 for the better, -1 for the worse, and 0 for both if all score the same.
        """
        scores = self.adjusted_scores(rollout).tolist()
        judged = rollout.judged.tolist()
        groups = group_members(rollout.groups)
        selected: list[int] = []
        sides: list[float] = []
        pairs_judged = ties = 0
        for members in groups:
            # Failed episodes only fill up a pair, which then has no loss.
            best = max(members, key=lambda i: (judged[i], scores[i]))
            # Never the best one itself, even if all scores are equal.
            worst = min((i for i in members if i != best), key=lambda i: (not judged[i], scores[i]))
            # Neighbors: ``plan`` keeps a group together, so a pair is in one micro-batch.
            selected += [best, worst]
            is_judged = judged[best] and judged[worst]
            is_decided = is_judged and scores[best] > scores[worst]
            sides += [1.0, -1.0] if is_decided else [0.0, 0.0]
            pairs_judged += is_judged
            ties += is_judged and not is_decided
        pairs = rollout.subset(selected)
        pairs.tensors["sides"] = torch.tensor(sides)[:, None]
        self.averages.add("tied_pairs", ties, pairs_judged)
        return pairs

    def advantages(self, rollout: Rollout, penalty: KLPenalty) -> None:
        """Add the KL to log. There are no advantages: the loss learns only which response is better."""
        rollout.tensors |= {"kl": masked_kl(rollout), "learn_mask": mask_to_learn(rollout, "learn")}

    def token_count(self, batches: list[Batch]) -> float:
        """Return the number of pairs of an optimizer step that are not ties."""
        return float(sum(int(batch["sides"].ne(0).sum()) for batch in batches)) / 2

    def loss(self, outputs: Batch, batch: Batch, step: Step) -> torch.Tensor:
        """Return the loss of the pairs, a scalar. ``accuracy``: the share that the policy ranks as the scorer does."""
        terms = pair_loss(
            outputs["logprobs"],
            batch["ref_logprobs"],
            batch["sides"],
            batch["learn_mask"],
            step.count,
            kind=self.config.loss,
            beta=self.config.beta,
            label_smoothing=self.config.label_smoothing,
        )
        self._log_sums(terms.sums, batch["sides"].ne(0).sum() / 2)
        return terms.loss
