"""Online DPO (arXiv 2402.04792): pairs of the policy's own responses, told apart by the scorer, update by update."""

from __future__ import annotations

from typing import ClassVar

import torch

from align.rl.critic_free.config import OnlineDPOConfig
from align.rl.critic_free.losses import pair_loss
from align.rl.critic_free.trainer import CriticFreeTrainer
from align.rl.kl import estimate_kl
from align.rl.rollout import Rollout, adjusted_scores


class OnlineDPOTrainer(CriticFreeTrainer):
    """Of the responses to a prompt, the best and the worst are a pair for DPO's loss against the reference."""

    method: ClassVar[str] = "online_dpo"
    learned_from: ClassVar[tuple[str, ...]] = ("ref_logprobs", "sides", "learn_mask")
    args: OnlineDPOConfig

    def choose(self, rollout: Rollout) -> Rollout:
        """The best and the worst of each group, one after the other; both are neither where all score the same."""
        scores = adjusted_scores(rollout, self.args).tolist()
        members: dict[int, list[int]] = {}
        for i, group in enumerate(rollout.groups):
            members.setdefault(group, []).append(i)
        chosen, sides = [], []
        for of_prompt in members.values():
            best = max(of_prompt, key=scores.__getitem__)
            others = [i for i in of_prompt if i != best]
            worst = min(others, key=scores.__getitem__)
            decided = scores[best] > scores[worst]
            chosen += [best, worst]
            sides += [1.0, -1.0] if decided else [0.0, 0.0]
        pairs = rollout.subset(chosen)
        pairs.tensors["sides"] = torch.tensor(sides)[:, None]  # (B, 1)
        self._averages.add("tied_pairs", float(sides.count(0.0)) / 2, len(members))
        return pairs

    def estimate(self, rollout: Rollout, kl_coef: float) -> None:
        """Nothing is estimated: which response is better is all that is learned from."""
        tensors = rollout.tensors
        mask = tensors["response_mask"]
        kl = estimate_kl(tensors["logprobs"], tensors["ref_logprobs"])
        tensors |= {"kl": torch.where(mask, kl, kl.new_zeros(())), "learn_mask": mask}

    def count_learned(self, learns: list[dict[str, torch.Tensor]]) -> float:
        """Decided pairs of an optimizer step."""
        return float(sum(int(learn["sides"].ne(0).sum()) for learn in learns)) / 2

    def loss_of(
        self, out: dict[str, torch.Tensor], learn: dict[str, torch.Tensor], count: torch.Tensor
    ) -> torch.Tensor:
        """The pair's loss; ``accuracy`` is the share of pairs that policy and reference rank as the scorer does."""
        args = self.args
        terms = pair_loss(
            out["logprobs"],
            learn["ref_logprobs"],
            learn["sides"],
            learn["learn_mask"],
            count,
            kind=args.loss,
            beta=args.beta,
            label_smoothing=args.label_smoothing,
        )
        for name, total in terms.sums.items():
            self._averages.add(name, total, learn["sides"].ne(0).sum() / 2)
        return terms.loss
