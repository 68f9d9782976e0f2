"""Settings of the stage ``pretrain``: continued pre-training on plain texts. Torch-free."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator, model_validator

from align.config.base import stage_input
from align.config.stages.training import TrainingFields, checked_options
from align.store.artifacts import GENERATORS, Kind


class PretrainConfig(TrainingFields):
    """Loss on every token of every text. ``batch_size`` counts packs of ``max_length`` tokens.

    Texts are packed: whole windows of documents share a row of ``max_length`` tokens, none sees another. To keep what
    the model knew, mix general texts in by the recipe's ``mix`` step, train few weights (``tuning``) or hold it near
    its start (``anchor``).
    """

    model: stage_input(*GENERATORS)  # type: ignore[valid-type]
    """Stage whose checkpoint is trained further."""
    data: stage_input(Kind.TEXTS)  # type: ignore[valid-type]
    """Stage with the texts: its ``train`` split is learned, its ``test`` split only scored."""
    document_end: str | None = Field(None, min_length=1)
    """Token behind every document, the tokenizer's EOS by default. A chat model's EOS ends a turn: name what its
    pre-training had (``<|endoftext|>``), or it is taught that texts end as turns do."""

    @field_validator("trainer")
    @classmethod
    def _trainer_exists(cls, options: dict[str, Any]) -> dict[str, Any]:
        return checked_options(
            "sft", options, {"packing", "padding_free", "assistant_only_loss", "completion_only_loss"}
        )

    @model_validator(mode="after")
    def _tuning_reads_packs(self) -> PretrainConfig:
        if self.tuning.input_only:
            raise ValueError(
                f"tuning: {self.tuning.method} acts on a row's beginning, and packed texts share rows; take full, lora "
                "or another method that acts on modules."
            )
        return self
