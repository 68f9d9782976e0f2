"""Rotations in fewer operations: the numbers and gradients of transformers' own."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Phi3Config, Qwen3Config
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from align.models.fast.rotary import _Rotate, lean_rotary

SMALL = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def angles(tokens, width):
    """Cosines and sines as a model's own: both halves are alike."""
    positions = torch.outer(torch.arange(tokens), 0.5 ** torch.arange(width // 2)).repeat(1, 2)
    return positions.cos()[None], positions.sin()[None]


def test_a_quarter_turn_by_hand():
    """(a, b) becomes (a cos - b sin, b cos + a sin): a quarter turn takes (3, 5) to (-5, 3), and a gradient back."""
    x = torch.tensor([[[[3.0, 5.0]]]], requires_grad=True)
    cos, sin = torch.zeros(1, 1, 1, 2), torch.ones(1, 1, 1, 2)
    rotated = _Rotate.apply(x, cos, sin)
    assert rotated.tolist() == [[[[-5.0, 3.0]]]]
    (rotated * torch.tensor([2.0, 7.0])).sum().backward()
    assert x.grad.tolist() == [[[[7.0, -2.0]]]]


def test_numbers_and_gradients_are_those_of_the_five_operations():
    """The halves of the angles differ, as no model has them, so that none of them can be taken for another."""
    torch.manual_seed(0)
    x, factor = torch.randn(2, 2, 3, 5, 8, dtype=torch.float64)
    x.requires_grad_()
    cos, sin = torch.randn(2, 2, 5, 8, dtype=torch.float64)
    expected, _ = apply_rotary_pos_emb(x, x, cos, sin)
    rotated = _Rotate.apply(x, cos[:, None], sin[:, None])
    assert torch.allclose(rotated, expected, atol=1e-12)
    (wanted,) = torch.autograd.grad((expected * factor).sum(), x)
    (gradient,) = torch.autograd.grad((rotated * factor).sum(), x)
    assert torch.allclose(gradient, wanted, atol=1e-12)


def test_memory_keeps_its_order():
    """Queries come as (1, T, h, D) memory, of which attention then takes rows without a copy."""
    x = torch.randn(1, 5, 3, 8).transpose(1, 2)
    cos, sin = angles(5, 8)
    assert _Rotate.apply(x, cos[None], sin[None]).stride() == x.stride()


@pytest.mark.parametrize("kind", [LlamaConfig, MistralConfig, Qwen3Config])
def test_in_float32_nothing_changes_and_in_bfloat16_it_is_nearer_to_float32(kind):
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(kind(**SMALL, head_dim=8))
    lean = copy.deepcopy(plain)
    assert lean_rotary(lean) == 2
    assert lean_rotary(lean) == 0  # once is enough
    assert [type(module).__name__ for module in lean.modules()] == [type(module).__name__ for module in plain.modules()]
    ids = torch.randint(0, 50, (2, 9))
    assert torch.equal(lean(ids).logits, plain(ids).logits)

    exact = plain(ids).logits
    plain, lean = plain.bfloat16(), lean.bfloat16()
    errors = [(model(ids).logits.float() - exact).norm() for model in (plain, lean)]
    assert 0 < errors[1] < 1.1 * errors[0]
    lean(ids).logits.float().logsumexp(-1).sum().backward()
    plain(ids).logits.float().logsumexp(-1).sum().backward()
    for (name, parameter), expected in zip(lean.named_parameters(), plain.parameters(), strict=True):
        assert torch.cosine_similarity(parameter.grad.flatten(), expected.grad.flatten(), dim=0) > 0.99, name


def test_a_rotation_written_otherwise_is_left_alone():
    model = AutoModelForCausalLM.from_config(Phi3Config(**SMALL, pad_token_id=0))  # it rotates a part of each head
    before = type(model.model.layers[0].self_attn)
    assert lean_rotary(model) == 0
    assert type(model.model.layers[0].self_attn) is before


def test_a_function_that_took_the_place_of_transformers_own_is_left_alone(monkeypatch):
    """Liger puts its kernels into the modules of transformers' models."""

    def fast(q, k, cos, sin, unsqueeze_dim=1):
        return q, k

    monkeypatch.setattr("transformers.models.llama.modeling_llama.apply_rotary_pos_emb", fast)
    assert lean_rotary(AutoModelForCausalLM.from_config(LlamaConfig(**SMALL))) == 0
