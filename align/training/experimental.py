"""Trainers that trl keeps under ``trl.experimental``, which another release may move or drop: one clear sentence then.

Also what they need to take rows that are tokenized already. Leaves out their losses, which stay trl's own.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

import torch
import trl
from trl.trainer.utils import add_fused_lm_head

from align.errors import UserError
from align.training.trainers import Prepared


def experimental(module: str, name: str) -> Any:
    """``trl.experimental.<module>.<name>``. Raises ``UserError`` where the installed trl has no such thing."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # our documentation says what is experimental
    try:
        return getattr(importlib.import_module(f"trl.experimental.{module}"), name)
    except (ModuleNotFoundError, AttributeError) as error:
        if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("trl"):
            raise  # it is there; something that it imports is not
        raise UserError(
            f"trl {trl.__version__} has no trl.experimental.{module}.{name}, an experimental trainer of trl's that "
            "this stage runs. Install trl 1.16, or take the stage 'dpo', which stays."
        ) from None


class Rows(list[dict[str, Any]]):
    """Rows for a trainer that tokenizes by ``dataset.map``: these are tokenized already, so it changes nothing."""

    def map(self, *args: Any, **kwargs: Any) -> Rows:
        return self


class PairForward(Prepared):
    """Mixed in before trl's CPO or ORPO trainer: one forward pass over both sides that keeps no logits.

    trl's own builds the logits of every position, prompts and padding too: with 49,000 tokens most of the memory.
    Rows: ``prompt_ids``, ``chosen_ids``, ``rejected_ids``; batches are those of trl's DPO.
    """

    averaged: bool
    """Whether a side's log-probability is the mean over its tokens rather than the sum."""
    prompt_too = False
    """Whether the chosen side's own loss takes in the prompt."""
    aux_loss_enabled: bool

    def __init__(self, *, model: Any, train_dataset: list[dict[str, Any]], **kwargs: Any) -> None:
        super().__init__(model=model, train_dataset=Rows(train_dataset), **kwargs)  # type: ignore[call-arg]
        plain = model.get_base_model() if hasattr(model, "get_base_model") else model
        add_fused_lm_head(plain, outputs=("log_probs", "mean_logits"))

    def concatenated_forward(self, model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Log-probabilities of the chosen and the rejected answers (B,), their tokens' mean logits, the chosen sides'
        loss per token; then a mixture of experts' own loss.
        """
        answered = batch["completion_mask"]  # (2 B, T), chosen above rejected
        pairs = len(answered) // 2
        labeled = answered.clone()
        if self.prompt_too:
            labeled[:pairs] = batch["attention_mask"][:pairs]
        routers = {"output_router_logits": True} if self.aux_loss_enabled else {}
        outputs = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            labels=batch["input_ids"].masked_fill(labeled == 0, -100),
            use_cache=False,
            fused_lm_head=True,
            **routers,
        )
        width = answered.shape[1] - 1  # methods with virtual tokens have more positions than the row
        logprobs = outputs.log_probs[:, -width:]  # (2 B, T - 1), 0 where there is no label
        answered, labeled = answered[:, 1:], labeled[:, 1:]
        sums = (logprobs * answered).sum(dim=1)
        if self.averaged:
            sums = sums / answered.sum(dim=1)
        loss = -logprobs[:pairs].sum() / labeled[:pairs].sum()
        logits = outputs.mean_logits[:, -width:]
        sides = [logits[rows][answered[rows].bool()] for rows in (slice(None, pairs), slice(pairs, None))]
        made = (sums[:pairs], sums[pairs:], *sides, loss)
        return (*made, outputs.aux_loss) if self.aux_loss_enabled else made
