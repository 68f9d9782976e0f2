"""Online DPO (arXiv 2402.04792): pairs of the policy's own responses, ranked by the scorer in every update."""

from __future__ import annotations

from typing import ClassVar

import torch

from align.config.stages.online_dpo import OnlineDpoConfig
from align.rl.kl import KLPenalty
from align.rl.losses import pair_loss
from align.rl.objectives.base import Objective, Step, failures, mask_to_learn, masked_kl
from align.rl.packing import Batch, group_members
from align.rl.rollout import Rollout
from align.rl.sampler import RolloutSampler


class OnlineDPOObjective(Objective):
    """The best and the worst response to a prompt are a pair for DPO's loss against the reference."""

    name: ClassVar[str] = "online_dpo"
    loss_inputs: ClassVar[tuple[str, ...]] = ("ref_logprobs", "sides", "learn_mask")
    config: OnlineDpoConfig

    def select(self, rollout: Rollout, sampler: RolloutSampler) -> Rollout:
        """Return the best and the worst of each group, one after the other, and their ``sides`` (B, 1).

        A side is 1 for the better, -1 for the worse, and 0 for both if all score the same.
        """
        scores = self.adjusted_scores(rollout).tolist()
        failed = failures(rollout)
        groups = group_members(rollout.groups)
        selected: list[int] = []
        sides: list[float] = []
        for members in groups:
            best = max(members, key=scores.__getitem__)
            # Never the best one itself, even if all scores are equal.
            worst = min((i for i in members if i != best), key=scores.__getitem__)
            # Neighbors: ``plan`` keeps a group together, so a pair is in one micro-batch.
            selected += [best, worst]
            # A pair has no loss if the environment of either response failed.
            is_decided = scores[best] > scores[worst] and not (failed[best] or failed[worst])
            sides += [1.0, -1.0] if is_decided else [0.0, 0.0]
        pairs = rollout.subset(selected)
        pairs.tensors["sides"] = torch.tensor(sides)[:, None]
        self.averages.add("tied_pairs", float(sides.count(0.0)) / 2, len(groups))
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
