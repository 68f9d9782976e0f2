"""Settings of the stage ``model``: the base model and its files. Torch-free."""

from __future__ import annotations

from typing import ClassVar, Literal

from align.config.base import Config


class ModelConfig(Config):
    """The base model and its files."""

    source: str
    """A built-in model (smollm2-135m-instruct, tiny), a model folder, a .gguf file, or a Hub name."""
    revision: str | None = None
    """Commit of a Hub model, 40 hexadecimal digits; required, so that a pipeline always means the same model."""
    trust_remote_code: bool = False
    """Run Python code of the model's repository; otherwise such a model is refused."""
    chat_template: str | None = None
    """Path of a Jinja chat template, which replaces the model's; required for a base model without one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the stored weights; bfloat16 halves the files. Training starts from float32 copies either way."""

    identified: ClassVar[frozenset[str]] = frozenset({"source", "revision", "chat_template"})
