"""Weights for engines by the names of a checkpoint's files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from align.inference.trainer_engine import policy_weights
from align.inference.weights import (
    HEAD,
    AdaptedWeights,
    HeldBase,
    WeightsFolder,
    checkpoint_weights,
    needs_tied_head,
    weight_names,
    with_stored_names,
    with_tied_head,
)
from align.models.loading import load_policy
from align.models.tuning.peft_layers import merged_weights
from tests.support.models.families import family_config, write_family
from tests.support.models.tuning.tuning_cases import CASES, push, tuning_of, wrapped

LOW_RANK = (
    *("lora", "rslora", "gaussian", "olora", "pissa", "embeddings", "tokens", "last", "last_pissa"),
    *("qlora_q_proj", "nf4", "loftq"),
)


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


def trained(model_dir: Path, name: str) -> Any:
    model = wrapped(model_dir, tuning_of(CASES[name]))
    push(model)
    return model


@pytest.mark.parametrize("name", LOW_RANK)
def test_base_and_adapter_give_the_merged_weights(name: str, tiny_model: Path) -> None:
    model = trained(tiny_model, name)
    weights = policy_weights(model)
    assert isinstance(weights, AdaptedWeights)
    for (name, tensor), (expected_name, expected) in zip(weights, merged_weights(model), strict=True):
        assert name == expected_name
        assert tensor.dtype == expected.dtype
        assert torch.equal(tensor, expected), name


@pytest.mark.parametrize("name", ["dora", "qdora", "ia3", "vera", "oft", "ln_tuning"])
def test_other_methods_are_merged(name: str, tiny_model: Path) -> None:
    assert not isinstance(policy_weights(trained(tiny_model, name)), AdaptedWeights)


def test_adapters_of_experts_are_merged(tmp_path: Path) -> None:
    folder = write_family("qwen3_moe", tmp_path / "model")
    targets = {"method": "lora", "targets": ["q_proj", "experts.gate_up_proj"]}
    assert not isinstance(policy_weights(wrapped(folder, tuning_of(targets))), AdaptedWeights)
    targets["targets"] = ["q_proj"]
    assert isinstance(policy_weights(wrapped(folder, tuning_of(targets))), AdaptedWeights)


def test_changed_layers_are_whole(tiny_model: Path) -> None:
    weights = policy_weights(trained(tiny_model, "last"))
    assert isinstance(weights, AdaptedWeights)
    changed = {name for name, _ in weights.changed()}
    assert changed == {name for name in weight_names(tiny_model) if name.startswith("model.layers.1.")}


def test_a_module_outside_layers_is_whole() -> None:
    tensors = {"lm_head.weight": torch.ones(2, 2), "lm_head.bias": torch.ones(2), "model.norm.weight": torch.ones(2)}
    weights = AdaptedWeights("base", lambda: iter(tensors.items()), {"lm_head.weight": torch.zeros(2, 2)})
    changed = dict(weights.changed())
    assert changed.keys() == {"lm_head.weight", "lm_head.bias"}
    assert torch.equal(changed["lm_head.weight"], torch.zeros(2, 2))


def test_low_rank_update_is_added_by_hand() -> None:
    # A = (1 2), B = (3 0)^T, factor 2: the update is 2 * (3 6; 0 0).
    adapter = {
        "layers.0.q.weight.low": torch.tensor([[1.0, 2.0]]),
        "layers.0.q.weight.high": torch.tensor([[3.0], [0.0]]),
        "layers.0.q.weight.scale": torch.tensor(2.0, dtype=torch.float64),
    }
    base = {"layers.0.q.weight": torch.ones(2, 2, dtype=torch.bfloat16)}
    (merged,) = dict(AdaptedWeights("base", lambda: iter(base.items()), adapter)).values()
    assert torch.equal(merged, torch.tensor([[7.0, 13.0], [1.0, 1.0]]))
    assert torch.equal(base["layers.0.q.weight"], torch.ones(2, 2, dtype=torch.bfloat16))


def test_all_weights_are_loaded_until_the_base_is_held() -> None:
    base = {"layers.0.q.weight": torch.ones(2), "norm.weight": torch.ones(2)}
    weights = AdaptedWeights("one", lambda: iter(base.items()), {"layers.0.q.weight": torch.zeros(2)})
    other = AdaptedWeights("two", lambda: iter(base.items()), weights.adapter)
    held = HeldBase()

    def load(given: Any, error: Exception | None = None) -> list[str]:
        with held.loading(given) as needed:
            names = [name for name, _ in needed]
            if error is not None:
                raise error
        return names

    full, changed = list(base), ["layers.0.q.weight"]
    assert [load(weights), load(weights), load(other), load(other)] == [full, changed, full, changed]
    with pytest.raises(OSError, match="broken"):
        load(other, OSError("broken"))
    assert [load(other), load(list(base.items())), load(other)] == [full, full, full]


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Iterator[WeightsFolder]:
    """A folder for servers that compute in bfloat16."""
    spec = SimpleNamespace(
        model_dir=tiny_model,
        tensor_names=frozenset(weight_names(tiny_model)),
        dtype=torch.bfloat16,
        tied_embeddings=True,
        pool=SimpleNamespace(weights_folder=str(tmp_path)),
    )
    folder = WeightsFolder(spec)
    yield folder
    folder.close()


def test_a_base_is_written_once_and_adapters_after_it(folder: WeightsFolder, tiny_model: Path) -> None:
    model = trained(tiny_model, "embeddings")
    whole = folder.write(checkpoint_weights(tiny_model))
    assert folder.announcement(whole).keys() == {"path", "version", "digest"}
    versions = [folder.write(policy_weights(model)) for _ in range(2)]
    folder.drop_before(versions[1])
    base = Path(folder.announcement(versions[1])["base"])
    assert {path.name for path in folder.path.iterdir()} == {base.name, "step_3"}
    # A server merges in float32 and rounds once, as if it read merged weights.
    adapter = dict(checkpoint_weights(folder.path_of(versions[1])))
    assert {tensor.dtype for name, tensor in adapter.items() if name.endswith((".low", ".high"))} == {torch.float32}
    read = dict(AdaptedWeights("base", lambda: checkpoint_weights(base), adapter))
    for name, tensor in merged_weights(model):
        assert torch.equal(read[name].bfloat16(), tensor.bfloat16()), name
    assert torch.equal(read[HEAD], read["model.embed_tokens.weight"])
    whole = folder.write(merged_weights(model))
    stored = load_file(folder.path_of(whole) / "model-00001.safetensors")
    assert stored.keys() == read.keys()
    assert "base" not in folder.announcement(whole)


def test_experts_stored_by_other_names_are_written_whole(tmp_path: Path, folder: WeightsFolder) -> None:
    """Adapters of a model whose files have other names than the live model have no place in them."""
    weights = dict(checkpoint_weights(folder.spec.model_dir))
    unknown = AdaptedWeights("base", lambda: iter(weights.items()), {"model.other.weight": torch.ones(2)})
    version = folder.write(unknown)
    assert "base" not in folder.announcement(version)
    assert weights.keys() <= dict(checkpoint_weights(folder.path_of(version))).keys()
