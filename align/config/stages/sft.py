"""Settings of the stage ``sft``: supervised fine-tuning on responses. Torch-free."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from align.config.base import stage_input
from align.config.stages.lint import LintSettings
from align.config.stages.training import TrainingFields
from align.config.trl_options import OWNED
from align.store.artifacts import GENERATORS, Kind


class SftConfig(TrainingFields):
    """Trains on ``completion`` of instructions, or ``chosen`` of preferences.

    Rows of similar length share a batch. With ``packing``, ``batch_size`` counts packs of ``max_length`` tokens.
    """

    model: stage_input(*GENERATORS)  # type: ignore[valid-type]
    """Stage whose checkpoint is trained; it needs a chat template."""
    data: stage_input(Kind.INSTRUCTIONS, Kind.PREFERENCES)  # type: ignore[valid-type]
    """Stage with the answers: the ``train`` split is trained on, the ``test`` split only evaluated."""
    supervise: Literal["last", "all"] = "last"
    """Turns to train on. ``last``: the answer of a row, and all turns of an episode. ``all``: also every assistant turn
    of the prompt. Their positions are found by rendering the conversation up to each turn, with any chat template."""
    packing: bool = False
    """Pack short rows into rows of ``max_length`` tokens, without attention between them (best fit decreasing)."""
    padding_free: bool = False
    """Concatenate a micro-batch's rows instead of padding them; ``packing`` always does."""
    neftune: float | None = Field(None, gt=0, le=100)
    """Noise on the embeddings in training, NEFTune's alpha (2310.05914); 5 is usual."""
    lint: LintSettings = LintSettings()
    """Lint of the rows' tokens before the first step: findings to accept (docs/lint.md)."""

    identified: ClassVar[frozenset[str]] = frozenset({"lint"})
    trainer_class: ClassVar[str] = "trl.trainer.sft_config:SFTConfig"
    owned_options: ClassVar[dict[str, str]] = OWNED | {
        "neftune_noise_alpha": "set 'neftune' beside 'trainer'",
        "assistant_only_loss": "set 'supervise: all' beside 'trainer'",
        "completion_only_loss": "answers alone are ever learned; a 'pretrain' stage learns whole texts",
        "eval_packing": "held-out rows are scored one by one",
        "packing_strategy": "packs are filled with whole rows, best fit decreasing",
    }

    @model_validator(mode="after")
    def _one_line_needs_modules(self) -> SftConfig:
        if self.tuning.input_only and (self.packing or self.padding_free):
            raise ValueError(
                f"{'packing' if self.packing else 'padding_free'} concatenates rows, and tuning "
                f"{self.tuning.method} changes the beginning of each; turn one of them off."
            )
        return self
