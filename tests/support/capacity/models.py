"""Models whose bytes and operations tests count: one by hand, two of real sizes."""

from __future__ import annotations

from typing import Any

from align.capacity import estimate_training
from align.capacity.sharding import Job
from align.config.stages.sft import SftConfig
from align.models.compute.architecture import Architecture
from align.models.compute.layers import Layer, Linear

TOY = Architecture(
    "toy",
    hidden=4,
    vocabulary=10,
    blocks=(Layer((Linear("q", 4, 5, True),), vectors=4, token_cache=6),) * 2,
    embedded=40,
    last_norm=4,
    tied=False,
)
"""A layer has 25 parameters in its matrix with its bias and 4 in its norm; the trunk 44 + 2 * 29 = 102; the head 40."""

MISTRAL: dict[str, Any] = {
    "model_type": "mistral",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
"""A ``config.json`` of 7 billion parameters."""

SEVENTY: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}
"""A ``config.json`` of 70 billion parameters."""


def sft_job(precision: str = "float32", **fields: Any) -> Job:
    """Return the job of fine-tuning the toy model on rows of up to 8 tokens."""
    config = SftConfig(model="m", data="d", learning_rate=1e-3, precision=precision, max_length=8, **fields)
    return estimate_training.job(config, {"model": [TOY]}, None)
