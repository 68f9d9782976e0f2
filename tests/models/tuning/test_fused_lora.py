"""LoRA as one function: peft's values and gradients, and peft's own way for all that it does not cover."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear
from torch import nn

from align.models.tuning import peft_layers as fused_lora
from align.models.tuning.peft_layers import FusedLoraLinear, fuse_lora
from tests.support.refusals import Refused


class Net(nn.Module):
    """Two matrices, of which the first has a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 20), nn.Linear(20, 6, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def make_adapted(seed: int = 0, **options: Any) -> Any:
    """A net with LoRA whose second matrices are not 0."""
    torch.manual_seed(seed)
    config = {"r": 3, "lora_alpha": 5, "target_modules": ["first", "second"]} | options
    model = get_peft_model(Net(), LoraConfig(**config))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def compute_results(model: Any, x: torch.Tensor) -> list[torch.Tensor]:
    """Output, gradient of the input, and those of the trained parameters."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    output = model(x)
    (output * torch.sin(torch.arange(output.numel())).view_as(output)).sum().backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert trained
    return [output.detach(), x.grad, *(parameter.grad.clone() for parameter in trained)]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Notes each call of the fused function."""
    noted: list[str] = []
    apply = fused_lora._LowRankSum.apply

    def note(*args: Any) -> Any:
        noted.append("fused")
        return apply(*args)

    monkeypatch.setattr(fused_lora._LowRankSum, "apply", note)
    return noted


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=3), st.integers(0, 99), st.booleans())
def test_values_and_gradients_are_pefts(shape: list[int], seed: int, rslora: bool) -> None:
    x = torch.randn(*shape, 12, generator=torch.Generator().manual_seed(seed))
    model = make_adapted(seed, use_rslora=rslora)
    expected = compute_results(model, x)
    fuse_lora(model)
    for actual, wanted in zip(compute_results(model, x), expected, strict=True):
        assert torch.allclose(actual, wanted, atol=1e-5)


def test_a_product_by_hand() -> None:
    """1 in, 1 out, rank 1: y = w x + s b a x; dx = w + s b a, da = s b x, db = s a x."""
    x, w, a, b = (torch.tensor([[value]], requires_grad=True) for value in (2.0, 3.0, 5.0, 7.0))
    y = fused_lora._LowRankSum.apply(x, w.detach(), None, a, b, 0.5)
    y.sum().backward()
    assert y.item() == 3 * 2 + 0.5 * 7 * 5 * 2
    assert (x.grad.item(), a.grad.item(), b.grad.item()) == (3 + 0.5 * 7 * 5, 0.5 * 7 * 2, 0.5 * 5 * 2)


def test_gradients_are_those_of_differences() -> None:
    torch.manual_seed(0)
    x, a, b = (torch.randn(*shape, dtype=torch.double, requires_grad=True) for shape in ((4, 5), (2, 5), (3, 2)))
    w, bias = torch.randn(3, 5, dtype=torch.double), torch.randn(3, dtype=torch.double)
    assert torch.autograd.gradcheck(lambda x, a, b: fused_lora._LowRankSum.apply(x, w, bias, a, b, 1.7), (x, a, b))


def test_fused_lora_computes_in_the_type_of_autocast(calls: list[str]) -> None:
    x, model = torch.randn(7, 12), make_adapted()
    with torch.autocast("cpu", torch.bfloat16):
        expected = compute_results(model, x)
        fuse_lora(model)
        actual = compute_results(model, x)
    assert len(calls) == 2
    assert actual[0].dtype == torch.bfloat16
    for value, wanted in zip(actual, expected, strict=True):
        assert value.dtype == wanted.dtype
        assert (value - wanted).abs().max() <= 0.03 * wanted.abs().max()


def test_a_gradient_that_nobody_asks_for_is_not_computed(calls: list[str]) -> None:
    model = make_adapted()
    fuse_lora(model)
    x = torch.randn(3, 12)  # no gradient flows out of the first matrix
    model(x).sum().backward()
    assert len(calls) == 2
    assert x.grad is None


@pytest.mark.parametrize(
    "options",
    [{"use_dora": True}, {"lora_dropout": 0.5}, {"lora_bias": True}],
    ids=lambda options: next(iter(options)),
)
def test_other_layers_take_pefts_way(options: dict[str, Any], calls: list[str]) -> None:
    model = make_adapted(**options).train()
    x = torch.randn(4, 12)
    torch.manual_seed(1)
    expected = compute_results(model, x)
    fuse_lora(model)
    torch.manual_seed(1)
    for actual, wanted in zip(compute_results(model, x), expected, strict=True):
        assert torch.equal(actual, wanted)
    assert not calls


def test_dropout_in_evaluation_and_of_0_is_none(calls: list[str]) -> None:
    model = make_adapted(lora_dropout=0.5).eval()
    fuse_lora(model)
    model(torch.randn(4, 12))
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # as in PPO
    model(torch.randn(4, 12))
    assert len(calls) == 4


@pytest.mark.parametrize("way", ["disabled", "merged", "two adapters", "hook", "trained base", "other type"])
def test_other_calls_take_pefts_way(way: str, calls: list[str]) -> None:
    model = make_adapted()
    context: Any = contextlib.nullcontext()
    x = torch.randn(4, 12)
    if way == "disabled":
        context = model.disable_adapter()
    if way == "merged":
        model.merge_adapter()
    if way == "two adapters":
        model.add_adapter("second", LoraConfig(r=2, target_modules=["first", "second"]))
        model.base_model.set_adapter(["default", "second"])
    for layer in (model.base_model.model.first, model.base_model.model.second):
        if way == "hook":
            layer.base_layer.register_forward_hook(lambda module, inputs, output: output * 2)
        if way == "trained base":
            layer.base_layer.weight.requires_grad_()
        if way == "other type":
            layer.base_layer.to(torch.bfloat16)
    x = x.bfloat16() if way == "other type" else x
    with context, torch.no_grad():
        expected = model(x)
        fuse_lora(model)
        assert torch.equal(model(x), expected)
    assert not calls


def test_a_forward_that_somebody_has_replaced_is_called(calls: list[str]) -> None:
    model = make_adapted()
    fuse_lora(model)
    base = model.base_model.model.first.base_layer
    forward = base.forward
    base.forward = lambda x: forward(x) + 1  # as accelerate does for weights that are elsewhere
    model(torch.randn(4, 12))
    assert len(calls) == 1


def test_no_rows_are_no_rows() -> None:
    model = make_adapted()
    fuse_lora(model)
    assert model(torch.randn(0, 12)).shape == (0, 6)


def test_values_that_are_swapped_do_not_reach_an_older_graph() -> None:
    model = make_adapted()
    fuse_lora(model)
    layer = model.base_model.model.first
    x = torch.randn(4, 12, requires_grad=True)
    expected = torch.autograd.grad(layer(x).sum(), x)[0]
    output = layer(x)
    for matrix in (layer.lora_A["default"], layer.lora_B["default"]):
        matrix.weight.data = torch.zeros_like(matrix.weight)
    assert torch.equal(torch.autograd.grad(output.sum(), x)[0], expected)


def test_second_derivatives_are_refused(refused: Refused, calls: list[str]) -> None:
    model = make_adapted()
    fuse_lora(model)
    x = torch.randn(4, 12, requires_grad=True)
    (gradient,) = torch.autograd.grad((model(x) ** 2).sum(), x, create_graph=True)
    refused(lambda: gradient.sum().backward())


def test_a_weight_that_is_shared_out_takes_pefts_way(calls: list[str]) -> None:
    model = make_adapted()
    fuse_lora(model)
    model.base_model.model.first.base_layer.weight.ds_id = 1  # DeepSpeed's mark: its values may be elsewhere
    model(torch.randn(4, 12))
    assert len(calls) == 1


def test_names_merging_and_unfused_classes_stay() -> None:
    model = make_adapted()
    names = list(model.state_dict())
    fuse_lora(model)
    assert list(model.state_dict()) == names
    layer = model.base_model.model.first
    assert type(layer) is FusedLoraLinear and isinstance(layer, Linear)
    x = torch.randn(3, 12)
    expected = model(x)
    assert torch.allclose(model.merge_and_unload()(x), expected, atol=1e-5)
