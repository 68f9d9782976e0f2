"""Settings of the stage ``model``: the base model and its files. Torch-free."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator

from align.config.base import Config
from align.config.located_paths import NameOrPath, PathField

BUILT_IN = ("smollm2-135m-instruct", "tiny")
"""Names of the models that are always there (``align.models.checkpoints.source``)."""


class ModelConfig(Config):
    """The base model and its files."""

    source: Annotated[str, PathField(may_be_name=True, names=BUILT_IN)]
    """A built-in model (smollm2-135m-instruct, tiny), a model folder, a peft adapter's folder, a .gguf file, or the Hub
    name of a model or adapter."""
    revision: str | None = None
    """Branch, tag or commit of a Hub model, by default main. The plan shows the commit that it means, and the record
    keeps it; write that commit here for a pipeline that always means the same model."""
    base_model: Annotated[str, PathField(may_be_name=True, names=BUILT_IN)] | None = None
    """For an adapter: its base, in any form of ``source`` but a .gguf file. The default is the base that the adapter
    names."""
    base_revision: str | None = None
    """Branch, tag or commit of the adapter's base on the Hub."""
    trust_remote_code: bool = False
    """Run Python code of the model's repository; otherwise such a model is refused."""
    chat_template: NameOrPath | None = None
    """Chat template, which replaces the model's: a template that ships with align, by name (alpaca, chatml,
    chatml-tools, gemma, llama2, llama3, mistral, phi3, qwen2.5, tulu, vicuna, zephyr), or the path of a Jinja file.
    Required for a base model without one."""
    add_tokens: list[str] = Field([])
    """Special tokens to add to the vocabulary, such as the chat template's: ``["<|im_start|>", "<|im_end|>"]``. Their
    embeddings start as the mean of all others; ``train_tokens`` of LoRA trains them."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the stored weights; bfloat16 halves the files. Training starts from float32 copies either way."""

    identified: ClassVar[frozenset[str]] = frozenset(
        {"source", "revision", "base_model", "base_revision", "chat_template", "add_tokens"}
    )

    @field_validator("add_tokens")
    @classmethod
    def _check_tokens(cls, tokens: list[str]) -> list[str]:
        for token in tokens:
            if not token or token != token.strip():
                raise ValueError(f"{token!r} is no token; write it without spaces around it.")
        if len(set(tokens)) < len(tokens):
            raise ValueError("a token stands there twice.")
        return tokens
