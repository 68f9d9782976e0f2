"""Own losses and advantages of RL: functions of ``align.methods.records`` in the place of a shipped method's part."""

from __future__ import annotations

import torch

from align.config.own_function import OwnFunction
from align.errors import UserError
from align.methods.call import FunctionFailed, Method
from align.methods.contract import check, response_form
from align.methods.records import Group, ResponseTokens
from align.rl.losses import Aggregation, LossTerms, aggregate, log_ratios
from align.rl.masking import masked_sum
from align.rl.packing import Batch, group_members
from align.rl.rollout import COMPONENT, Rollout


class OwnLoss:
    """A loss of sampled tokens or responses. Each token, or each response, of an optimizer step weighs the same."""

    def __init__(self, config: OwnFunction) -> None:
        """Import and check the function. Raises ``UserError`` if it cannot be learned from."""
        self.method = Method.own(config, "loss")
        try:
            form = response_form(self.method)
        except FunctionFailed as error:
            raise UserError(f"loss: {error} (on synthetic numbers, before training).") from error
        check(self.method, form, "loss")
        self.aggregation: Aggregation = "token" if form.per_token else "sequence"
        self.metrics: dict[str, float] = {}
        """Metrics of the last call."""

    def __call__(
        self, outputs: Batch, batch: Batch, weights: torch.Tensor, count: torch.Tensor | float, update: int
    ) -> LossTerms:
        """Return a micro-batch's part of the step's loss, and quantities to log; ``weights`` (B, T) are factors."""
        mask = batch["learn_mask"]
        values = batch.get("values")
        tokens = ResponseTokens(
            new_logprobs=outputs["logprobs"],
            logprobs=batch["logprobs"],
            sampler_logprobs=batch["sampler_logprobs"],
            ref_logprobs=batch["ref_logprobs"],
            advantages=batch["advantages"],
            entropy=outputs["entropy"],
            mask=mask,
            group=batch["group"][:, 0],
            values=None if values is None else values[:, :-1],
            returns=batch.get("returns"),
        )
        shape = tuple(mask.shape) if self.aggregation == "token" else (len(mask),)
        result = self.method(tokens, shape, f"in update {update + 1}")
        self.metrics = dict(result.metrics)
        per_token = result.values if self.aggregation == "token" else result.values[:, None].expand(mask.shape)
        # Values outside the mask may be anything but a number, which 0 does not cancel.
        per_token = torch.where(mask, per_token, per_token.new_zeros(())) * weights
        with torch.no_grad():
            log_ratio = log_ratios(tokens.new_logprobs, tokens.logprobs, mask, "token")
            sums = {
                "ratio": masked_sum(torch.exp(log_ratio), mask),
                "approx_kl": masked_sum(log_ratio**2 / 2, mask),
                "policy_loss": masked_sum(per_token, mask),
            }
        return LossTerms(aggregate(per_token, mask, count, self.aggregation), sums)


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
