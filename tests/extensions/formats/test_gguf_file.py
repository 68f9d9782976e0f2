"""A GGUF file holds the checkpoint's weights, and transformers reads the same model from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from align.extensions.formats.gguf_families import FAMILIES, rope_factors
from align.extensions.formats.gguf_file import Plan, plan_gguf, read_back, write_gguf
from align.extensions.formats.gguf_tensors import Kind
from align.models.loading import load_policy
from tests.support.models.families import write_family
from tests.support.refusals import Refused

IDS = torch.tensor([[1, 40, 41, 42, 2, 1, 50, 60, 70, 80, 90, 100]])
GEMMA_3 = ["sliding_attention"] * 5 + ["full_attention"]
CHANGES: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3_text": {"num_hidden_layers": 6, "layer_types": GEMMA_3, "query_pre_attn_scalar": 16},
    "qwen3_moe": {"norm_topk_prob": True},
    "olmo3": {"num_hidden_layers": 4, "layer_types": GEMMA_3[2:]},
}
"""Fields in which llama.cpp has no choice."""
GEMMA_HEADS = {"head_dim": 256, "query_pre_attn_scalar": 256}
READ_BY_TRANSFORMERS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"head_dim": 128},
    "qwen3_moe": {},
    "gemma2": GEMMA_HEADS,
    "gemma3_text": GEMMA_HEADS,
    "phi3": {},
    "starcoder2": {},
    "gpt2": {},
}
"""Families that transformers reads from GGUF, with fields that it does not read, set to its defaults."""


def write_half(model_type: str, folder: Path, changes: dict[str, Any] | None = None) -> Path:
    """Write a tiny model whose weights are numbers of float16, so that f16 keeps them."""
    write_family(model_type, folder, {**CHANGES.get(model_type, {}), **(changes or {})})
    file = folder / "model.safetensors"
    weights = {name: tensor.half().float() for name, tensor in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    return folder


def write(folder: Path, path: Path, kind: Kind = "f16") -> Plan:
    plan = plan_gguf(folder, kind)
    write_gguf(plan, path, "tiny")
    return plan


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    result: torch.Tensor = model.eval()(input_ids=IDS).logits
    return result


@pytest.mark.parametrize("model_type", READ_BY_TRANSFORMERS)
def test_transformers_reads_same_model_from_file(model_type: str, tmp_path: Path) -> None:
    folder = write_half(model_type, tmp_path / "model", READ_BY_TRANSFORMERS[model_type])
    write(folder, tmp_path / "model.gguf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    assert torch.allclose(logits(model), logits(load_policy(folder)), atol=1e-4)


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_read_back_gives_weights_of_every_family(model_type: str, tmp_path: Path) -> None:
    folder = write_half(model_type, tmp_path / "model")
    plan = write(folder, tmp_path / "model.gguf")
    read_back(plan, tmp_path / "model.gguf", tmp_path / "read")
    assert torch.allclose(logits(load_policy(tmp_path / "read")), logits(load_policy(folder)), atol=1e-5)


def test_q8_0_is_a_quarter_of_float32_within_its_rounding(tmp_path: Path) -> None:
    folder = write_half("llama", tmp_path / "model")
    plan = write(folder, tmp_path / "model.gguf", "q8_0")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(tmp_path / "model.gguf").tensors}
    assert kinds["blk.0.ffn_up.weight"] == "Q8_0" and kinds["output_norm.weight"] == "F32"
    read_back(plan, tmp_path / "model.gguf", tmp_path / "read")
    difference = logits(load_policy(tmp_path / "read")) - logits(load_policy(folder))
    assert 0 < difference.abs().max() < 0.05


def test_llama_3_rope_factors_are_those_of_transformers(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    scaled = load_policy(write_family("llama", tmp_path / "scaled", {"rope_parameters": rope}))
    plain = {"rope_type": "default", "rope_theta": 500000.0}
    unscaled = load_policy(write_family("llama", tmp_path / "plain", {"rope_parameters": plain}))
    expected = unscaled.model.rotary_emb.inv_freq / scaled.model.rotary_emb.inv_freq
    factors = rope_factors(scaled.config)
    assert factors is not None and max(factors) == 8.0 and min(factors) == 1.0
    assert torch.allclose(torch.tensor(factors), expected, rtol=1e-5)
    write(tmp_path / "scaled", tmp_path / "scaled.gguf")
    stored = {tensor.name: tensor.data for tensor in GGUFReader(tmp_path / "scaled.gguf").tensors}
    assert torch.allclose(torch.tensor(stored["rope_freqs.weight"].copy()), expected, rtol=1e-5)


# ---- what is refused, or found ---------------------------------------------------------------------------------------


def test_unsupported_family_is_refused_with_the_supported(refused: Refused, tmp_path: Path) -> None:
    folder = write_family("mamba2", tmp_path / "model")
    refused(plan_gguf, folder, "f16")


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("mistral", {"sliding_window": 8}),
        ("llama", {"hidden_act": "gelu"}),
        ("qwen3_moe", {"norm_topk_prob": False}),
        ("gemma3_text", {"layer_types": ["full_attention"] * 6}),
        ("gemma2", {"query_pre_attn_scalar": 8}),
        ("smollm3", {"no_rope_layers": [0, 1]}),
    ],
)
def test_config_that_llama_cpp_ignores_is_refused(
    refused: Refused, model_type: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    folder = write_half(model_type, tmp_path / "model", changes)
    refused(plan_gguf, folder, "f16")


def test_weight_beyond_float16_is_refused_and_fits_q8_0(refused: Refused, tmp_path: Path) -> None:
    folder = write_family("llama", tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e5
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    refused(write, folder, tmp_path / "half.gguf")
    plan = write(folder, tmp_path / "eight.gguf", "q8_0")
    read_back(plan, tmp_path / "eight.gguf", tmp_path / "read")


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_changed_weight_is_found_by_its_name(refused: Refused, kind: Kind, tmp_path: Path) -> None:
    folder = write_half("llama", tmp_path / "model")
    plan = write(folder, tmp_path / "model.gguf", kind)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.self_attn.q_proj.weight"][3] *= 1.02
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    refused(read_back, plan, tmp_path / "model.gguf", tmp_path / "read")


def test_changed_template_is_found(refused: Refused, tmp_path: Path) -> None:
    folder = write_half("llama", tmp_path / "model")
    write(folder, tmp_path / "model.gguf")
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    refused(lambda: read_back(plan_gguf(folder, "f16"), tmp_path / "model.gguf", tmp_path / "read"))
