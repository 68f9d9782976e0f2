"""Direct preference optimisation (arXiv 2305.18290): the policy learns from pairs without a reward model (trl)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from align.artifacts import GENERATORS, Kind
from align.lint.settings import LintSettings
from align.stage import StageContext, stage_input
from align.training.config import TrainingFields, checked_options


class DpoConfig(TrainingFields):
    """The reference is the policy as it comes in; ``batch_size`` counts pairs."""

    policy: stage_input(*GENERATORS)  # type: ignore[valid-type]
    """Stage whose checkpoint is trained, and is the reference too; usually the SFT stage."""
    data: stage_input(Kind.PREFERENCES)  # type: ignore[valid-type]
    """Stage with the pairs; best sampled from ``policy`` itself."""
    beta: float = Field(0.1, gt=0)
    """How much a nat of drift from the reference costs; smaller drifts further. For ``ipo`` it is that paper's tau."""
    loss: Literal["sigmoid", "ipo", "hinge", "robust", "sigmoid_norm", "apo_zero", "apo_down"] = "sigmoid"
    """``sigmoid`` is DPO; ``ipo`` (2310.12036) aims at a fixed margin; ``robust`` corrects for known label noise."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """For ``robust``: the share of pairs believed to be mislabelled."""
    sft_weight: float = Field(0.0, ge=0)
    """Weight of the chosen answers' loss per token beside it, which keeps them likely (2404.19733); 0 leaves it out."""
    lint: LintSettings = LintSettings()
    """What of the look at the rows' tokens, before the first step, is waived (docs/lint.md)."""

    identified: ClassVar[frozenset[str]] = frozenset({"lint"})

    @field_validator("trainer")
    @classmethod
    def _trainer_exists(cls, options: dict[str, Any]) -> dict[str, Any]:
        if "loss_type" in options:
            raise ValueError("'loss_type' is not set here: set 'loss' beside 'trainer'.")
        if "loss_weights" in options:
            raise ValueError("'loss_weights' is not set here: set 'sft_weight' beside 'trainer'.")
        for name in ("precompute_ref_log_probs", "precompute_ref_batch_size", "sync_ref_model"):
            if name in options:
                raise ValueError(f"'{name}' is not set here: the reference is always scored once, before training.")
        return checked_options("dpo", options, {"beta", "label_smoothing", "padding_free"})


def run(context: StageContext) -> dict[str, Any]:
    """Train, save ``model/`` and return steps, tokens, speed, and held-out loss, accuracy and margin.

    Nothing is scored before training: every margin is 0 then, by construction.

    Raises ``UserError`` for a model without chat template or data without usable pairs.
    """
    from align.models.threads import use_threads

    use_threads(context.runtime)
    from datasets import Dataset
    from trl.trainer.dpo_config import DPOConfig as Arguments

    from align.lint.trainer import Split, lint_stage
    from align.models.loading import load_policy, load_tokenizer
    from align.models.tuning.apply import apply_tuning, save_tuned
    from align.training import held_out
    from align.training.arguments import training_arguments
    from align.training.dpo_trainer import PreparedDPO
    from align.training.fit import fit
    from align.training.handover import check_encoded, check_model
    from align.training.rows import encode_pairs, read_split
    from align.training.trainers import label_positions_only

    config: DpoConfig = context.config
    source, data = context.artifact("policy").model, context.artifact("data")
    tokenizer, model = load_tokenizer(source), load_policy(source)
    check_model(context.name, model, tokenizer)
    given, splits = {}, {}
    for split, most in (("train", config.max_rows), ("test", config.eval_rows)):
        rows = given[split] = read_split(data.split(split), most, context.name)
        splits[split] = encode_pairs(tokenizer, rows, config.max_length)
        check_encoded(context.name, splits[split], len(rows), split, config.max_length, context.warn)
    train, test = splits["train"], splits["test"]
    model = apply_tuning(model, config.tuning, context.seed)
    label_positions_only()
    looked_at = {name: Split(given[name], splits[name]) for name in splits}
    trainer = PreparedDPO(
        cache=context.checkpoints,
        on_progress=lambda done, total: context.progress(done, total, unit="reference pairs"),
        before_reference=lambda made: lint_stage(context, "dpo", made, looked_at, config.max_length),
        model=model,
        args=training_arguments(
            Arguments,
            context,
            len(train.rows),
            beta=config.beta,
            loss_type=[config.loss, *(["sft"] if config.sft_weight else [])],
            loss_weights=[1.0, config.sft_weight] if config.sft_weight else None,
            label_smoothing=config.label_smoothing,
            precompute_ref_log_probs=True,
        ),
        train_dataset=Dataset.from_list(train.rows),
        eval_dataset=Dataset.from_list(test.rows),
        processing_class=tokenizer,
    )
    trainer.row_lengths = train.lengths
    scored: Any = trainer.eval_dataset  # with the reference log-probabilities
    test.rows = list(scored)
    metrics = fit(trainer, context, lambda: held_out.preferences(trainer, test), before=False)
    save_tuned(
        trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False), tokenizer, context.output / "model"
    )
    return {**metrics, "pairs": len(train.rows), "test_pairs": len(test.rows)}
