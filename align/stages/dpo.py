"""Stage ``dpo``: direct preference optimization (arXiv 2305.18290) and its variants, with trl's DPOTrainer."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from trl.trainer.dpo_config import DPOConfig as Arguments

from align.config.stages.preference import DpoConfig
from align.models.compute.processes import use_threads
from align.pipeline.context import StageContext
from align.stages.preference import PreparedPolicy, Reference, beta_of, prepare_policy
from align.training import held_out
from align.training.arguments import total_steps, training_arguments
from align.training.fit import fit
from align.training.preference_trainers import PairCollator, PreparedDPO
from align.training.reference import Answer
from align.training.rows import counts, encode_pairs
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
    prepared = prepare_policy(context, encode_pairs, PairCollator)
    prepared.lint()
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
            loss_type=list(config.terms),
            loss_weights=list(config.terms.values()),
            label_smoothing=config.label_smoothing,
            ld_alpha=config.ld_alpha,
            f_divergence_type=config.f_divergence_type,
            f_alpha_divergence_coef=0.5 if config.f_alpha_divergence_coef is None else config.f_alpha_divergence_coef,
            discopop_tau=config.discopop_tau,
            use_weighting=config.use_weighting,
            # They are computed above and cached; without this, trl would hold a second model in memory.
            precompute_ref_log_probs=True,
        ),
        data_collator=prepared.collator,
        train_dataset=Dataset.from_list(prepared.train.rows),
        processing_class=prepared.tokenizer,
    )
    trainer.row_lengths = prepared.train.lengths
    start = config.reference_free or config.reference is not None
    metrics = fit(trainer, context, lambda split: held_out.preferences(trainer, prepared.splits[split]), before=start)
    save(context, trainer, prepared.tokenizer)
    facts |= thought_facts(prepared.tokenizer, prepared.train)
    return {**metrics, **facts, "pairs": rows, **counts(prepared.splits, "pairs")}


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
