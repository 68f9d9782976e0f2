"""Freezing by pattern: what a pattern names, and that one which names nothing is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from align.config.tuning import FullTuning
from align.models.loading import load_policy, new_reward
from align.models.parameter_groups import expand, freeze, has_tied_head, layer_stack, matches, parameter_groups
from align.models.tuning.apply import apply_tuning
from tests.support.refusals import Refused


@pytest.fixture
def model(tiny_model: Path) -> Any:
    return load_policy(tiny_model)


@pytest.mark.parametrize(
    ("pattern", "name", "fits"),
    [
        ("model.layers.1", "model.layers.1.mlp.up_proj.weight", True),
        ("model.layers.1", "model.layers.10.mlp.up_proj.weight", False),
        ("model.layers.{0..11}", "model.layers.11.self_attn.q_proj.weight", True),
        ("model.layers.{0..11}", "model.layers.12.self_attn.q_proj.weight", False),
        ("*norm*", "model.layers.3.input_layernorm.weight", True),
        ("*.{q_proj,k_proj}", "model.layers.3.self_attn.k_proj.weight", True),
        ("*.{q_proj,k_proj}", "model.layers.3.self_attn.v_proj.weight", False),
        ("layers.1", "model.layers.1.mlp.up_proj.weight", False),
    ],
)
def test_a_pattern_names_a_parameter_or_a_module_above_it(pattern: str, name: str, fits: bool) -> None:
    assert matches(pattern, name) is fits


def test_braces_are_ranges_and_lists() -> None:
    assert expand("a.{8..10}.{x,y}") == ["a.8.x", "a.8.y", "a.9.x", "a.9.y", "a.10.x", "a.10.y"]


def test_frozen_weights_get_no_gradient_and_others_do(model: Any) -> None:
    apply_tuning(model, FullTuning(freeze=["model.embed_tokens", "*.0.mlp"]), 0)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {
        "model.embed_tokens.weight",
        *(f"model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up", "down")),
    }


@pytest.mark.parametrize(
    "patterns",
    [
        ["model.layer.0"],
        ["lm_head"],
        ["model"],
    ],
)
def test_a_pattern_that_fits_nothing_or_everything_is_refused(
    refused: Refused, model: Any, patterns: list[str]
) -> None:
    refused(freeze, model, patterns)


def test_every_weight_has_a_place(model: Any, tiny_model: Path) -> None:
    where = parameter_groups(model)
    assert where.keys() == {name for name, _ in model.named_parameters()}
    assert where["model.embed_tokens.weight"] == "embeddings"
    assert where["model.norm.weight"] == "norm"
    assert where["model.layers.1.mlp.up_proj.weight"] == 1
    assert has_tied_head(model)
    reward = new_reward(tiny_model)
    assert parameter_groups(reward)["score.weight"] == "score"
    assert not has_tied_head(reward)


def test_a_model_without_one_stack_is_refused(refused: Refused, model: Any) -> None:
    model.config.num_hidden_layers = 7
    refused(layer_stack, model)
