"""Mixtures of experts: routers, adapters on attention and on experts, and the load-balancing loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from align.config.tuning import LoraTuning
from align.errors import UserError
from align.models.experts import (
    expert_matrices,
    freeze_routers,
    has_experts,
    matrices_outside_experts,
    router_loss_weight,
    routers,
)
from align.models.tuning.lora import wrap
from align.models.tuning.peft_layers import merged_weights
from tests.support.models.families import family_config, family_model

MIXTURES = ["qwen3_moe", "mixtral", "gpt_oss", "olmoe", "deepseek_v3", "qwen3_next"]
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
IDS = torch.arange(10, 30)[None]


def lora(**fields: Any) -> LoraTuning:
    return LoraTuning.model_validate({"method": "lora", "rank": 4, **fields})


def draw_updates(model: Any) -> None:
    """Give the adapters values other than 0."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)


@pytest.mark.parametrize("model_type", MIXTURES)
def test_parts_of_a_mixture_are_found(model_type: str) -> None:
    model = family_model(model_type)
    assert has_experts(model.config)
    assert expert_matrices(model) == sorted(EXPERTS)
    blocks = 1 if model_type == "deepseek_v3" else 2  # DeepSeek's first layer is dense
    weights = [name for name in routers(model) if name.endswith("weight")]
    assert len(weights) == blocks and all("mlp" in name for name in weights)
    adapted = matrices_outside_experts(model)
    assert adapted and all("attn" in name for name in adapted)


def test_dense_models_have_no_experts() -> None:
    for model_type in ("llama", "granitemoehybrid"):
        model = family_model(model_type)
        assert not has_experts(model.config) and not expert_matrices(model) and not routers(model)
        assert router_loss_weight(model.config) == 0.0
    assert router_loss_weight(family_config("mixtral")) == 0.001


@pytest.mark.parametrize("model_type", MIXTURES)
@pytest.mark.parametrize("targets", ["all-linear", EXPERTS])
def test_adapters_of_a_mixture_merge_exactly(model_type: str, targets: Any) -> None:
    model = family_model(model_type).eval()
    with torch.no_grad():
        before = model(input_ids=IDS).logits
    adapted = wrap(model, lora(targets=targets), seed=0)
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert all(("experts" in name) == (targets == EXPERTS) for name in trained)
    assert not any(".gate." in name or ".router." in name for name in trained)
    draw_updates(adapted)
    merged = family_model(model_type, seed=1).eval()
    merged.load_state_dict(dict(merged_weights(adapted)), strict=False)
    with torch.no_grad():
        expected = adapted(input_ids=IDS).logits
        actual = merged(input_ids=IDS).logits
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
    assert (expected - before).abs().max() > 0.1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"targets": ["gate_proj", "up_proj", "down_proj"]}, "Name their matrices instead: experts.down_proj"),
        ({"targets": EXPERTS, "dropout": 0.1}, "cannot be adapted with dropout, dora or last_layers"),
        ({"targets": EXPERTS, "dora": True}, "cannot be adapted with dropout, dora or last_layers"),
        ({"targets": ["experts.w9"]}, "'experts.w9' fits no module of this model"),
    ],
)
def test_impossible_targets_of_experts_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        wrap(family_model("mixtral"), lora(**fields), seed=0)


def test_frozen_routers_are_counted() -> None:
    model = family_model("mixtral")
    assert freeze_routers(model) == 2 * 4 * 32  # layers x experts x hidden
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == ["model.layers.0.mlp.gate.weight", "model.layers.1.mlp.gate.weight"]
    assert freeze_routers(family_model("llama")) == 0


@pytest.mark.parametrize("model_type", ["falcon_h1", "mamba2"])
def test_state_space_models_keep_what_kernels_read(model_type: str) -> None:
    adapted = wrap(family_model(model_type), lora(), seed=0)
    names = {name.split(".lora_A")[0].rpartition(".")[2] for name, _ in adapted.named_parameters() if "lora_A" in name}
    assert "in_proj" in names and not names & {"out_proj", "conv1d", "lm_head"}
