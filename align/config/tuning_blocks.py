"""Parts of ``tuning``: properties of all methods, schedules that train a part at a time, rows of tokens. Torch-free."""

from __future__ import annotations

import itertools
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, field_serializer, model_serializer, model_validator

from align.config.base import Config, Precision, PrecisionSetting

LORA_HEAD_RATE = 0.1
"""Learning rate of a score or value head, as a share of the adapters' rate.

A step of Adam moves every weight of a head by about the learning rate, and a score by that times the hidden size and
the size of the features. At 1e-3, right for adapters, SmolLM2's scores move by about 1.
"""


# Every stage that trains has such a block. Their schemas are built once and shared by the stages' schemas.
class TuningBase(Config, defer_build=False):
    """Properties of every method."""

    method: str
    input_only: ClassVar[bool] = False
    """True if the method changes the model's input or its keys and values (virtual tokens), not its modules."""

    @property
    def trains_all(self) -> bool:
        """True if the model's own weights are trained; a reference then needs a copy of them."""
        return self.method == "full"

    @property
    def starts_from_weights(self) -> bool:
        """True if adapters start with a part of the weights; the model without them then differs."""
        return False

    @property
    def completes_weights(self) -> bool:
        """True if adapters start with the difference between the input model and the frozen weights."""
        return False

    @property
    def head_share(self) -> float:
        """Default learning rate of a score or value head, as a share of ``learning_rate``."""
        return 1.0 if self.trains_all else LORA_HEAD_RATE

    @property
    def online_objection(self) -> str | None:
        """Reason why PPO and the other online methods cannot use the method; None if they can.

        They compare log-probabilities of one model, so two forward passes must agree.
        """
        return f"tuning {self.method} changes the model's input, which rows share there" if self.input_only else None

    def base_type(self, precision: Precision) -> Precision:
        """Return the type of the weights that are loaded for a stage that computes in ``precision``."""
        return "float32"

    @property
    def label(self) -> str:
        """Short name for tables: ``lora r16``."""
        return self.method


class FrozenBase(TuningBase):
    """Fields of every method that freezes the model below what it trains."""

    base_dtype: PrecisionSetting = "auto"
    """Type of the frozen matrices: ``bfloat16`` (2 bytes a weight), ``float32``, or by ``auto`` the stage's
    ``precision``. What is trained is float32. ``pissa`` and ``olora`` change the frozen weights, which stay float32."""

    def base_type(self, precision: Precision) -> Precision:
        """Return the type of frozen matrices in a stage that computes in ``precision``."""
        if self.starts_from_weights or precision == "float32":
            return "float32"
        return "bfloat16" if self.base_dtype == "auto" else self.base_dtype


class Unfreeze(Config):
    """Unfreeze the model from its last layers down during training (gradual unfreezing, arXiv 1801.06146).

    A frozen layer has no gradient and no optimizer state. The last norm is trained from the start.
    """

    at: dict[float, int] = Field(min_length=1)
    """Start -> number of last layers trained from then on: ``{0: 2, 50: 8}``. More layers than the model has mean
    all."""
    unit: Literal["steps", "epochs"] = "steps"
    """Unit of the starts: optimizer steps, or epochs (fractions are allowed)."""
    embeddings: bool = False
    """Also train the embeddings when every layer has been trained; with tied embeddings also the head."""
    head: bool = False
    """Train the vocabulary head from the start, and with it tied embeddings. A score head is always trained."""

    @model_validator(mode="after")
    def _check_starts(self) -> Unfreeze:
        times = sorted(self.at)
        if times[0] != 0:
            raise ValueError(
                f"at starts at {times[0]:g}, so nothing would be trained before that. Give `0:` a number of layers."
            )
        if self.unit == "steps" and any(time != int(time) for time in times):
            raise ValueError(f"at counts steps, whole numbers; found {', '.join(f'{t:g}' for t in times)}.")
        opened = [self.at[time] for time in times]
        if opened[0] < 0 or any(later <= earlier for earlier, later in itertools.pairwise(opened)):
            raise ValueError(
                f"at trains {opened} layers one after another; each number must be larger than the one before."
            )
        return self

    @field_serializer("at")
    def _sort_with_text_keys(self, starts: dict[float, int]) -> dict[str, int]:
        # Sort the entries and use one spelling per number, so equal schedules have equal keys.
        return {str(int(time) if time == int(time) else time): starts[time] for time in sorted(starts)}


class Lisa(Config):
    """Train a few random layers, and others after some steps (LISA, arXiv 2403.17919)."""

    layers: int = Field(2, ge=1)
    """Layers trained at a time; only these have optimizer state and gradients."""
    every: int = Field(20, ge=1)
    """Optimizer steps until new layers are chosen; a layer that is frozen loses its AdamW averages."""
    embeddings: bool = True
    """Train the embeddings at every step, as the paper does."""
    head: bool = True
    """Train the vocabulary head at every step, as the paper does; with tied embeddings, if either is trained."""


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
    def _check_tokens_trained_once(self) -> Self:
        saved_modules: list[str] = getattr(self, "save_modules", [])
        if self.train_tokens and any(name.endswith(EMBEDDING_NAMES) for name in saved_modules):
            raise ValueError("save_modules trains all embeddings already; leave train_tokens out.")
        return self
