"""Stage ``reward``: a model that scores answers, trained on pairs, on scores, or on labeled steps."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from trl.trainer.reward_config import RewardConfig as Arguments

from align.config.runtime.launch import rank
from align.config.stages.reward import RewardConfig
from align.lint.trainer import Split, lint_stage
from align.models.compute.processes import use_threads
from align.models.tuning.apply import apply_tuning
from align.pipeline.context import StageContext
from align.training.arguments import training_arguments
from align.training.fit import fit
from align.training.input_checks import load_model
from align.training.reward_objectives import prepare
from align.training.rows import counts
from align.training.save import save_reward
from align.training.trainers import score_in_float32


def run(context: StageContext) -> dict[str, Any]:
    """Train, save ``model/``, check that the saved model gives the same scores, and return the metrics.

    Held-out accuracy is measured on the labels and, if the data has the true scores, on these.
    Raises ``UserError`` for a model without chat template or data without usable rows.
    """
    use_threads(context.runtime)
    config: RewardConfig = context.config
    tokenizer, model = load_model(context, reward=True)
    prepared = prepare(context, tokenizer)
    train = prepared.splits["train"]
    test = prepared.splits["test"]
    # Scores are compared and subtracted, which bfloat16's three digits would blur.
    score_in_float32(model)
    sequences = [prepared.sequences(row)[0] for row in train.rows]
    model = apply_tuning(model, config.tuning, context.seed, tokenizer=tokenizer, rows=sequences)
    trainer = prepared.trainer(
        model=model,
        args=training_arguments(
            Arguments, context, len(train.rows), center_rewards_coefficient=prepared.center_rewards
        ),
        train_dataset=Dataset.from_list(train.rows),
        processing_class=tokenizer,
    )
    trainer.row_lengths = train.lengths
    trainer.head_learning_rate = config.head_rate
    linted = {name: Split(prepared.stored_rows[name], prepared.splits[name]) for name in prepared.splits}
    lint_stage(context, trainer, linted, kind=prepared.lint)
    metrics = fit(trainer, context, lambda split: prepared.held_out(trainer, split))
    # Two rows are scored before saving and after reading back: a lost head shows as a difference.
    probe = [prepared.sequences(test.rows[0])[0], prepared.sequences(test.rows[-1])[-1]]
    gap = save_reward(trainer, tokenizer, context.output / "model", probe)
    if rank() == 0:
        # Only the first process writes the files next to the weights.
        prepared.save(context.output / "model")
    total = len(prepared.stored_rows["train"])
    skipped = [f"{number} of {total} train rows {reason}" for reason, number in train.counts.items()]
    facts = {**counts(prepared.splits, "rows"), **prepared.facts(), **({"skipped_rows": skipped} if skipped else {})}
    return {**metrics, **facts, "reload_difference": gap}
