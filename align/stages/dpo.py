"""Direct preference optimization (arXiv 2305.18290) and the losses that vary it: learning from pairs without a reward
model (trl's DPOTrainer)."""

from __future__ import annotations

from typing import Any

from align.config.stages.dpo import DpoConfig
from align.pipeline.context import StageContext
from align.stages.preference import beta_of


def run(context: StageContext) -> dict[str, Any]:
    """Train, save ``model/`` and return steps, tokens, speed, and held-out loss, accuracy and margin.

    With the policy itself as reference nothing is scored before training: every margin is 0 then, by construction.

    Raises ``UserError`` for a model without chat template, data without usable pairs, or a reference of another
    vocabulary.
    """
    from align.models.threads import use_threads

    use_threads(context.runtime)
    from datasets import Dataset
    from trl.trainer.dpo_config import DPOConfig as Arguments
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    from align.stages.preference import Reference, make_ready
    from align.training import held_out
    from align.training.arguments import total_steps, training_arguments
    from align.training.dpo_trainer import PreparedDPO
    from align.training.fit import fit
    from align.training.rows import counts, encode_pairs
    from align.training.saving import save

    config: DpoConfig = context.config
    ready = make_ready(context, encode_pairs, DataCollatorForPreference)
    ready.lint(context, "dpo")
    facts = {}
    if config.reference_free:
        for encoded in ready.splits.values():
            for row in encoded.rows:
                row |= {"ref_chosen_logps": 0.0, "ref_rejected_logps": 0.0}  # type: ignore[dict-item]
    else:
        reference = Reference(context, ready)
        for split, encoded in ready.splits.items():
            add_reference(encoded.rows, config.ld_alpha, lambda answers, split=split: reference.sums(split, answers))
        facts = reference.facts()
    rows = len(ready.train.rows)
    trainer = PreparedDPO(
        model=ready.wrapped(context),
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
            precompute_ref_log_probs=True,
        ),
        data_collator=ready.collator,
        train_dataset=Dataset.from_list(ready.train.rows),
        processing_class=ready.tokenizer,
    )
    trainer.row_lengths = ready.train.lengths
    start = config.reference_free or config.reference is not None
    metrics = fit(trainer, context, lambda split: held_out.preferences(trainer, ready.splits[split]), before=start)
    save(context, trainer, ready.tokenizer)
    return {**metrics, **facts, "pairs": rows, **counts(ready.splits, "pairs")}


def add_reference(rows: list[dict[str, Any]], ld_alpha: float | None, sums: Any) -> None:
    """Give each pair ``ref_chosen_logps`` and ``ref_rejected_logps`` (nats); ``sums`` scores a list of answers."""
    from align.training.reference import Answer

    answers = []
    for row in rows:
        shared = min(len(row["chosen_ids"]), len(row["rejected_ids"]))
        answers += [Answer(row["prompt_ids"], row[side], shared) for side in ("chosen_ids", "rejected_ids")]
    found = sums(answers).weighted(ld_alpha)
    for at, row in enumerate(rows):
        row["ref_chosen_logps"], row["ref_rejected_logps"] = found[2 * at], found[2 * at + 1]
