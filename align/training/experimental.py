"""Load trainers of ``trl.experimental``, which a release may move or drop, and adapt them to tokenized rows.

Their losses stay trl's own.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

import torch
import trl
from trl.trainer.utils import add_fused_lm_head

from align.errors import UserError
from align.models.checkpoints.conversion import plain_of
from align.training.trainers import Prepared


def experimental(module: str, name: str) -> Any:
    """Return ``trl.experimental.<module>.<name>``. Raises ``UserError`` if the installed trl does not have it."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # our documentation lists the experimental trainers
    try:
        return getattr(importlib.import_module(f"trl.experimental.{module}"), name)
    except (ModuleNotFoundError, AttributeError) as error:
        if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("trl"):
            raise  # the module exists, but an import in it fails
        raise UserError(
            f"trl {trl.__version__} has no trl.experimental.{module}.{name}, an experimental trainer of trl's that "
            "this stage runs. Install trl 1.16, or take the stage 'dpo', which stays."
        ) from None


class Rows(list[dict[str, Any]]):
    """Tokenized rows whose ``map`` returns them unchanged, for a trainer that tokenizes by ``dataset.map``."""

    def map(self, *args: Any, **kwargs: Any) -> Rows:
        return self


class PairForward(Prepared):
    """Mixin before trl's CPO or ORPO trainer: one forward pass over both sides that stores no logits.

    trl's own forward pass computes the logits of every position, including prompts and padding. With a vocabulary of
    49,000 tokens they are most of the memory. Rows have ``prompt_ids``, ``chosen_ids`` and ``rejected_ids``; batches
    are in the form of trl's DPO.
    """

    averaged: bool
    """True if a side's log-probability is the mean over its tokens instead of the sum."""
    prompt_too = False
    """True if the chosen side's own loss includes the prompt."""
    aux_loss_enabled: bool

    def __init__(self, *, model: Any, train_dataset: list[dict[str, Any]], **kwargs: Any) -> None:
        super().__init__(model=model, train_dataset=Rows(train_dataset), **kwargs)  # type: ignore[call-arg]
        plain = plain_of(model)
        add_fused_lm_head(plain, outputs=("log_probs", "mean_logits"))

    def concatenated_forward(self, model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Return log-probabilities of the chosen and the rejected answers (B,), their tokens' mean logits, and the
        scalar loss per token of the chosen sides; then a mixture of experts' own loss.
        """
        completion_mask = batch["completion_mask"]  # (2 B, T), chosen above rejected
        pairs = len(completion_mask) // 2
        # The chosen side's own loss may include the prompt, while log-probabilities are of answers only.
        label_mask = completion_mask.clone()
        if self.prompt_too:
            label_mask[:pairs] = batch["attention_mask"][:pairs]
        routers = {"output_router_logits": True} if self.aux_loss_enabled else {}
        outputs = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            labels=batch["input_ids"].masked_fill(label_mask == 0, -100),
            use_cache=False,
            fused_lm_head=True,
            **routers,
        )
        width = completion_mask.shape[1] - 1  # methods with virtual tokens have more positions than the row
        logprobs = outputs.log_probs[:, -width:]  # (2 B, T - 1), 0 at positions without a label
        completion_mask, label_mask = completion_mask[:, 1:], label_mask[:, 1:]
        sums = (logprobs * completion_mask).sum(dim=1)
        if self.averaged:
            sums = sums / completion_mask.sum(dim=1)
        loss = -logprobs[:pairs].sum() / label_mask[:pairs].sum()
        logits = outputs.mean_logits[:, -width:]
        sides = [logits[rows][completion_mask[rows].bool()] for rows in (slice(None, pairs), slice(pairs, None))]
        results = (sums[:pairs], sums[pairs:], *sides, loss)
        return (*results, outputs.aux_loss) if self.aux_loss_enabled else results
