"""The field ``train_tokens`` of low-rank tunings. Torch-free."""

from __future__ import annotations

from typing import Any, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from align.config.base import Config

EMBEDDING_NAMES = ("embed_tokens", "lm_head", "wte", "embed_in")
"""Last parts of the names of embeddings and heads in transformers."""


class TrainedTokens(Config):
    """Tokens whose rows are trained in addition to adapters."""

    train_tokens: list[str] = Field(default_factory=list)
    """Tokens whose rows of embedding and head are trained in full with the adapters, such as tokens that a model
    stage's ``add_tokens`` added: ``["<|im_start|>", "<|im_end|>"]``. All other rows stay. Not for a partitioned model
    (fsdp2, stage 3 of deepspeed), nor with ``anchor: kl``."""

    @model_serializer(mode="wrap")
    def _leave_out_no_tokens(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Stages that train no tokens keep the keys that they had before there was this field.
        fields: dict[str, Any] = serialize(self)
        if not self.train_tokens:
            fields.pop("train_tokens", None)
        return fields

    @model_validator(mode="after")
    def _tokens_are_trained_once(self) -> Self:
        saved_modules: list[str] = getattr(self, "save_modules", [])
        if self.train_tokens and any(name.endswith(EMBEDDING_NAMES) for name in saved_modules):
            raise ValueError("save_modules trains all embeddings already; leave train_tokens out.")
        return self
