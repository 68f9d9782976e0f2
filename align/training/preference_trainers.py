"""trl's DPO and KTO trainers (arXiv 2305.18290, 2402.01306) for tokenized rows with the reference's log-probabilities.

Rows whose answers have several turns say which tokens are the assistant's (``chosen_mask``, ``rejected_mask``,
``completion_mask``, ``rows.py``); the text between the turns has no loss. Rows without these columns are collated as
trl does. Private methods of trl are overridden; ``tests/training/test_dpo_trainer.py`` and ``test_kto_trainer.py`` fail
when an upgrade changes them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import torch
from accelerate.utils import send_to_device
from peft import PeftModel
from trl.trainer.dpo_trainer import DataCollatorForPreference, DPOTrainer
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference, KTOTrainer

from align.methods.call import Method, Result
from align.methods.losses import PAIR_LOSSES
from align.methods.records import PairLogprobs
from align.training.held_out import scoring
from align.training.order import by_length
from align.training.rows import ROW, Encoded, Row, collate_numbers
from align.training.trainers import SCORING_TOKENS, Prepared
from align.training.unpaired import GroupOrder

MASKS = ("chosen_mask", "rejected_mask", "completion_mask", "KL_completion_mask")
"""Columns of rows whose answers have several turns."""


@dataclass
class PairCollator(DataCollatorForPreference):  # type: ignore[misc]
    """Collates pairs, chosen answers above rejected answers: (2 B, T)."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return trl's batch, with a ``completion_mask`` that has the gaps of the answers."""
        batch: dict[str, Any] = super().torch_call(examples)
        # chunk() returns views, so the changes below reach the batch.
        chosen, rejected = batch["completion_mask"].chunk(2)
        _add_gaps(chosen, examples, "chosen_mask")
        _add_gaps(rejected, examples, "rejected_mask")
        return batch | collate_numbers(examples)


@dataclass
class UnpairedCollator(DataCollatorForUnpairedPreference):  # type: ignore[misc]
    """Collates single answers, and the mismatched answers of KTO's reference point."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return trl's batch, with masks that have the gaps of the answers."""
        batch: dict[str, Any] = super().torch_call(examples)
        for name in ("completion_mask", "KL_completion_mask"):
            if name in batch:
                _add_gaps(batch[name], examples, name)
        return batch


def _add_gaps(completion_mask: torch.Tensor, rows: Sequence[dict[str, Any]], column: str) -> None:
    """Zero the entries of ``completion_mask`` (B, T) in place that are 0 in a row's own mask."""
    for index, row in enumerate(rows):
        mask = row.get(column)
        if mask is not None:
            start = len(row["prompt_ids"])
            completion_mask[index, start : start + len(mask)] = torch.tensor(mask)


class _NoReference(torch.nn.Module):
    """Placeholder for trl's reference model. With it trl creates no reference and copies no adapter."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("the reference's log-probabilities are columns of the rows")


class ScoredByReference(Prepared):
    """Mixin before trl's DPO or KTO trainer: rows contain the reference's log-probabilities, and beta may change.

    ``beta_at`` returns beta for the number of finished optimizer steps.
    """

    state: Any
    beta: float
    _metrics: Any
    _signature_columns: list[str] | None

    def __init__(self, *, model: Any, beta_at: Callable[[int], float], **kwargs: Any) -> None:
        self._beta_at = beta_at
        # trl would copy a new adapter as its reference, which not every method supports.
        reference = _NoReference(model.config) if isinstance(model, PeftModel) else None
        super().__init__(model=model, ref_model=reference, **kwargs)  # type: ignore[call-arg]
        # The placeholder must not be prepared, moved or saved with the trainer.
        self.ref_model = None

    def _precompute_ref_logps(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        # Columns that are not named here would be removed from the rows.
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()  # type: ignore[misc]
            self._signature_columns = [*(self._signature_columns or []), *MASKS, ROW]

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        self.beta = self._beta_at(self.state.global_step)
        self._metrics["train" if self.model.training else "eval"]["beta"].append(self.beta)
        return super().compute_loss(*args, **kwargs)  # type: ignore[misc]


@dataclass(frozen=True)
class WeightedLoss:
    """One term of DPO's loss."""

    loss: Method
    weight: float


class PreparedDPO(ScoredByReference, DPOTrainer):  # type: ignore[misc]
    """Rows: ``prompt_ids``, ``chosen_ids``, ``rejected_ids``, ``ref_chosen_logps``, ``ref_rejected_logps``.

    The loss is the weighted sum of ``losses``, functions of ``PairLogprobs``. ``fields`` are values that a function
    gets if it has parameters of these names, next to ``beta``. ``sources`` are the rows that ``row`` numbers.
    """

    losses: Sequence[WeightedLoss] = (WeightedLoss(Method(PAIR_LOSSES["sigmoid"]), 1.0),)
    fields: Mapping[str, float] = MappingProxyType({})
    divergence: Callable[[torch.Tensor], torch.Tensor] | None = None
    sources: Sequence[Row] = ()

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
        outputs, pairs = self._pair_logprobs(model, inputs)
        loss = torch.zeros((), device=pairs.chosen_logprobs.device)
        when = f"at step {self.state.global_step + 1}"
        for term in self.losses:
            result = term.loss(pairs, (len(pairs),), when, fields={"beta": self.beta, **self.fields})
            loss = loss + (self._weighted(result, outputs, pairs).mean() * term.weight)
            for name, value in result.means().items():
                self._metrics[self._mode][name].append(value)
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss
            self._append("aux_loss", outputs.aux_loss)
        self._log_pairs(outputs, pairs, inputs)
        return (loss, outputs) if return_outputs else loss

    def _pair_logprobs(self, model: Any, inputs: Any) -> tuple[Any, PairLogprobs]:
        """Return the model's outputs, and the log-probabilities of the batch's pairs by policy and reference."""
        mask = inputs["completion_mask"]
        columns = {"completion_mask", "ref_chosen_logps", "ref_rejected_logps", ROW}
        model_inputs = {name: value for name, value in inputs.items() if name not in columns}
        if self.aux_loss_enabled:
            model_inputs["output_router_logits"] = True
        labels = inputs["input_ids"].masked_fill(mask == 0, -100)
        outputs = model(**model_inputs, use_cache=False, labels=labels, fused_lm_head=True)
        # Methods with virtual tokens return more positions than the row has.
        tokens = outputs.log_probs[:, -(mask.shape[1] - 1) :]  # (2 B, T), chosen above rejected
        chosen_mask, rejected_mask = mask[:, 1:].bool().chunk(2)
        chosen, rejected = tokens.chunk(2)
        shared = torch.minimum(chosen_mask.sum(dim=1), rejected_mask.sum(dim=1))
        return outputs, PairLogprobs(
            chosen_logprobs=self._sum(chosen, chosen_mask, shared),
            rejected_logprobs=self._sum(rejected, rejected_mask, shared),
            ref_chosen_logprobs=inputs["ref_chosen_logps"],
            ref_rejected_logprobs=inputs["ref_rejected_logps"],
            chosen_token_logprobs=chosen,
            rejected_token_logprobs=rejected,
            chosen_mask=chosen_mask,
            rejected_mask=rejected_mask,
            rows=[self.sources[row] for row in inputs[ROW].tolist()] if ROW in inputs else (),
            **({} if self.divergence is None else {"divergence": self.divergence}),
        )

    def _sum(self, logprobs: torch.Tensor, mask: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
        """Return the sum (B,) over tokens (B, T); those beyond ``shared`` (B,) count ``ld_alpha`` (LD-DPO)."""
        if self.ld_alpha is None:
            return logprobs.sum(dim=1)
        place = mask.cumsum(dim=1)
        in_shared = (place > 0) & (place <= shared[:, None])
        return (logprobs * in_shared).sum(dim=1) + self.ld_alpha * (logprobs * (place > shared[:, None])).sum(dim=1)

    def _weighted(self, result: Result, outputs: Any, pairs: PairLogprobs) -> torch.Tensor:
        """Return losses (B,) times the pairs' probability under the policy, if WPO weights them (arXiv 2406.11827)."""
        if not self.use_weighting:
            return result.values
        with torch.no_grad():
            mask = torch.cat([pairs.chosen_mask, pairs.rejected_mask])
            tokens = torch.cat([pairs.chosen_token_logprobs, pairs.rejected_token_logprobs])
            aligned = (tokens - outputs.log_sum_sq_probs[:, -mask.shape[1] :]) * mask
            chosen, rejected = torch.exp(aligned.sum(dim=1) / mask.sum(dim=1).clamp(min=1)).chunk(2)
        return result.values * (chosen * rejected)

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    def _append(self, name: str, values: torch.Tensor) -> None:
        """Add the mean of values, over all processes, to a metric."""
        self._metrics[self._mode][name].append(self.accelerator.gather_for_metrics(values.detach()).mean().item())

    def _append_per_token(self, name: str, values: torch.Tensor, mask: torch.Tensor) -> None:
        """Add the mean of the masked values (B, T), over all processes, to a metric."""
        gather = self.accelerator.gather_for_metrics
        total, count = gather(values.detach()[mask].sum()).sum(), gather(mask.sum()).sum()
        self._metrics[self._mode][name].append((total / count.clamp(min=1)).item())

    def _log_pairs(self, outputs: Any, pairs: PairLogprobs, inputs: Any) -> None:
        """Add the metrics of a micro-batch, under trl's names."""
        width = pairs.chosen_mask.shape[1]
        chosen_logits, rejected_logits = outputs.mean_logits[:, -width:].chunk(2)
        entropy, is_top1 = outputs.entropy[:, -width:], outputs.is_top1[:, -width:].chunk(2)[0]
        self._append_per_token("entropy", entropy, torch.cat([pairs.chosen_mask, pairs.rejected_mask]))
        self._append_per_token("logits/chosen", chosen_logits, pairs.chosen_mask)
        self._append_per_token("logits/rejected", rejected_logits, pairs.rejected_mask)
        self._append_per_token("mean_token_accuracy", is_top1.float(), pairs.chosen_mask)
        if self.model.training:
            tokens = self.accelerator.gather_for_metrics(inputs["attention_mask"].sum()).sum().item()
            self._total_train_tokens += int(tokens)
        self._metrics[self._mode]["num_tokens"] = [self._total_train_tokens]
        chosen, rejected = self.beta * pairs.chosen_logratios, self.beta * pairs.rejected_logratios
        self._append("rewards/chosen", chosen)
        self._append("rewards/rejected", rejected)
        self._append("rewards/accuracies", (chosen > rejected).float())
        self._append("rewards/margins", chosen - rejected)
        self._append("logps/chosen", pairs.chosen_logprobs)
        self._append("logps/rejected", pairs.rejected_logprobs)


BetaSchedule = Literal["constant", "linear", "cosine"]


def beta_at(step: int, steps: int, initial: float, final: float | None, schedule: BetaSchedule) -> float:
    """Return beta of optimizer step ``step`` (0 for the first) of ``steps``: ``initial`` to ``final``.

    It depends on the step only, so a resumed run continues the schedule. Steps after the last keep the final value,
    which scores the result.
    """
    if schedule == "constant" or final is None:
        return initial
    progress = min(step, steps - 1) / max(1, steps - 1)
    if schedule == "cosine":
        progress = (1 - math.cos(math.pi * progress)) / 2
    return initial + (final - initial) * progress


class PreparedKTO(ScoredByReference, KTOTrainer):  # type: ignore[misc]
    """Rows: ``prompt_ids``, ``completion_ids``, ``label``, ``ref_logps``, and ``KL_completion_ids``, ``ref_KL_logps``
    if the loss has a reference point. ``groups`` are the micro-batches of row indices.
    """

    groups: Sequence[Sequence[int]]

    def row_order(self) -> Any:
        """Return the sampler of the fixed micro-batches."""
        return GroupOrder(self.groups, self.args.seed)


def held_out(trainer: PreparedKTO, encoded: Encoded) -> dict[str, float]:
    """Return scores of a KTO trainer's model on held-out answers, with one reference point for all of them.

    ``loss`` is KTO's (eq. 7 and 8) or APO-zero's. ``reference_point`` is the mean drift on mismatched answers in nats,
    at least 0; ``accuracy`` the share of answers on the right side of it; ``margin`` beta times the difference of the
    mean drifts of desirable and undesirable answers. A kind of answer that does not occur counts as 0 in ``margin``.
    """
    drifts = _drifts(trainer, encoded, "completion_ids", "ref_logps")
    reference_point = 0.0
    if trainer.calculate_KL:
        reference_point = max(0.0, float(_drifts(trainer, encoded, "KL_completion_ids", "ref_KL_logps").mean()))
    is_desirable = torch.tensor([bool(row["label"]) for row in encoded.rows])
    # Each answer's distance from the reference point, positive on its correct side.
    margins = torch.where(is_desirable, drifts - reference_point, reference_point - drifts)
    weights = torch.where(is_desirable, trainer.desirable_weight, trainer.undesirable_weight)
    losses = weights * (1 - torch.sigmoid(trainer.beta * margins))
    means = [float(drifts[side].mean()) if bool(side.any()) else 0.0 for side in (is_desirable, ~is_desirable)]
    return {
        "loss": float(losses.mean()),
        "accuracy": float((margins > 0).double().mean()),
        "margin": trainer.beta * (means[0] - means[1]),
        "chosen_reward": trainer.beta * means[0],
        "rejected_reward": trainer.beta * means[1],
        "reference_point": reference_point,
    }


def _drifts(trainer: PreparedKTO, encoded: Encoded, answers: str, reference: str) -> torch.Tensor:
    """Return each answer's log-probability by the model minus by the reference, in nats: (N,) float64."""
    drifts = torch.zeros(len(encoded.rows), dtype=torch.float64)
    mask = answers.replace("_ids", "_mask")
    rows: list[dict[str, Any]] = [
        {**row, "completion_ids": row[answers], "completion_mask": row.get(mask)} for row in encoded.rows
    ]
    lengths = [len(row["prompt_ids"]) + len(row["completion_ids"]) for row in rows]
    # Held-out losses use the beta of the current step, as the next training step would.
    trainer.beta = trainer._beta_at(trainer.state.global_step)
    with scoring(trainer):
        for batch in by_length(lengths, SCORING_TOKENS):
            names = ("prompt_ids", "completion_ids", "completion_mask", "label")
            picked = [{name: rows[row][name] for name in names} for row in batch]
            inputs = send_to_device(trainer.data_collator(picked), trainer.args.device)
            labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
            outputs = trainer.model(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                labels=labels,
                use_cache=False,
                fused_lm_head=True,
            )
            # Methods with virtual tokens return more positions than the row has.
            sums = outputs.log_probs[:, -(labels.shape[1] - 1) :].double().sum(dim=1)
            reference_sums = torch.tensor([encoded.rows[row][reference] for row in batch], dtype=torch.float64)
            drifts[torch.tensor(batch)] = sums.cpu() - reference_sums
    return drifts
