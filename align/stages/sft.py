"""Supervised fine-tuning: the model learns to give the dataset's answers (trl's SFTTrainer, loss on answers only)."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import field_validator

from align.artifacts import GENERATORS, Kind
from align.lint.settings import LintSettings
from align.stage import StageContext, stage_input
from align.training.config import TrainingFields, checked_options


class SftConfig(TrainingFields):
    """Takes ``completion`` of instructions, or ``chosen`` of preferences, as the answer to learn."""

    model: stage_input(*GENERATORS)  # type: ignore[valid-type]
    """Stage whose checkpoint is trained further; it needs a chat template."""
    data: stage_input(Kind.INSTRUCTIONS, Kind.PREFERENCES)  # type: ignore[valid-type]
    """Stage with the answers: its ``train`` split is learnt, its ``test`` split only scored."""
    lint: LintSettings = LintSettings()
    """What of the look at the rows' tokens, before the first step, is waived (docs/lint.md)."""

    identified: ClassVar[frozenset[str]] = frozenset({"lint"})

    @field_validator("trainer")
    @classmethod
    def _trainer_exists(cls, options: dict[str, Any]) -> dict[str, Any]:
        return checked_options(
            "sft", options, {"packing", "padding_free", "assistant_only_loss", "completion_only_loss"}
        )


def run(context: StageContext) -> dict[str, Any]:
    """Train, save ``model/`` and return steps, tokens, speed and held-out loss before and after.

    Raises ``UserError`` for a model without chat template, data without usable rows, or rows that never teach the end
    of an answer.
    """
    from align.models.threads import use_threads

    use_threads(context.runtime)
    from datasets import Dataset
    from trl.trainer.sft_config import SFTConfig as Arguments

    from align.lint.trainer import Split, lint_stage
    from align.models.loading import load_tokenizer
    from align.models.tuning.apply import apply_tuning, load_for_tuning, save_tuned
    from align.training import held_out
    from align.training.arguments import training_arguments
    from align.training.fit import fit
    from align.training.handover import check_encoded, check_ends, check_model
    from align.training.rows import encode_supervised, read_split
    from align.training.trainers import PreparedSFT, label_positions_only

    config: SftConfig = context.config
    source, data = context.artifact("model").model, context.artifact("data")
    tokenizer, model = load_tokenizer(source, config.tuning), load_for_tuning(source, config.tuning)
    check_model(context.name, model, tokenizer)
    given, splits = {}, {}
    for split, most in (("train", config.max_rows), ("test", config.eval_rows)):
        rows = given[split] = read_split(data.split(split), most, context.name)
        splits[split] = encode_supervised(tokenizer, rows, config.max_length)
        check_encoded(context.name, splits[split], len(rows), split, config.max_length, context.warn)
    train, test = splits["train"], splits["test"]
    check_ends(context.name, train, tokenizer)
    model = apply_tuning(
        model,
        config.tuning,
        context.seed,
        tokenizer=tokenizer,
        warn=context.warn,
        rows=[row["input_ids"] for row in train.rows],
    )
    label_positions_only()
    trainer = PreparedSFT(
        model=model,
        args=training_arguments(Arguments, context, len(train.rows)),
        train_dataset=Dataset.from_list(train.rows),
        processing_class=tokenizer,
    )
    trainer.row_lengths = train.lengths
    looked_at = {name: Split(given[name], splits[name]) for name in splits}
    lint_stage(context, "sft", trainer, looked_at, config.max_length)
    metrics = fit(trainer, context, lambda: held_out.supervised(trainer, test))
    save_tuned(
        trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False), tokenizer, context.output / "model"
    )
    return {**metrics, "rows": len(train.rows), "test_rows": len(test.rows)}
