"""CPO and ORPO on tokenized rows, with trainers of ``trl.experimental``, which a release may move or drop.

CPO (arXiv 2401.08417) includes the losses of SimPO and AlphaPO, ORPO is arXiv 2403.07691. Their losses stay trl's own.
``tests/training/test_experimental.py`` covers the overridden methods.
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
from align.training.held_out import row_batches, scoring
from align.training.rows import Encoded
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
            "this stage runs. Install trl 1.16, or use the stage 'dpo', which does not need it."
        ) from None


def load_trainer(mixin: type[PairForward], method: str) -> tuple[type[Any], type[Any]]:
    """Return ``mixin`` over trl's trainer of a method, ``cpo`` or ``orpo``, and the class of its arguments."""
    trainer = experimental(method, f"{method.upper()}Trainer")
    return type(mixin.__name__, (mixin, trainer), {}), experimental(method, f"{method.upper()}Config")


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
    own_weight: float
    """Weight of the chosen sides' loss per token in the trained loss."""
    prompt_too = False
    """True if the chosen side's own loss includes the prompt."""
    aux_loss_enabled: bool

    def __init__(self, *, model: Any, train_dataset: list[dict[str, Any]], **kwargs: Any) -> None:
        super().__init__(model=model, train_dataset=Rows(train_dataset), **kwargs)  # type: ignore[call-arg]
        add_fused_lm_head(plain_of(model), outputs=("log_probs", "mean_logits"))

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

    def pair_losses(self, chosen: torch.Tensor, rejected: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return losses and both sides' rewards, each (B,), from log-probabilities (B,).

        The trained loss is their mean plus ``own_weight`` times the chosen sides' loss per token.
        """
        raise NotImplementedError


class CPO(PairForward):
    """Learns from the policy's own log-probabilities, without a reference."""

    loss_type: str
    cpo_alpha: float

    @property
    def averaged(self) -> bool:  # type: ignore[override]
        return self.loss_type in ("ipo", "simpo")

    def pair_losses(self, chosen: torch.Tensor, rejected: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return CPO's losses and both sides' rewards, each (B,), from log-probabilities (B,)."""
        losses, *rewards = self.cpo_loss(chosen, rejected)  # type: ignore[attr-defined]
        return losses, *rewards

    @property
    def own_weight(self) -> float:  # type: ignore[override]
        return self.cpo_alpha


class ORPO(PairForward):
    """Learns from the odds of the policy's own answers, without a reference."""

    averaged = True
    own_weight = 1.0

    def __init__(self, *, prompt_too: bool, **kwargs: Any) -> None:
        self.prompt_too = prompt_too
        super().__init__(**kwargs)

    def pair_losses(self, chosen: torch.Tensor, rejected: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return ORPO's losses and both sides' rewards, each (B,), from log-probabilities (B,)."""
        log_odds, chosen_rewards, rejected_rewards, _, _ = self.odds_ratio_loss(  # type: ignore[attr-defined]
            chosen, rejected
        )
        return -log_odds, chosen_rewards, rejected_rewards


def held_out(trainer: Any, encoded: Encoded) -> dict[str, float]:
    """Return scores of a CPO or ORPO trainer's model on held-out pairs: means over pairs, ``nll`` over tokens.

    ``loss`` is the trained loss, ``accuracy`` the share of pairs whose chosen side has the larger reward, ``margin``
    the mean difference. A reward is beta times a side's log-probability, or times its mean over tokens if the loss uses
    the mean.
    """
    sums = {"loss": 0.0, "accuracy": 0.0, "margin": 0.0, "chosen_reward": 0.0, "rejected_reward": 0.0}
    total, tokens = 0.0, 0
    with scoring(trainer):
        for batch, inputs in row_batches(trainer, encoded, sides=2):
            chosen_logps, rejected_logps, _, _, loss = trainer.concatenated_forward(trainer.model, inputs)[:5]
            losses, chosen_rewards, rejected_rewards = trainer.pair_losses(chosen_logps, rejected_logps)
            token_count = inputs["attention_mask" if trainer.prompt_too else "completion_mask"][: len(batch), 1:].sum()
            total += float(loss) * int(token_count)
            tokens += int(token_count)
            # In the order of the keys of `sums`.
            values = (
                losses,
                (chosen_rewards > rejected_rewards).float(),
                chosen_rewards - rejected_rewards,
                chosen_rewards,
                rejected_rewards,
            )
            for name, value in zip(sums, values, strict=True):
                sums[name] += float(value.double().sum())
    means = {name: value / len(encoded.rows) for name, value in sums.items()}
    nll = total / tokens
    return {**means, "loss": means["loss"] + trainer.own_weight * nll, "nll": nll}
