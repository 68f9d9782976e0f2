"""Reward model: one score per answer, learnt from pairs (Bradley-Terry loss, trl's RewardTrainer)."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field, field_validator

from align.artifacts import GENERATORS, Kind
from align.lint.settings import LintSettings
from align.stage import StageContext, stage_input
from align.training.config import TrainingFields, checked_options


class RewardConfig(TrainingFields):
    """The score is read at an answer's last token; ``batch_size`` counts pairs."""

    model: stage_input(*GENERATORS)  # type: ignore[valid-type]
    """Stage whose checkpoint gets a score head in place of its vocabulary head; usually the SFT stage."""
    data: stage_input(Kind.PREFERENCES)  # type: ignore[valid-type]
    """Stage with the pairs."""
    head_learning_rate: float | None = Field(None, gt=0, le=1)
    """Peak step size of the score head; by default ``learning_rate``, and a tenth of it with adapters."""
    center_rewards: float = Field(0.01, ge=0)
    """Weight of the squared sum of a pair's scores (2312.09244, eq. 2), which keeps scores near 0; 0 turns it off."""
    lint: LintSettings = LintSettings()
    """What of the look at the rows' tokens, before the first step, is waived (docs/lint.md)."""

    identified: ClassVar[frozenset[str]] = frozenset({"lint"})

    @property
    def head_rate(self) -> float:
        """``head_learning_rate`` or its default."""
        if self.head_learning_rate is not None:
            return self.head_learning_rate
        return self.learning_rate * self.tuning.head_share

    @field_validator("trainer")
    @classmethod
    def _trainer_exists(cls, options: dict[str, Any]) -> dict[str, Any]:
        if "center_rewards_coefficient" in options:
            raise ValueError("'center_rewards_coefficient' is not set here: set 'center_rewards' beside 'trainer'.")
        return checked_options("reward", options)


def run(context: StageContext) -> dict[str, Any]:
    """Train, save ``model/``, check that it scores as the trained model did, and return the metrics.

    Held-out accuracy comes on the labels as given and, where the data knows the true scores, on those.
    Raises ``UserError`` for a model without chat template or data without usable pairs.
    """
    from align.models.threads import use_threads

    use_threads(context.runtime)
    from datasets import Dataset
    from trl.trainer.reward_config import RewardConfig as Arguments

    from align.lint.trainer import Split, lint_stage
    from align.models.loading import load_tokenizer
    from align.models.tuning.apply import apply_tuning, load_for_tuning
    from align.training import held_out
    from align.training.arguments import training_arguments
    from align.training.fit import fit
    from align.training.handover import check_encoded, check_model
    from align.training.reload import save_reward
    from align.training.rows import encode_conversations, read_split
    from align.training.trainers import PreparedReward, score_in_float32

    config: RewardConfig = context.config
    source, data = context.artifact("model").model, context.artifact("data")
    tokenizer = load_tokenizer(source, config.tuning)
    model = load_for_tuning(source, config.tuning, reward=True)
    check_model(context.name, model, tokenizer)
    given, splits = {}, {}
    for split, most in (("train", config.max_rows), ("test", config.eval_rows)):
        rows = given[split] = read_split(data.split(split), most, context.name)
        splits[split] = encode_conversations(tokenizer, rows, config.max_length)
        check_encoded(context.name, splits[split], len(rows), split, config.max_length, context.warn)
    train, test = splits["train"], splits["test"]
    score_in_float32(model)
    model = apply_tuning(
        model,
        config.tuning,
        context.seed,
        tokenizer=tokenizer,
        warn=context.warn,
        rows=[row["chosen_ids"] for row in train.rows],
    )
    trainer = PreparedReward(
        model=model,
        args=training_arguments(
            Arguments, context, len(train.rows), center_rewards_coefficient=config.center_rewards or None
        ),
        train_dataset=Dataset.from_list(train.rows),
        processing_class=tokenizer,
    )
    trainer.row_lengths, trainer.head_learning_rate = train.lengths, config.head_rate
    looked_at = {name: Split(given[name], splits[name]) for name in splits}
    lint_stage(context, "reward", trainer, looked_at, config.max_length)
    pad = tokenizer.pad_token_id
    metrics = fit(trainer, context, lambda: held_out.pairs(trainer, test, pad))
    probe = [test.rows[0]["chosen_ids"], test.rows[-1]["rejected_ids"]]
    gap = save_reward(trainer, tokenizer, context.output / "model", probe)
    facts = {"pairs": len(train.rows), "test_pairs": len(test.rows), "reload_difference": gap}
    return {**metrics, **held_out.pair_facts(test), **facts}
