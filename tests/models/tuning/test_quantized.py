"""Matrices in 4 bits on a CPU: what is kept, what flows through, and how LoftQ starts nearer."""

from __future__ import annotations

import copy
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from align.config.tuning import LoraTuning, QloraTuning
from align.models.loading import load_policy
from align.models.tuning import quantized
from align.models.tuning.apply import apply_tuning, load_for_tuning, weight_bytes
from align.models.tuning.peft_layers import float_weight, merged_weights
from align.models.tuning.quantized import QuantizedLinear, quantize
from tests.support.models.tuning.tuning_cases import IDS, logits, push, wrapped
from tests.support.refusals import Refused


def test_matrices_take_four_bits_and_heads_stay(tiny_model: Path) -> None:
    model = load_for_tuning(tiny_model, QloraTuning(double_quantization=False))
    layer = model.model.layers[0].mlp.up_proj
    assert isinstance(layer, QuantizedLinear)
    assert layer.weight.dtype == torch.uint8
    assert layer.weight.numel() == 64 * 128 / 2
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.dtype == torch.float32
    matrices = 2 * (4 * 64 * 64 + 3 * 64 * 128)
    others = sum(p.numel() for p in load_policy(tiny_model).parameters()) - matrices
    assert weight_bytes(model) == 4 * others + matrices / 2 + 4 * matrices / 64
    nested = weight_bytes(load_for_tuning(tiny_model, QloraTuning()))
    # a scale is 8 bits; every matrix has one float for up to 256 of them
    assert nested == 4 * others + matrices / 2 + matrices / 64 + 4 * 14
    before = layer.weight.data.clone()
    quantize(model, QloraTuning())
    assert model.model.layers[0].mlp.up_proj is layer and layer.weight.data.equal(before)


def test_gradients_are_those_of_lora_on_the_dequantized_model(tiny_model: Path) -> None:
    plain = load_policy(tiny_model)
    plain.load_state_dict(dict(merged_weights(load_and_fold(tiny_model))))
    grads = []
    for model in (wrapped(tiny_model, QloraTuning(rank=4)), apply_tuning(plain, LoraTuning(rank=4), 7).eval()):
        push(model)
        model(input_ids=IDS, labels=IDS).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert len(grads[0]) == 28
    assert all(torch.allclose(first, second, rtol=1e-3, atol=1e-5) for first, second in zip(*grads, strict=True))


def load_and_fold(model_dir: Path) -> Any:
    """The quantized model with adapters that add nothing."""
    return wrapped(model_dir, QloraTuning(rank=4))


def test_autocast_decides_the_type_that_it_computes_in(tiny_model: Path) -> None:
    layer = load_for_tuning(tiny_model, QloraTuning()).model.layers[0].mlp.up_proj
    inputs = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    plain = inputs @ float_weight(layer).T
    assert torch.allclose(layer(inputs), plain, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        low = layer(inputs)
    assert low.dtype == torch.bfloat16
    assert 0 < (low.float() - plain).abs().max() < 0.05 * plain.abs().max()
    assert torch.allclose(layer(inputs), plain, atol=1e-6)  # and not for ever


@pytest.mark.parametrize("dora", [False, True])
def test_loftq_makes_up_for_a_part_of_what_is_lost(dora: bool, tiny_model: Path) -> None:
    uninterrupted = load_policy(tiny_model).state_dict()
    near = dict(merged_weights(wrapped(tiny_model, QloraTuning(rank=16, init="loftq", dora=dora))))
    distant = dict(merged_weights(wrapped(tiny_model, QloraTuning(rank=16))))
    for name in ("model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.o_proj.weight"):
        lost = (distant[name] - uninterrupted[name]).norm()
        left = (near[name] - uninterrupted[name]).norm()
        singular = torch.linalg.svdvals(distant[name] - uninterrupted[name])
        assert left == pytest.approx(float(singular[16:].norm()), rel=1e-3)  # the best that rank 16 can do
        assert left < 0.85 * lost


def test_second_tree_of_the_same_tensors_keeps_its_values(tiny_model: Path) -> None:
    """What PPO does for its critic: the copy is quantized or shared, the first model stays."""
    model = load_policy(tiny_model)
    before = logits(model)
    twin = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    quantize(twin, QloraTuning())
    assert logits(model).equal(before) and not logits(twin).equal(before)
    shared = copy.deepcopy(twin, {id(p): p for p in twin.parameters()})
    assert shared.model.layers[0].mlp.up_proj.weight is twin.model.layers[0].mlp.up_proj.weight
    assert logits(shared).equal(logits(twin))


def test_without_bitsandbytes_one_sentence_says_so(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    refused(lambda: SourceFileLoader("afresh", quantized.__file__).load_module())


def test_a_model_without_linear_layers_is_refused(refused: Refused) -> None:
    config = AutoConfig.for_model("gpt2", vocab_size=50, n_positions=16, n_embd=32, n_layer=1, n_head=2)
    refused(lambda: quantize(AutoModelForCausalLM.from_config(config), QloraTuning()))
