"""Stage ``dpo``: direct preference optimization (arXiv 2305.18290) and its variants, with trl's DPOTrainer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from trl.trainer.dpo_config import DPOConfig as Arguments

from align.config.own_function import OwnFunction
from align.config.stages.preference import PROVIDED, DpoConfig
from align.methods.call import Method
from align.methods.contract import PAIRS, check
from align.methods.losses import PAIR_LOSSES, alpha_divergence, forward_kl, js_divergence
from align.models.compute.processes import use_threads
from align.pipeline.context import StageContext
from align.stages.preference import PreparedPolicy, Reference, beta_of, prepare_policy
from align.training import held_out
from align.training.arguments import total_steps, training_arguments
from align.training.fit import fit
from align.training.preference_trainers import PairCollator, PreparedDPO, WeightedLoss
from align.training.reference import Answer
from align.training.rows import Row, counts, encode_pairs, number_rows
from align.training.save import save
from align.training.thoughts import thought_facts


def run(context: StageContext) -> dict[str, Any]:
    """Train, save ``model/`` and return steps, tokens, speed, and held-out loss, accuracy and margin.

    With the policy itself as the reference, held-out rows are not scored before training: every margin is 0 then.

    Raises ``UserError`` for a model without chat template, data without usable pairs, or a reference of another
    vocabulary.
    """
    use_threads(context.runtime)
    config: DpoConfig = context.config
    losses = losses_of(config, context.name)
    prepared = prepare_policy(context, encode_pairs, PairCollator)
    prepared.lint()
    sources = _check_own_loss(config, context.name, losses[0].loss, prepared)
    facts = _score_by_reference(context, prepared)
    rows = len(prepared.train.rows)
    trainer = PreparedDPO(
        model=prepared.tuned_model,
        beta_at=beta_of(config, total_steps(context.name, config, rows)),
        args=training_arguments(
            Arguments,
            context,
            rows,
            beta=config.beta,
            ld_alpha=config.ld_alpha,
            use_weighting=config.use_weighting,
            # They are computed above and cached; without this, trl would hold a second model in memory.
            precompute_ref_log_probs=True,
        ),
        data_collator=prepared.collator,
        train_dataset=Dataset.from_list(prepared.train.rows),
        processing_class=prepared.tokenizer,
    )
    trainer.row_lengths = prepared.train.lengths
    trainer.losses = losses
    trainer.fields = {"label_smoothing": config.label_smoothing, "discopop_tau": config.discopop_tau}
    trainer.divergence = divergence_of(config)
    trainer.sources = sources
    start = config.reference_free or config.reference is not None
    metrics = fit(trainer, context, lambda split: held_out.preferences(trainer, prepared.splits[split]), before=start)
    save(context, trainer, prepared.tokenizer)
    facts |= thought_facts(prepared.tokenizer, prepared.train)
    return {**metrics, **facts, "pairs": rows, **counts(prepared.splits, "pairs")}


def losses_of(config: DpoConfig, stage: str) -> list[WeightedLoss]:
    """Return the terms of the loss, an own loss first. Raises ``UserError`` for an own loss that cannot be called."""
    if not isinstance(config.loss, OwnFunction):
        return [WeightedLoss(Method(PAIR_LOSSES[name]), weight) for name, weight in config.terms.items()]
    own = Method.own(config.loss, f"{stage}.loss", PROVIDED)
    supervised = [WeightedLoss(Method(PAIR_LOSSES["sft"]), config.sft_weight)] if config.sft_weight else []
    return [WeightedLoss(own, 1.0), *supervised]


def _check_own_loss(config: DpoConfig, stage: str, loss: Method, prepared: PreparedPolicy) -> list[Row]:
    """Check an own loss, number the rows, and return the rows by number; none for shipped losses.

    Raises ``UserError`` for an own loss that cannot be learned from.
    """
    if not isinstance(config.loss, OwnFunction):
        return []
    sources = number_rows(prepared.splits)
    check(loss, PAIRS, f"{stage}.loss", sources, beta=config.beta)
    return sources


def divergence_of(config: DpoConfig) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """Return the function of log-ratios that the config's divergence means; None for the reverse KL."""
    alpha = 0.5 if config.f_alpha_divergence_coef is None else config.f_alpha_divergence_coef
    return {
        "reverse_kl": None,
        "forward_kl": forward_kl,
        "js_divergence": js_divergence,
        "alpha_divergence": functools.partial(alpha_divergence, alpha=alpha),
    }[config.f_divergence_type]


def _score_by_reference(context: StageContext, prepared: PreparedPolicy) -> dict[str, int]:
    """Add the reference's log-probabilities to every pair; return the numbers of computed and cached values."""
    config: DpoConfig = context.config
    if config.reference_free:
        # A reference of zeros cancels out of the loss and needs no computation.
        for encoded in prepared.splits.values():
            for row in encoded.rows:
                row |= {"ref_chosen_logps": 0.0, "ref_rejected_logps": 0.0}  # type: ignore[dict-item]
        return {}
    reference = Reference(context, prepared)
    for split, encoded in prepared.splits.items():
        add_reference(encoded.rows, config.ld_alpha, lambda answers, split=split: reference.sums(split, answers))
    return reference.facts()


def add_reference(rows: list[dict[str, Any]], ld_alpha: float | None, sums: Any) -> None:
    """Add ``ref_chosen_logps`` and ``ref_rejected_logps`` (nats) to each pair; ``sums`` scores a list of answers."""
    answers = []
    for row in rows:
        # LD-DPO weighs the tokens up to the shorter answer's length apart from those beyond it.
        sides = [(row[f"{side}_ids"], row.get(f"{side}_mask")) for side in ("chosen", "rejected")]
        shared = min(len(ids) if mask is None else sum(mask) for ids, mask in sides)
        answers += [Answer(row["prompt_ids"], ids, shared, mask) for ids, mask in sides]
    # All answers are scored in one call. Both sides of a pair follow each other and share their prompt.
    logps = sums(answers).weighted(ld_alpha)
    for row, chosen, rejected in zip(rows, logps[::2], logps[1::2], strict=True):
        row["ref_chosen_logps"], row["ref_rejected_logps"] = chosen, rejected
