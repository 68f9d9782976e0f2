"""The part of a trainer that differs between methods: the learned part of a rollout, and the loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from align.config.stages.policy_gradient import drift_settings
from align.rl.metrics import Averages
from align.rl.packing import Batch
from align.rl.rewards import KLPenalty, RunningScale, adjust_scores, estimate_kl
from align.rl.rollout import Rollout
from align.rl.sampler import RolloutSampler


@dataclass(frozen=True)
class Step:
    """The optimizer step that a micro-batch is a part of."""

    update: int
    count: torch.Tensor | float
    """Divisor of its loss sums: ``token_count`` over all micro-batches and processes."""
    penalty: KLPenalty
    ptx_count: torch.Tensor | float = 1.0
    """Divisor of the supervised texts' summed loss."""


class Objective(ABC):
    """A method of learning from rollouts. The trainer calls its methods in the order of this class."""

    name: ClassVar[str]
    """Kind of the stage, for messages."""
    loss_inputs: tuple[str, ...]
    """Tensors of a rollout that ``loss`` reads, ``learn_mask`` among them."""
    learns_likelihood: ClassVar[bool] = False
    """True for SFT's loss: log-probabilities are then at temperature 1, not at the sampling temperature."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.averages = Averages()
        """Metrics that the trainer logs with its own."""
        self.drift = drift_settings(config)
        self.scale = RunningScale() if self.drift.normalize_scores else None

    def select(self, rollout: Rollout, sampler: RolloutSampler) -> Rollout:
        """Return the scored responses to measure and learn from, here all."""
        return rollout

    @abstractmethod
    def advantages(self, rollout: Rollout, penalty: KLPenalty) -> None:
        """Add ``loss_inputs`` and ``kl`` (B, T) to a rollout with scores and log-probabilities."""

    @abstractmethod
    def token_count(self, batches: list[Batch]) -> float:
        """Return the divisor of the loss for this process's micro-batches of an optimizer step.

        Each of ``batches`` has the ``loss_inputs`` of a micro-batch.
        """

    @abstractmethod
    def loss(self, outputs: Batch, batch: Batch, step: Step) -> torch.Tensor:
        """Return a micro-batch's share of its optimizer step's loss, a scalar.

        ``outputs`` are the model's (``logprobs`` and ``entropy`` (B, T), for PPO ``values`` (B, T+1)), ``batch`` the
        rollout's ``loss_inputs``.
        """

    def rests_policy(self, update: int) -> bool:
        """Return True if only a critic learns in this update."""
        return False

    def adjusted_scores(self, rollout: Rollout, scale: RunningScale | None = None) -> torch.Tensor:
        """Return scores (B,) as they are learned from: on the running scale, clipped, penalties subtracted."""
        tensors = rollout.tensors
        scores = tensors["scores"]
        if scale is not None:
            # The scores are added first, so the very first rollout already has a scale.
            scale.add(scores[rollout.judged])
            scores = scale.apply(scores)
        return adjust_scores(
            scores,
            tensors["finished"],
            missing_eos_penalty=self.config.missing_eos_penalty,
            score_clip=self.drift.score_clip,
            length_penalty=self.config.length_penalty,
            lengths=tensors["response_mask"].sum(dim=1),
        )

    def _log_sums(self, sums: Mapping[str, torch.Tensor], count: torch.Tensor | float) -> None:
        for name, total in sums.items():
            self.averages.add(name, total, count)


def masked_kl(rollout: Rollout) -> torch.Tensor:
    """Return the KL estimate (k1) of each token of a measured rollout in nats, (B, T), 0 on padding."""
    tensors = rollout.tensors
    kl = estimate_kl(tensors["logprobs"], tensors["ref_logprobs"])
    return torch.where(tensors["response_mask"], kl, kl.new_zeros(()))


def mask_to_learn(rollout: Rollout, truncated: str) -> torch.Tensor:
    """Return the mask (B, T) of tokens that the loss includes; ``mask`` leaves truncated responses out.

    Episodes whose environment failed are always excluded, because their score is no judgment of the policy.
    """
    mask = rollout.tensors["response_mask"] & rollout.judged[:, None]
    return mask & rollout.tensors["finished"][:, None] if truncated == "mask" else mask
