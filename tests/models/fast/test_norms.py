"""RMS norms that keep little: the same numbers and gradients as transformers' own."""

import copy

import pytest
import torch
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from align.models.fast.norms import _RmsNorm, lean_norms


def test_value_and_gradients_by_hand():
    x = torch.tensor([[3.0, 4.0]], requires_grad=True)
    weight = torch.tensor([1.0, 2.0], requires_grad=True)
    y = _RmsNorm.apply(x, weight, 0.0)
    rms = 12.5**0.5  # mean of 9 and 16
    assert y.tolist() == [[pytest.approx(3 / rms), pytest.approx(8 / rms)]]
    y.sum().backward()
    assert weight.grad.tolist() == [pytest.approx(3 / rms), pytest.approx(4 / rms)]
    # unit u = (3, 4) / rms, g = weight: (g - u (g.u) / 2) / rms, with g.u = 11 / rms
    expected = [(1 - 3 * 11 / 12.5 / 2) / rms, (2 - 4 * 11 / 12.5 / 2) / rms]
    assert x.grad.tolist() == [[pytest.approx(v, abs=1e-6) for v in expected]]
    assert x.tolist() == [[3.0, 4.0]]  # neither pass writes into what it was given


def test_gradients_are_those_of_differences():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, dtype=torch.float32, requires_grad=True)
    weight = torch.randn(5, requires_grad=True)
    norm = LlamaRMSNorm(5, eps=1e-3)
    norm.weight.data.copy_(weight.data)
    reference_input = x.detach().clone().requires_grad_()
    factor = torch.randn(2, 3, 5)
    (_RmsNorm.apply(x, weight, 1e-3) * factor).sum().backward()
    (norm(reference_input) * factor).sum().backward()
    assert torch.allclose(x.grad, reference_input.grad, atol=1e-6)
    assert torch.allclose(weight.grad, norm.weight.grad, atol=1e-5)


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Qwen2RMSNorm])
def test_under_autocast_it_is_the_norm_of_rounded_input_and_else_the_old_one(kind):
    torch.manual_seed(0)
    norm, x = kind(8), torch.randn(4, 8)
    norm.weight.data.normal_()
    plain = copy.deepcopy(norm)
    assert lean_norms(torch.nn.ModuleList([norm])) == 1
    assert torch.equal(norm(x), plain(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = norm(x)
    assert low.dtype == torch.bfloat16
    assert torch.allclose(low.float(), plain(x.bfloat16().float()), rtol=2**-7)
    assert copy.deepcopy(norm).state_dict().keys() == plain.state_dict().keys()


def test_a_norm_written_otherwise_is_left_alone():
    norm = GemmaRMSNorm(8)  # scales by 1 + weight
    assert lean_norms(torch.nn.ModuleList([norm])) == 0
    assert type(norm) is GemmaRMSNorm
