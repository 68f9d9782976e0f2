"""Supervised fine-tuning: the model learns to give the dataset's answers (trl's SFTTrainer, loss on answers only).

Cross-entropy is trl's fused head: only tokens with a label go through the vocabulary, in chunks.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from align.config.base import stage_input
from align.config.stages.lint import LintSettings
from align.config.stages.training import TrainingFields, checked_options
from align.pipeline.context import StageContext
from align.store.artifacts import GENERATORS, Kind


class SftConfig(TrainingFields):
    """Takes ``completion`` of instructions, or ``chosen`` of preferences, as the answer to learn.

    Rows of like length share a batch. With ``packing``, ``batch_size`` counts packs of ``max_length`` tokens.
    """

    model: stage_input(*GENERATORS)  # type: ignore[valid-type]
    """Stage whose checkpoint is trained further; it needs a chat template."""
    data: stage_input(Kind.INSTRUCTIONS, Kind.PREFERENCES)  # type: ignore[valid-type]
    """Stage with the answers: its ``train`` split is learned, its ``test`` split only scored."""
    supervise: Literal["last", "all"] = "last"
    """Which answers of a conversation are learned: the last one, or every one of the assistant's. Where each stands is
    found by rendering the conversation up to it, with any chat template."""
    packing: bool = False
    """Fill rows of ``max_length`` tokens with whole short ones, none of which sees another (best fit decreasing)."""
    padding_free: bool = False
    """Put a micro-batch's rows behind one another instead of padding them; ``packing`` does so in any case."""
    neftune: float | None = Field(None, gt=0, le=100)
    """Noise on the embeddings while training, NEFTune's alpha (2310.05914); 5 is usual."""
    lint: LintSettings = LintSettings()
    """What of the look at the rows' tokens, before the first step, is waived (docs/lint.md)."""

    identified: ClassVar[frozenset[str]] = frozenset({"lint"})

    @field_validator("trainer")
    @classmethod
    def _trainer_exists(cls, options: dict[str, Any]) -> dict[str, Any]:
        for name, instead in {
            "neftune_noise_alpha": "set 'neftune' beside 'trainer'",
            "assistant_only_loss": "set 'supervise: all' beside 'trainer'",
            "completion_only_loss": "answers alone are ever learned; a 'pretrain' stage learns whole texts",
            "eval_packing": "held-out rows are scored one by one",
            "packing_strategy": "packs are filled with whole rows, best fit decreasing",
        }.items():
            if name in options:
                raise ValueError(f"'{name}' is not set here: {instead}.")
        return checked_options("sft", options, {"packing", "padding_free"})

    @model_validator(mode="after")
    def _one_line_needs_modules(self) -> SftConfig:
        if self.tuning.input_only and (self.packing or self.padding_free):
            raise ValueError(
                f"{'packing' if self.packing else 'padding_free'} puts rows into one line, and tuning "
                f"{self.tuning.method} acts on the beginning of each; turn one of them off."
            )
        return self


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
    from align.models.tuning.apply import apply_tuning, load_for_tuning
    from align.training import held_out
    from align.training.arguments import training_arguments
    from align.training.fit import fit
    from align.training.input_checks import check_encoded, check_ends, check_model
    from align.training.packing import Flat, check_separate, fill, form_of, packed, run_flat
    from align.training.rows import counts, encode_answers, encode_supervised, read_splits
    from align.training.saving import save
    from align.training.sft_trainer import check_kernels, lint_rows, noisy
    from align.training.trainers import PreparedSFT, label_positions_only

    config: SftConfig = context.config
    check_kernels(context.name, config.trainer, context.runtime)
    encode = encode_answers if config.supervise == "all" else encode_supervised
    source = context.artifact("model").model
    tokenizer, model = load_tokenizer(source, config.tuning), load_for_tuning(source, config.tuning)
    check_model(context.name, model, tokenizer)
    stored, splits = read_splits(context), {}
    for split, rows in stored.items():
        splits[split] = encode(tokenizer, rows, config.max_length)
        check_encoded(context.name, splits[split], len(rows), split, config.max_length, context.warn)
    train = splits["train"]
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
    flat = config.packing or config.padding_free
    rows = packed(train, config.max_length) if config.packing else train.rows
    form = form_of(model) if flat else None
    if form is not None:
        run_flat(model, form)
    trainer = PreparedSFT(
        model=model,
        args=training_arguments(Arguments, context, len(rows)),
        data_collator=None if form is None else Flat(form),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.row_lengths = [len(row["input_ids"]) for row in rows]
    looked_at = {name: Split(stored[name], splits[name]) for name in splits}
    lint_stage(context, "sft", lint_rows(trainer, train), looked_at, config.max_length, config.supervise)
    facts: dict[str, Any] = {"rows": len(train.rows), **counts(splits, "rows")}
    if flat:
        facts |= {"pack_difference": check_separate(context.name, trainer, train)}
    if config.packing:
        facts |= {"packs": len(rows), "pack_fill": fill(rows, config.max_length)}
    with noisy(trainer.model, config.neftune):
        metrics = fit(trainer, context, lambda split: held_out.supervised(trainer, splits[split]))
    save(context, trainer, tokenizer)
    return {**metrics, **facts}
