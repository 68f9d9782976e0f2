"""Weights for engines by the names of a checkpoint's files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from align.inference.weights import (
    HEAD,
    checkpoint_weights,
    needs_tied_head,
    weight_names,
    with_stored_names,
    with_tied_head,
)
from align.models.loading import load_policy
from align.models.tuning.peft_layers import merged_weights
from tests.support.models.families import family_config, write_family


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "lfm2", "llama", "gpt_neox"])
def test_live_weights_get_the_names_of_their_files(model_type: str, tmp_path: Path) -> None:
    folder = write_family(model_type, tmp_path / "model")
    stored = dict(checkpoint_weights(folder))
    live = dict(with_stored_names(merged_weights(load_policy(folder)), folder, weight_names(folder)))
    assert live.keys() - {"lm_head.weight"} == stored.keys() - {"lm_head.weight"}
    for name, tensor in stored.items():
        assert torch.equal(live[name], tensor), name


@pytest.mark.parametrize("model_type", ["gemma3_text", "gpt2", "opt"])
def test_engines_get_a_tied_head_by_its_name(model_type: str, tmp_path: Path) -> None:
    folder = write_family(model_type, tmp_path / "model")
    weights = dict(with_tied_head(checkpoint_weights(folder), needs_tied_head(family_config(model_type))))
    assert torch.equal(weights[HEAD], load_policy(folder).get_output_embeddings().weight)


def test_engines_get_no_head_that_they_refuse(tmp_path: Path) -> None:
    assert not needs_tied_head(family_config("gemma2"))
    assert not needs_tied_head(family_config("llama"))
    folder = write_family("gemma2", tmp_path / "model")
    live = list(merged_weights(load_policy(folder)))
    assert HEAD in dict(live)
    assert HEAD not in dict(with_stored_names(live, folder, weight_names(folder)))


def test_experts_are_converted_layer_by_layer(tmp_path: Path) -> None:
    folder = write_family("qwen3_moe", tmp_path / "model")
    weights = iter(list(merged_weights(load_policy(folder))))
    renamed = with_stored_names(weights, folder, weight_names(folder))
    first = next(name for name, _ in renamed if ".experts." in name)
    assert first.startswith("model.layers.0.mlp.experts.0.")
    # The second layer's experts have not been read when the first layer's come.
    assert any("layers.1.mlp.experts" in name for name, _ in weights)
