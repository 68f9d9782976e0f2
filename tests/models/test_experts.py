"""Mixtures of experts: routers, adapters on attention and on experts, and the load-balancing loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from align.config.tuning import LoraTuning
from align.models.experts import (
    default_targets,
    expert_matrices,
    freeze_routers,
    has_experts,
    router_disagreement,
    router_loss_weight,
    routers,
    token_experts,
)
from align.models.tuning.lora import wrap
from align.models.tuning.peft_layers import merged_weights
from tests.support.models.families import family_model
from tests.support.refusals import Refused

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
    adapted = default_targets(model)
    assert adapted and all("attn" in name for name in adapted)


def test_dense_models_have_no_experts() -> None:
    for model_type in ("llama", "granitemoehybrid"):
        model = family_model(model_type)
        assert not has_experts(model.config) and not expert_matrices(model) and not routers(model)
        assert router_loss_weight(model) == 0.0
    assert router_loss_weight(family_model("mixtral")) == 0.001
    # The class computes no such loss, though its config has the fields.
    assert router_loss_weight(family_model("deepseek_v3", changes={"router_aux_loss_coef": 0.1})) == 0.0


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
    "fields",
    [
        {"targets": ["gate_proj", "up_proj", "down_proj"]},
        {"targets": EXPERTS, "dropout": 0.1},
        {"targets": EXPERTS, "dora": True},
        {"targets": ["experts.w9"]},
    ],
)
def test_impossible_targets_of_experts_are_refused(refused: Refused, fields: dict[str, Any]) -> None:
    refused(lambda: wrap(family_model("mixtral"), lora(**fields), seed=0))


def test_frozen_routers_are_counted() -> None:
    model = family_model("mixtral")
    assert freeze_routers(model) == 2 * 4 * 32  # layers x experts x hidden
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == ["model.layers.0.mlp.gate.weight", "model.layers.1.mlp.gate.weight"]
    assert freeze_routers(family_model("llama")) == 0


HYBRIDS = {
    "qwen3_5_text": "linear_attn: in_proj_a in_proj_b in_proj_qkv in_proj_z out_proj",
    "qwen3_next": "linear_attn: in_proj_ba in_proj_qkvz out_proj",
    "lfm2": "conv: in_proj out_proj",
    "bamba": "mamba: in_proj",
    "falcon_h1": "mamba: in_proj",
    "granitemoehybrid": "mamba: in_proj",
    "mamba2": "mixer: in_proj",
}
"""Part of a layer with a state, and its matrices with adapters. Kernels read ``out_proj`` of state spaces directly."""


@pytest.mark.parametrize("model_type", HYBRIDS)
def test_default_adapters_include_linear_attention(model_type: str) -> None:
    part, _, expected = HYBRIDS[model_type].partition(": ")
    adapted = wrap(family_model(model_type), lora(), seed=0)
    paths = [name.split(".lora_A")[0].split(".") for name, _ in adapted.named_parameters() if "lora_A" in name]
    assert sorted({path[-1] for path in paths if path[-2] == part}) == expected.split()
    assert model_type == "mamba2" or {"q_proj", "k_proj", "v_proj"} <= {path[-1] for path in paths}
    assert "lm_head" not in {path[-1] for path in paths}


def test_disagreement_of_routers_counts_tokens_in_layers() -> None:
    # Two layers, three tokens, two experts each: the last token of the second layer has another expert.
    first = torch.tensor([[[0, 1], [1, 2], [0, 3]], [[0, 2], [1, 3], [2, 3]]])
    second = first.clone()
    second[1, 2] = torch.tensor([1, 3])
    assert router_disagreement([first], [second]) == pytest.approx(1 / 6)
    assert router_disagreement([first, first], [first, first]) == 0.0


@pytest.mark.parametrize("model_type", MIXTURES)
def test_experts_of_tokens_are_those_of_the_router(model_type: str) -> None:
    model = family_model(model_type).eval()
    rows = [[10, 11, 12], [13, 14, 15, 16, 17]]
    single = token_experts(model, rows)
    blocks = 1 if model_type == "deepseek_v3" else 2
    assert [tuple(row.shape) for row in single] == [(blocks, 3, 2), (blocks, 5, 2)]
    assert router_disagreement(single, token_experts(model, rows)) == 0.0
    # Another router chooses other experts, but experts of other weights do not change the first layer's choice.
    for name, parameter in routers(model).items():
        if name.endswith("weight"):
            parameter.data.neg_()
    assert router_disagreement(single, token_experts(model, rows)) > 0.5
