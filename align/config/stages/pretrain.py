"""Settings of the stage ``pretrain``: continued pre-training on plain texts. Torch-free."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, model_validator

from align.config.base import stage_input
from align.config.stages.training import TrainingFields
from align.config.trl_options import OWNED
from align.store.artifacts import GENERATORS, Kind


class PretrainConfig(TrainingFields):
    """Loss on every token of every text. ``batch_size`` counts packs of ``max_length`` tokens.

    Texts are packed: windows of documents share a row of ``max_length`` tokens, without attention between them. To keep
    what the model knew, mix in general texts with the recipe's ``mix`` step, train few weights (``tuning``) or keep the
    model near its start (``anchor``).
    """

    model: stage_input(*GENERATORS)  # type: ignore[valid-type]
    """Stage whose checkpoint is trained."""
    data: stage_input(Kind.TEXTS)  # type: ignore[valid-type]
    """Stage with the texts: the ``train`` split is trained on, the ``test`` split only evaluated."""
    document_end: str | None = Field(None, min_length=1)
    """Token after every document, by default the tokenizer's EOS. A chat model's EOS ends a turn, so name the token of
    its pre-training (``<|endoftext|>``); otherwise it learns that texts end like turns."""

    trainer_class: ClassVar[str] = "trl.trainer.sft_config:SFTConfig"
    owned_options: ClassVar[dict[str, str]] = OWNED | {
        **dict.fromkeys(("packing", "padding_free"), "texts are always packed"),
        **dict.fromkeys(("assistant_only_loss", "completion_only_loss"), "every token of a text is learned"),
    }

    @model_validator(mode="after")
    def _tuning_reads_packs(self) -> PretrainConfig:
        if self.tuning.input_only:
            raise ValueError(
                f"tuning: {self.tuning.method} changes a row's beginning, and packed texts share rows; take full, lora "
                "or another method that changes modules."
            )
        return self
