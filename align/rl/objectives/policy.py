"""The base of methods with a policy-gradient loss, whose loss and advantage may be functions of the user's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeGuard

import torch

from align.config.own_function import OwnFunction
from align.errors import UserError
from align.methods.call import FunctionFailed, Method
from align.methods.contract import check, response_form
from align.methods.losses import POLICY_LOSSES
from align.methods.records import Group, ResponseTokens
from align.rl.losses import Aggregation, LossTerms, aggregate, importance_weights, loss_count
from align.rl.masking import masked_sum
from align.rl.objectives import Objective, Step
from align.rl.packing import Batch, group_members
from align.rl.rewards import estimate_kl
from align.rl.rollout import COMPONENT, Rollout


@dataclass(frozen=True)
class PolicyLoss:
    """The loss of a method's function (``align.methods.losses``, or an own function) over sampled responses."""

    method: Method
    aggregation: Aggregation
    per_token: bool = True
    """False for a function that returns one number per response, (B,)."""

    def __call__(
        self,
        tokens: ResponseTokens,
        count: torch.Tensor | float,
        weights: torch.Tensor | None = None,
        when: str = "",
    ) -> LossTerms:
        """Return a micro-batch's part of the step's loss, and quantities to log.

        ``weights`` (B, T) are factors of the tokens' losses. ``when`` names the update in errors.
        """
        mask = tokens.mask
        result = self.method(tokens, tuple(mask.shape) if self.per_token else (len(mask),), when)
        per_token = result.values if self.per_token else result.values[:, None].expand(mask.shape)
        if weights is not None:
            per_token = per_token * weights
        with torch.no_grad():
            # A function that has another ratio than the tokens' returns these two among its metrics.
            metrics = {"ratio": tokens.ratio, "approx_kl": tokens.log_ratio**2 / 2, **result.metrics}
            sums = {name: masked_sum(value, mask) for name, value in metrics.items() if _is_like(value, mask)}
            sums["policy_loss"] = masked_sum(per_token, mask)
            others = {name: _sum_items(value, mask) for name, value in metrics.items() if name not in sums}
        return LossTerms(aggregate(per_token, mask, count, self.aggregation), sums, others)


def _is_like(value: torch.Tensor | float, mask: torch.Tensor) -> TypeGuard[torch.Tensor]:
    """Return True for a metric of tokens."""
    return isinstance(value, torch.Tensor) and value.shape == mask.shape


def _sum_items(value: torch.Tensor | float, mask: torch.Tensor) -> tuple[torch.Tensor | float, int]:
    """Return the sum and the count of a metric of responses, (B,), or of a number. Responses need a learned token."""
    if not isinstance(value, torch.Tensor):
        return value, 1
    is_learned = mask.any(dim=1)
    return masked_sum(value, is_learned), int(is_learned.sum())


class PolicyObjective(Objective):
    """A surrogate of sampled tokens, minus an entropy bonus, plus the KL penalty if it is in the loss."""

    loss_inputs: tuple[str, ...] = (
        "logprobs",
        "sampler_logprobs",
        "ref_logprobs",
        "advantages",
        "learn_mask",
        "group",
    )
    policy_loss: PolicyLoss

    def token_count(self, batches: list[Batch]) -> float:
        """Return the tokens or responses of an optimizer step, by the loss's aggregation."""
        masks = [batch["learn_mask"] for batch in batches]
        return loss_count(masks, self.policy_loss.aggregation, self.config.max_tokens)

    def policy_terms(self, outputs: Batch, batch: Batch, step: Step) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the policy's part of a micro-batch's loss, a scalar, and sums over its tokens to log.

        At the rollout's weights the gradient of the KL term equals the gradient of the KL (k2). It is an approximation
        after steps away from them.
        """
        config, mask, kind = self.config, batch["learn_mask"], self.policy_loss.aggregation
        # They correct the engine's rounding, and drop responses that another policy wrote.
        weights = importance_weights(
            batch["logprobs"],
            batch["sampler_logprobs"],
            mask,
            config.importance_cap,
            config.importance_sequence_cap,
        )
        terms = self.policy_loss(_tokens(outputs, batch), step.count, weights, f"in update {step.update + 1}")
        for name, (total, count) in terms.others.items():
            self.averages.add(name, total, count)
        loss = terms.loss
        if config.entropy_coef:
            loss = loss - config.entropy_coef * aggregate(outputs["entropy"], mask, step.count, kind)
        if step.penalty.in_loss:
            drift = estimate_kl(outputs["logprobs"], batch["ref_logprobs"], config.drift_estimator)
            loss = loss + step.penalty.in_loss * aggregate(drift, mask, step.count, kind)
        return loss, terms.sums | {"importance_weight": (weights * mask).sum()}


def choose_loss(loss: str | OwnFunction, aggregation: Aggregation, **options: float | None) -> PolicyLoss:
    """Return a shipped loss with its options, or an own loss, which is imported and checked.

    Each token of an own loss weighs the same, or each response if it returns one number per response. Raises
    ``UserError`` for an own loss that cannot be learned from.
    """
    if isinstance(loss, str):
        return PolicyLoss(Method(POLICY_LOSSES[loss], options), aggregation)
    method = Method.own(loss, "loss")
    try:
        form = response_form(method)
    except FunctionFailed as error:
        raise UserError(f"loss: {error} (on synthetic numbers, before training).") from error
    check(method, form, "loss")
    return PolicyLoss(method, "token" if form.per_token else "sequence", form.per_token)


def _tokens(outputs: Batch, batch: Batch) -> ResponseTokens:
    """Return what a loss gets of a micro-batch."""
    values = batch.get("values")
    return ResponseTokens(
        new_logprobs=outputs["logprobs"],
        logprobs=batch["logprobs"],
        sampler_logprobs=batch["sampler_logprobs"],
        ref_logprobs=batch["ref_logprobs"],
        advantages=batch["advantages"],
        entropy=outputs["entropy"],
        mask=batch["learn_mask"],
        group=batch["group"][:, 0],
        # The last column is the state after the response, which has no token.
        values=None if values is None else values[:, :-1],
        returns=batch.get("returns"),
    )


def own_advantages(method: Method, rollout: Rollout, totals: torch.Tensor, kl: torch.Tensor) -> torch.Tensor:
    """Return an own function's advantages, (B, T), 0 outside the mask and for failed episodes.

    ``totals`` (B,) are the scores after penalties, ``kl`` (B, T) is the KL to the reference.
    """
    tensors = rollout.tensors
    mask = tensors["response_mask"]
    advantages = torch.zeros(mask.shape)
    judged = rollout.judged.tolist()
    parts = {name.removeprefix(COMPONENT): value for name, value in tensors.items() if name.startswith(COMPONENT)}
    for members in group_members(rollout.groups):
        places = [place for place in members if judged[place]]
        if not places:
            continue
        group = Group(
            scores=totals[places],
            lengths=mask[places].sum(dim=1),
            kl=kl[places].sum(dim=1),
            finished=tensors["finished"][places],
            mask=mask[places],
            parts={name: value[places] for name, value in parts.items()},
            rows=[rollout.rows[places[0]]],
        )
        shape = (len(places),)
        values = method(group, shape, f"in update {rollout.update + 1}", or_shape=tuple(group.mask.shape)).values
        advantages[places] = (values if values.dim() == 2 else values[:, None].expand(group.mask.shape)).float()
    return torch.where(mask, advantages, advantages.new_zeros(()))
