"""Methods that select responses to learn from: best-of-N fine-tuning and online DPO.

Best-of-N, or rejection sampling (RAFT, arXiv 2304.06767; ReST, 2308.08998), works in rounds: it samples N responses to
each prompt, selects the best, and trains on them by supervised steps. Online DPO (arXiv 2402.04792) learns from pairs
of the policy's own responses, ranked by the scorer in every update.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch

from align.config.stages.best_of_n import OnlineDpoConfig, RejectionConfig
from align.methods.call import Method
from align.methods.losses import cdpo, hinge, ipo
from align.methods.records import PairLogprobs
from align.rl.losses import LossTerms, aggregate, loss_count
from align.rl.masking import masked_sum
from align.rl.objectives import Objective, Step, mask_to_learn, masked_kl
from align.rl.packing import Batch, group_members
from align.rl.rewards import KLPenalty
from align.rl.rollout import Rollout
from align.rl.sampler import RolloutSampler

ONLINE_LOSSES: Mapping[str, Callable[..., torch.Tensor]] = {"sigmoid": cdpo, "ipo": ipo, "hinge": hinge}
"""The losses of ``OnlineDpoConfig.loss``. IPO's margin is per token, so that one target fits all lengths."""


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
    loss_inputs = ("ref_logprobs", "decided", "learn_mask")
    config: OnlineDpoConfig

    def select(self, rollout: Rollout, sampler: RolloutSampler) -> Rollout:
        """Return the best and the worst of each group, one after the other.

        ``decided`` (B, 1) is False for both if all score the same.
        """
        scores = self.adjusted_scores(rollout).tolist()
        judged = rollout.judged.tolist()
        groups = group_members(rollout.groups)
        selected: list[int] = []
        decided: list[bool] = []
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
            decided += [is_decided] * 2
            pairs_judged += is_judged
            ties += is_judged and not is_decided
        pairs = rollout.subset(selected)
        pairs.tensors["decided"] = torch.tensor(decided)[:, None]
        self.averages.add("tied_pairs", ties, pairs_judged)
        return pairs

    def advantages(self, rollout: Rollout, penalty: KLPenalty) -> None:
        """Add the KL to log. There are no advantages: the loss learns only which response is better."""
        rollout.tensors |= {"kl": masked_kl(rollout), "learn_mask": mask_to_learn(rollout, "learn")}

    def token_count(self, batches: list[Batch]) -> float:
        """Return the number of pairs of an optimizer step that are not ties."""
        return float(sum(int(batch["decided"].sum()) for batch in batches)) / 2

    def loss(self, outputs: Batch, batch: Batch, step: Step) -> torch.Tensor:
        """Return the loss of the pairs, a scalar. ``accuracy``: the share that the policy ranks as the scorer does."""
        is_decided = batch["decided"][0::2, 0]
        terms = pair_loss(
            Method(ONLINE_LOSSES[self.config.loss]),
            outputs["logprobs"],
            batch["ref_logprobs"],
            is_decided,
            batch["learn_mask"],
            step.count,
            beta=self.config.beta,
            label_smoothing=self.config.label_smoothing,
        )
        self._log_sums(terms.sums, is_decided.sum())
        return terms.loss


def pair_loss(
    method: Method,
    new_logprobs: torch.Tensor,
    ref_logprobs: torch.Tensor,
    is_decided: torch.Tensor,
    mask: torch.Tensor,
    count: torch.Tensor | float,
    **fields: float,
) -> LossTerms:
    """Return a preference loss over pairs of neighboring rows, the better response first.

    Equal to the loss of stage ``dpo`` on the same numbers. Log-probabilities and ``mask`` are (B, T). ``is_decided``
    (B / 2,) is False for a tie, which has no loss. ``count`` and the logged sums are over pairs. ``fields``, ``beta``
    among them, are parameters of the loss.
    """
    # The sum of differences has fewer rounding errors than the difference of two long sums.
    drift = torch.where(mask, new_logprobs - ref_logprobs, new_logprobs.new_zeros(())).sum(dim=1)
    nothing = torch.zeros_like(drift[0::2])
    pairs = PairLogprobs(
        chosen_logprobs=drift[0::2],
        rejected_logprobs=drift[1::2],
        ref_chosen_logprobs=nothing,
        ref_rejected_logprobs=nothing,
        chosen_token_logprobs=new_logprobs[0::2],
        rejected_token_logprobs=new_logprobs[1::2],
        chosen_mask=mask[0::2],
        rejected_mask=mask[1::2],
    )
    per_pair = method(pairs, (len(pairs),), fields=fields).values
    with torch.no_grad():
        sums = {
            "accuracy": masked_sum((pairs.margins > 0).float(), is_decided),
            "margin": masked_sum(fields["beta"] * pairs.margins, is_decided),
            "pair_loss": masked_sum(per_pair, is_decided),
        }
    return LossTerms(masked_sum(per_pair, is_decided) / count, sums)
