"""Stages ``orpo``, ``cpo`` and ``simpo``: preference optimization without a reference, in one loss with SFT.

Odds ratios (arXiv 2403.07691), contrastive preference optimization (arXiv 2401.08417) and SimPO (arXiv 2405.14734),
which is ``cpo`` with ``loss: simpo`` and the paper's scale of beta. Their trainers are experimental in trl, which may
move or drop them.
"""

from __future__ import annotations

from typing import Any

from align.config.stages.preference import CpoConfig, OrpoConfig
from align.models.compute.processes import use_threads
from align.pipeline.context import StageContext
from align.stages.preference import prepare_policy
from align.training.arguments import training_arguments
from align.training.experimental import CPO, ORPO, PairForward, held_out, load_trainer
from align.training.fit import fit
from align.training.preference_trainers import PairCollator
from align.training.rows import counts, encode_pairs
from align.training.save import save
from align.training.thoughts import thought_facts


def cpo(context: StageContext) -> dict[str, Any]:
    """Train, save ``model/`` and return steps, tokens, speed, and held-out loss, accuracy and margin.

    Raises ``UserError`` for a model without chat template, data without usable pairs, or a trl without the trainer.
    """
    config: CpoConfig = context.config
    return _train(
        context,
        CPO,
        "cpo",
        {},
        beta=config.beta,
        loss_type=config.loss,
        label_smoothing=config.label_smoothing,
        cpo_alpha=config.sft_weight,
        simpo_gamma=0.5 if config.simpo_gamma is None else config.simpo_gamma,
        alpha=config.alpha,
    )


def orpo(context: StageContext) -> dict[str, Any]:
    """Train with odds ratios; otherwise as ``cpo``."""
    config: OrpoConfig = context.config
    return _train(context, ORPO, "orpo", {"prompt_too": config.prompt_loss}, beta=config.beta)


def _train(
    context: StageContext, mixin: type[PairForward], method: str, trainer_options: dict[str, Any], **options: Any
) -> dict[str, Any]:
    """Train with trl's trainer of ``method``; ``options`` are the options of its loss."""
    use_threads(context.runtime)
    trainer_class, arguments = load_trainer(mixin, method)
    prepared = prepare_policy(context, encode_pairs, PairCollator)
    prepared.lint()
    trainer = trainer_class(
        model=prepared.tuned_model,
        args=training_arguments(
            arguments,
            context,
            len(prepared.train.rows),
            **options,
            max_length=context.config.max_length,  # trl reads it when it tokenizes, which is done already
            remove_unused_columns=False,
        ),
        data_collator=prepared.collator,
        train_dataset=prepared.train.rows,
        processing_class=prepared.tokenizer,
        **trainer_options,
    )
    trainer.row_lengths = prepared.train.lengths
    metrics = fit(trainer, context, lambda split: held_out(trainer, prepared.splits[split]))
    save(context, trainer, prepared.tokenizer)
    facts = {**counts(prepared.splits, "pairs"), **thought_facts(prepared.tokenizer, prepared.train)}
    return {**metrics, "pairs": len(prepared.train.rows), **facts}
