"""A model whose logits are not the product of its head."""

from __future__ import annotations

from pathlib import Path

import torch

from align.models.built_in import make_tiny_tokenizer


def make_scaling_model(folder: Path) -> Path:
    """Save an untrained Granite model, which divides its logits by 8, with the tiny model's tokenizer."""
    from transformers import GraniteConfig, GraniteForCausalLM

    tokenizer = make_tiny_tokenizer()
    config = GraniteConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.5,
        logits_scaling=8.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    GraniteForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
