"""Stage ``kto``: Kahneman-Tversky optimization (arXiv 2402.01306) on desirable and undesirable answers, with trl."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from trl.trainer.kto_config import KTOConfig as Arguments

from align.config.stages.preference import KtoConfig
from align.models.compute.processes import use_threads
from align.pipeline.context import StageContext
from align.stages.preference import Reference, beta_of, prepare_policy
from align.training.arguments import total_steps, training_arguments
from align.training.fit import fit
from align.training.preference_trainers import PreparedKTO, UnpairedCollator, held_out
from align.training.reference import Answer
from align.training.rows import counts
from align.training.save import save
from align.training.thoughts import thought_facts
from align.training.unpaired import add_mismatched, encode_unpaired, fixed_groups, unpair


def run(context: StageContext) -> dict[str, Any]:
    """Train, save ``model/`` and return steps, tokens, speed, and held-out loss, accuracy, margin and reference point.

    Raises ``UserError`` for a model without chat template, data without usable answers, or a reference of another
    vocabulary.
    """
    use_threads(context.runtime)
    config: KtoConfig = context.config
    prepared = prepare_policy(context, encode_unpaired, UnpairedCollator, unpair)
    prepared.lint()
    desirable = _check_labels(context, [bool(row["label"]) for row in prepared.train.rows])
    seed = context.seed % 2**32
    point = config.loss == "kto"
    reference = Reference(context, prepared)
    groups = {}
    for split, encoded in prepared.splits.items():
        # The reference point pairs a prompt with another row's answer, so batches are fixed before training.
        groups[split] = fixed_groups(encoded.lengths, config.micro_batch, config.batch_size, seed)
        _add_reference(context, reference, split, encoded.rows, groups[split] if point else None)
    trainer = PreparedKTO(
        model=prepared.tuned_model,
        beta_at=beta_of(config, total_steps(context.name, config, len(prepared.train.rows))),
        args=training_arguments(
            Arguments,
            context,
            len(prepared.train.rows),
            beta=config.beta,
            loss_type=config.loss,
            desirable_weight=config.desirable_weight,
            undesirable_weight=config.undesirable_weight,
            precompute_ref_log_probs=True,
            train_sampling_strategy="sequential",  # trl requires it; ``groups`` has the order
        ),
        data_collator=prepared.collator,
        train_dataset=Dataset.from_list(prepared.train.rows),
        processing_class=prepared.tokenizer,
    )
    trainer.groups = groups["train"]
    metrics = fit(
        trainer, context, lambda split: held_out(trainer, prepared.splits[split]), before=config.reference is not None
    )
    save(context, trainer, prepared.tokenizer)
    facts = {"answers": len(prepared.train.rows), "desirable": desirable, **counts(prepared.splits, "answers")}
    facts |= thought_facts(prepared.tokenizer, prepared.train)
    return {**metrics, **reference.facts(), **facts}


def _check_labels(context: StageContext, labels: list[bool]) -> int:
    """Return the number of desirable answers; warn if the weights leave one kind outweighed (the paper's eq. 8)."""
    config: KtoConfig = context.config
    desirable = sum(labels)
    undesirable = len(labels) - desirable
    if desirable == 0 or undesirable == 0:
        context.warn(
            f"{context.name}: all {len(labels)} answers are {'un' if desirable == 0 else ''}desirable; without the "
            "other kind the policy only learns to move away from the reference."
        )
        return desirable
    # The paper advises equal total weight of both kinds, up to a third more for desirable answers.
    ratio = config.desirable_weight * desirable / (config.undesirable_weight * undesirable)
    if not 0.99 <= ratio <= 1.34:
        context.warn(
            f"{context.name}: {desirable} answers are desirable and {undesirable} not, and with these weights they "
            f"count {ratio:.2f} times as much as the others in all, where 1 to 1.33 is advised (2402.01306, eq. 8). "
            f"Set desirable_weight to {config.undesirable_weight * undesirable / desirable:.3g}."
        )
    return desirable


def _add_reference(
    context: StageContext, reference: Reference, split: str, rows: list[dict[str, Any]], groups: list[list[int]] | None
) -> None:
    """Add ``ref_logps`` to each row, and with ``groups`` a mismatched answer with its ``ref_KL_logps`` (nats)."""
    answers = [Answer(row["prompt_ids"], row["completion_ids"], mask=row.get("completion_mask")) for row in rows]
    for row, total in zip(rows, reference.sums(split, answers).total, strict=True):
        row["ref_logps"] = total
    if groups is None:
        return
    # The reference point needs answers to other prompts, scored by the reference as well.
    same_prompt = add_mismatched(rows, groups, context.config.max_length)
    if same_prompt:
        context.warn(
            f"{context.name}: {same_prompt} of {len(rows)} {split} answers stand for another prompt's in the reference "
            "point and have the same prompt; a larger micro_batch_size avoids it."
        )
    answers = [Answer(row["prompt_ids"], row["KL_completion_ids"], mask=row.get("KL_completion_mask")) for row in rows]
    for row, total in zip(rows, reference.sums(f"{split}_mismatched", answers).total, strict=True):
        row["ref_KL_logps"] = total
