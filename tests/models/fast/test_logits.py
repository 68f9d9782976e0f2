"""Scales and caps of logits, against the logits of each model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    FalconH1Config,
    Gemma2Config,
    GraniteConfig,
    HyperCLOVAXConfig,
    LlamaConfig,
    RecurrentGemmaConfig,
)

from align.models.fast.token_logprobs import PLAIN, LogitTransform, logit_transform

SMALL: dict[str, Any] = {
    "vocab_size": 100, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "initializer_range": 0.5, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LlamaConfig(**SMALL), PLAIN),
        (GraniteConfig(**SMALL, logits_scaling=8.0), LogitTransform(scale=1 / 8)),
        (CohereConfig(**SMALL), LogitTransform(scale=0.0625)),
        (HyperCLOVAXConfig(**SMALL, logits_scaling=0.25), LogitTransform(scale=0.25)),
        (Gemma2Config(**SMALL, head_dim=32, final_logit_softcapping=5.0), LogitTransform(cap=5.0)),
        (
            RecurrentGemmaConfig(**SMALL | {"num_hidden_layers": 3}, lru_width=64, logits_soft_cap=4.0),
            LogitTransform(cap=4.0),
        ),
        (
            FalconH1Config(**SMALL, head_dim=32, mamba_d_ssm=64, mamba_n_heads=2, lm_head_multiplier=0.5),
            LogitTransform(scale=0.5),
        ),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_transformed_products_are_the_models_logits(config: Any, expected: LogitTransform) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    assert logit_transform(model) == expected
    ids = torch.randint(0, 100, (1, 12))
    with torch.no_grad():
        states = getattr(model, model.base_model_prefix)(input_ids=ids)[0]
        actual = logit_transform(model).apply(model.get_output_embeddings()(states))
        assert torch.allclose(actual, model(input_ids=ids).logits, atol=1e-5)


def test_the_scale_comes_before_the_cap() -> None:
    product = torch.tensor([8.0, -3.0])
    assert torch.allclose(LogitTransform(0.5, 2.0).apply(product), 2 * torch.tanh(torch.tensor([2.0, -0.75])))
