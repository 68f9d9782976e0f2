"""Kahneman-Tversky optimization (arXiv 2402.01306): learning from single answers marked as wanted or not (trl)."""

from __future__ import annotations

from typing import Any

from align.config.stages.kto import KtoConfig
from align.pipeline.context import StageContext
from align.stages.preference import beta_of


def run(context: StageContext) -> dict[str, Any]:
    """Train, save ``model/`` and return steps, tokens, speed, and held-out loss, accuracy, margin and reference point.

    Raises ``UserError`` for a model without chat template, data without usable answers, or a reference of another
    vocabulary.
    """
    from align.models.threads import use_threads

    use_threads(context.runtime)
    from datasets import Dataset
    from trl.trainer.kto_config import KTOConfig as Arguments
    from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

    from align.stages.preference import Reference, make_ready
    from align.training.arguments import total_steps, training_arguments
    from align.training.fit import fit
    from align.training.kto_trainer import PreparedKTO, held_out
    from align.training.rows import counts
    from align.training.saving import save
    from align.training.unpaired import encode_unpaired, fixed_groups, unpair

    config: KtoConfig = context.config
    ready = make_ready(context, encode_unpaired, DataCollatorForUnpairedPreference, unpair)
    ready.lint(context, "kto")
    wanted = _check_labels(context, [bool(row["label"]) for row in ready.train.rows])
    seed, point = context.seed % 2**32, config.loss == "kto"
    reference, groups = Reference(context, ready), {}
    for split, encoded in ready.splits.items():
        groups[split] = fixed_groups(encoded.lengths, config.micro_batch, config.batch_size, seed)
        _add_reference(context, reference, split, encoded.rows, groups[split] if point else None)
    trainer = PreparedKTO(
        model=ready.wrapped(context),
        beta_at=beta_of(config, total_steps(context.name, config, len(ready.train.rows))),
        args=training_arguments(
            Arguments,
            context,
            len(ready.train.rows),
            beta=config.beta,
            loss_type=config.loss,
            desirable_weight=config.desirable_weight,
            undesirable_weight=config.undesirable_weight,
            precompute_ref_log_probs=True,
            train_sampling_strategy="sequential",  # trl asks for it; the order is ``groups``'s
        ),
        data_collator=ready.collator,
        train_dataset=Dataset.from_list(ready.train.rows),
        processing_class=ready.tokenizer,
    )
    trainer.groups = groups["train"]
    metrics = fit(
        trainer, context, lambda split: held_out(trainer, ready.splits[split]), before=config.reference is not None
    )  # the policy has not drifted from itself
    save(context, trainer, ready.tokenizer)
    facts = {"answers": len(ready.train.rows), "wanted": wanted, **counts(ready.splits, "answers")}
    return {**metrics, **reference.facts(), **facts}


def _check_labels(context: StageContext, labels: list[bool]) -> int:
    """The number of wanted answers; a warning where the weights leave one kind outweighed (the paper's eq. 8)."""
    config: KtoConfig = context.config
    wanted = sum(labels)
    others = len(labels) - wanted
    if wanted == 0 or others == 0:
        context.warn(
            f"{context.name}: all {len(labels)} answers are {'un' * (wanted == 0)}wanted; without the other kind the "
            "policy only learns to move away from the reference."
        )
        return wanted
    ratio = config.desirable_weight * wanted / (config.undesirable_weight * others)
    if not 0.99 <= ratio <= 1.34:
        context.warn(
            f"{context.name}: {wanted} answers are wanted and {others} not, and with these weights wanted ones count "
            f"{ratio:.2f} times as much as the others in all, where 1 to 1.33 is advised (2402.01306, eq. 8). "
            f"Set desirable_weight to {config.undesirable_weight * others / wanted:.3g}."
        )
    return wanted


def _add_reference(
    context: StageContext, reference: Any, split: str, rows: list[dict[str, Any]], groups: list[list[int]] | None
) -> None:
    """Give each row ``ref_logps``, and with ``groups`` a mismatched answer and its ``ref_KL_logps`` (nats)."""
    from align.training.reference import Answer
    from align.training.unpaired import add_mismatched

    for row, total in zip(
        rows,
        reference.sums(split, [Answer(row["prompt_ids"], row["completion_ids"]) for row in rows]).total,
        strict=True,
    ):
        row["ref_logps"] = total
    if groups is None:
        return
    own = add_mismatched(rows, groups, context.config.max_length)
    if own:
        context.warn(
            f"{context.name}: {own} of {len(rows)} {split} answers stand for another prompt's in the reference point "
            "and have the same prompt; a larger micro_batch_size avoids it."
        )
    answers = [Answer(row["prompt_ids"], row["KL_completion_ids"]) for row in rows]
    for row, total in zip(rows, reference.sums(f"{split}_mismatched", answers).total, strict=True):
        row["ref_KL_logps"] = total
