"""RMS norms and gated MLPs that keep little: the numbers and gradients of transformers' own."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, GemmaConfig, LlamaConfig, Phi3Config, Qwen3Config
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from align.models.fast.lean_modules import _RmsNorm, lean_mlps, lean_norms

SMALL = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
TOKENS = 7


class WideTensors(TorchDispatchMode):
    """Records operations, and the activations of the MLP's width that they return."""

    def __init__(self):
        super().__init__()
        self.operations = []
        self.kept = []  # alive, so that no address is used twice

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        self.operations.append(str(function))
        if isinstance(output, torch.Tensor) and output.numel() == TOKENS * SMALL["intermediate_size"]:
            self.kept.append(output)
        return output

    def count(self):
        """Return the number of different storages."""
        return len({tensor.untyped_storage().data_ptr() for tensor in self.kept})


def make_pair(kind, **more):
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(kind(**SMALL, **more))
    return plain, copy.deepcopy(plain)


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
def test_lean_norm_rounds_its_input_only_under_autocast(kind):
    torch.manual_seed(0)
    norm, x = kind(8), torch.randn(4, 8)
    norm.weight.data.normal_()
    plain = copy.deepcopy(norm)
    modules = torch.nn.ModuleList([norm])
    assert lean_norms(modules) == 1
    assert lean_norms(modules) == 0
    (norm,) = modules
    assert torch.equal(norm(x), plain(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = norm(x)
    assert low.dtype == torch.bfloat16
    assert torch.allclose(low.float(), plain(x.bfloat16().float()), rtol=2**-7)
    assert copy.deepcopy(norm).state_dict().keys() == plain.state_dict().keys()


def test_a_norm_written_otherwise_is_left_alone():
    norm = GemmaRMSNorm(8)  # scales by 1 + weight
    modules = torch.nn.ModuleList([norm])
    assert lean_norms(modules) == 0
    assert modules[0] is norm


@pytest.mark.parametrize("kind", [LlamaConfig, Qwen3Config])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_numbers_with_two_wide_tensors_instead_of_four(kind, dtype):
    plain, lean = (model.to(dtype) for model in make_pair(kind))
    assert lean_mlps(lean) == 2
    assert lean_mlps(lean) == 0  # once is enough
    assert list(lean.state_dict()) == list(plain.state_dict())
    ids = torch.randint(0, 50, (2, 9))
    x = torch.randn(1, TOKENS, 32, dtype=dtype)
    with torch.inference_mode():
        assert torch.equal(lean(ids).logits, plain(ids).logits)
        counts = []
        for model in (plain, lean):
            with WideTensors() as wide:
                model.model.layers[0].mlp(x)
            counts.append(wide.count())
    assert counts == [4, 2]


def test_a_pass_that_is_learned_from_is_transformers_own():
    plain, lean = make_pair(LlamaConfig)
    lean_mlps(lean)
    ids = torch.randint(0, 50, (2, 9))
    operations, gradients = [], []
    for model in (plain, lean):
        with WideTensors() as wide:
            model.model.layers[0].mlp(torch.ones(1, TOKENS, 32))
        operations.append(wide.operations)
        model(ids).logits.logsumexp(-1).sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert operations[0] == operations[1]
    assert all(map(torch.equal, *gradients))


def test_under_autocast_and_with_a_wider_up_projection():
    plain, lean = make_pair(LlamaConfig)
    lean_mlps(lean)
    x = torch.randn(1, TOKENS, 32)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(lean.model.layers[0].mlp(x), plain.model.layers[0].mlp(x))
    for model in (plain, lean):
        mlp = model.model.layers[0].mlp
        mlp.gate_proj.bfloat16()
        mlp.gate_proj.register_forward_pre_hook(lambda module, inputs: inputs[0].bfloat16())
    with torch.inference_mode():
        assert torch.equal(lean.model.layers[0].mlp(x), plain.model.layers[0].mlp(x))


def test_mlps_unlike_llamas_are_not_replaced():
    plain, lean = make_pair(GemmaConfig)
    lean_mlps(lean)
    ids = torch.randint(0, 50, (2, 9))
    with torch.inference_mode():
        assert torch.equal(lean(ids).logits, plain(ids).logits)
    other, _ = make_pair(Phi3Config, pad_token_id=0)  # gate and up are one matrix
    assert lean_mlps(other) == 0
