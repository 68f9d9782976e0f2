"""Settings of the stage ``model``: which base model, and how its files are read. Torch-free."""

from __future__ import annotations

from typing import ClassVar, Literal

from align.config.base import Config


class ModelConfig(Config):
    """Which model, and how its files are read."""

    source: str
    """A built-in model (smollm2-135m-instruct, tiny), a model folder, a .gguf file, or a Hub name."""
    revision: str | None = None
    """The commit of a Hub model, 40 hexadecimal digits; needed there, so that the same file means the same model."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off: such a model is refused."""
    chat_template: str | None = None
    """Path of a Jinja chat template, which replaces the model's own; a base model without one needs it."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the stored weights; bfloat16 halves the files. Training starts from float32 copies either way."""

    identified: ClassVar[frozenset[str]] = frozenset({"source", "revision", "chat_template"})
