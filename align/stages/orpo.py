"""Odds-ratio preference optimisation (arXiv 2403.07691): supervised fine-tuning and preference learning in one loss.

Experimental in trl, which may move or drop its ORPOTrainer.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator, model_validator

from align.artifacts import Kind
from align.stage import StageContext, stage_input
from align.stages.preference import PreferenceFields, check_experimental, checked_experimental_options


class OrpoConfig(PreferenceFields):
    """No reference and no SFT stage before it is needed; ``batch_size`` counts pairs. Experimental in trl."""

    data: stage_input(Kind.PREFERENCES)  # type: ignore[valid-type]
    """Stage with the pairs; its chosen answers should be worth imitating."""
    beta: float = Field(0.1, gt=0)
    """Weight of the odds ratio beside the chosen answers' loss; the paper's lambda."""
    prompt_loss: bool = True
    """Whether the chosen answers' loss takes in their prompts, as the paper's code and trl do; off, answers alone."""

    @model_validator(mode="after")
    def _trl_has_it(self) -> OrpoConfig:
        check_experimental("orpo")
        return self

    @field_validator("trainer")
    @classmethod
    def _trainer_exists(cls, options: dict[str, Any]) -> dict[str, Any]:
        return checked_experimental_options("orpo", options, {"beta"})


def run(context: StageContext) -> dict[str, Any]:
    """Train, save ``model/`` and return steps, tokens, speed, and held-out loss, accuracy and margin.

    Raises ``UserError`` for a model without chat template, data without usable pairs, or a trl without ORPOTrainer.
    """
    from align.models.threads import use_threads

    use_threads(context.runtime)
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    from align.stages.preference import make_ready, save
    from align.training.arguments import training_arguments
    from align.training.cpo_trainer import held_out
    from align.training.fit import fit
    from align.training.orpo_trainer import Arguments, PreparedORPO
    from align.training.rows import encode_pairs

    config: OrpoConfig = context.config
    ready = make_ready(context, encode_pairs, DataCollatorForPreference)
    ready.lint(context, "dpo")
    trainer = PreparedORPO(
        prompt_too=config.prompt_loss,
        model=ready.wrapped(context),
        args=training_arguments(
            Arguments,
            context,
            len(ready.train.rows),
            beta=config.beta,
            max_length=config.max_length,  # read by what tokenizes, which has nothing to do
            remove_unused_columns=False,
        ),
        data_collator=ready.collator,
        train_dataset=ready.train.rows,
        processing_class=ready.tokenizer,
    )
    trainer.row_lengths = ready.train.lengths
    metrics = fit(trainer, context, lambda: held_out(trainer, ready.test))
    save(context, trainer, ready.tokenizer)
    return {**metrics, "pairs": len(ready.train.rows), "test_pairs": len(ready.test.rows)}
