"""LoRA's variants: where they start, what they share, and what of a config does not fit a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from align.config.tuning import LoraTuning
from align.models.loading import load_policy, load_tokenizer
from align.models.tuning.apply import apply_tuning, save_tuned
from align.models.tuning.peft_layers import merged_weights
from tests.support.models.tuning.tuning_cases import ROWS, logits, push
from tests.support.refusals import Refused


def test_adapters_from_weights_do_not_change_shared_tensors(tiny_model: Path) -> None:
    model = load_policy(tiny_model)
    shared = dict(model.named_parameters())
    before = {name: tensor.detach().clone() for name, tensor in shared.items()}
    new_model = apply_tuning(model, LoraTuning(rank=4, init="pissa"), 0)
    assert all(tensor.equal(before[name]) for name, tensor in shared.items())
    layer = new_model.get_base_model().model.layers[0].mlp.up_proj
    full = before["model.layers.0.mlp.up_proj.weight"]
    left, sizes, right = torch.linalg.svd(full, full_matrices=False)
    best = left[:, :4] * sizes[:4] @ right[:4]
    assert torch.allclose(layer.get_delta_weight("default"), best, atol=1e-5)
    assert torch.allclose(layer.get_base_layer().weight, full - best, atol=1e-5)


def test_rslora_scales_by_the_root_of_the_rank(tiny_model: Path) -> None:
    plain, stable = (apply_tuning(load_policy(tiny_model), LoraTuning(rank=16, alpha=32, rslora=on), 0)
                     for on in (False, True))  # fmt: skip
    scales = [m.get_base_model().model.layers[0].mlp.up_proj.scaling["default"] for m in (plain, stable)]
    assert scales == [2.0, 8.0]


def test_eva_spans_what_the_inputs_vary_in(refused: Refused, tiny_model: Path) -> None:
    """The first adapter's rows are the largest right singular vectors of its inputs on the rows it was shown."""
    model = apply_tuning(load_policy(tiny_model), LoraTuning(rank=4, init="eva"), 0, rows=ROWS)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    calls: list[torch.Tensor] = []
    layer.register_forward_pre_hook(lambda module, values: calls.append(values[0].detach().flatten(0, 1)))
    with torch.no_grad():
        model(input_ids=torch.tensor(ROWS))
    spanned = layer.lora_A["default"].weight
    assert torch.allclose(spanned @ spanned.T, torch.eye(4), atol=1e-4)
    inputs = torch.cat(calls)
    varied = inputs - inputs.mean(0)
    remaining = (varied @ spanned.T).square().sum() / varied.square().sum()
    random = torch.linalg.qr(torch.randn(64, 4, generator=torch.Generator().manual_seed(0)))[0]
    assert remaining > 1.5 * (varied @ random).square().sum() / varied.square().sum()
    refused(lambda: apply_tuning(load_policy(tiny_model), LoraTuning(init="eva"), 0))


def test_adapter_from_weights_is_saved_with_twice_the_rank(tiny_model: Path, tmp_path: Path) -> None:
    model = apply_tuning(load_policy(tiny_model), LoraTuning(rank=4, alpha=8, init="olora"), 0)
    save_tuned(model, load_tokenizer(tiny_model), tmp_path / "model")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (8, 16, True)
    assert model.peft_config["default"].r == 4


def test_saved_modules_stay_tied(tiny_model: Path, tmp_path: Path) -> None:
    model = apply_tuning(load_policy(tiny_model), LoraTuning(rank=2, save_modules=["embed_tokens"]), 0)
    push(model)
    weights = dict(merged_weights(model))
    assert weights["lm_head.weight"].equal(weights["model.embed_tokens.weight"])
    assert not weights["lm_head.weight"].equal(load_policy(tiny_model).lm_head.weight)
    save_tuned(model, load_tokenizer(tiny_model), tmp_path / "model")
    assert torch.allclose(logits(load_policy(tmp_path / "model")), logits(model.eval()), atol=1e-5)


@pytest.mark.parametrize(
    "fields",
    [
        {"targets": ["q_proj", "up_porj"]},
        {"save_modules": ["embed_token"]},
        {"targets": ["lm_head"]},
        {"targets": ["embed_tokens"]},
    ],
)
def test_what_does_not_fit_the_model_is_refused(
    refused: Refused, fields: dict[str, list[str]], tiny_model: Path
) -> None:
    refused(lambda: apply_tuning(load_policy(tiny_model), LoraTuning.model_validate(fields), 0))


def test_adapters_of_the_last_layers_are_there_alone(tiny_model: Path) -> None:
    model = apply_tuning(load_policy(tiny_model), LoraTuning(last_layers=1), 0)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    everywhere = apply_tuning(load_policy(tiny_model), LoraTuning(), 0)
    assert trained == [n for n, p in everywhere.named_parameters() if p.requires_grad and ".layers.1." in n]
    some = apply_tuning(load_policy(tiny_model), LoraTuning(last_layers=1, targets=["q_proj", "down_proj"]), 0)
    wanted = [name for name in trained if "q_proj" in name or "down_proj" in name]
    assert [name for name, p in some.named_parameters() if p.requires_grad] == wanted


@pytest.mark.parametrize(
    "fields",
    [
        {"last_layers": 3},
        {"last_layers": 1, "targets": ["q_proj", "lm_head"]},
        {"last_layers": 1, "targets": ["layers.0.self_attn.q_proj"]},
    ],
)
def test_last_layers_that_there_are_not_are_refused(refused: Refused, fields: dict[str, Any], tiny_model: Path) -> None:
    refused(lambda: apply_tuning(load_policy(tiny_model), LoraTuning(**fields), 0))
