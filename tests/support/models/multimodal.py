"""Tiny multimodal checkpoints with random weights: a vision tower, a projector and a text part."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from align.models.built_in import make_tiny_tokenizer
from tests.support.models.families import family_config

IMAGE_TOKEN = 259
VISION: dict[str, dict[str, Any]] = {
    "gemma3": {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    },
    "qwen3_5": {
        "hidden_size": 16,
        "intermediate_size": 32,
        "depth": 1,
        "num_heads": 2,
        "out_hidden_size": 32,
        "num_position_embeddings": 16,
        "patch_size": 8,
    },
    "mistral3": {
        "model_type": "pixtral",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 8,
        "image_size": 16,
        "patch_size": 8,
    },
}
"""Type of model -> the fields of its vision config."""
TEXT = {"gemma3": "gemma3_text", "qwen3_5": "qwen3_5_text", "mistral3": "mistral"}
"""Type of model -> the type of its text part."""


def write_multimodal(model_type: str, folder: Path, changes: Mapping[str, Any] | None = None) -> Path:
    """Write a tiny multimodal model with the tiny tokenizer and a processor's settings.

    ``changes`` are fields of the text part's config.
    """
    text = family_config(TEXT[model_type], changes).to_dict()
    vision = VISION[model_type]
    if "out_hidden_size" in vision:
        vision = {**vision, "out_hidden_size": text["hidden_size"]}
    fields: dict[str, Any] = {"text_config": text, "vision_config": vision}
    tokens = dict.fromkeys(("image_token_index", "image_token_id"), IMAGE_TOKEN)
    if model_type == "gemma3":
        fields["mm_tokens_per_image"] = 4
    config = AutoConfig.for_model(model_type, **fields, **tokens)
    for name in ("pad_token_id", "eos_token_id", "bos_token_id"):
        setattr(config, name, text[name])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    model.generation_config.do_sample = True
    model.save_pretrained(folder)
    make_tiny_tokenizer().save_pretrained(folder)
    settings = {"image_processor_type": "Gemma3ImageProcessor", "size": {"height": 16, "width": 16}}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder
