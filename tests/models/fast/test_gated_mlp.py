"""Gated MLPs that write over their gate: the numbers of transformers' own, and gradients as before."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, GemmaConfig, LlamaConfig, Phi3Config, Qwen3Config

from align.models.fast.gated_mlp import lean_mlps

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


@pytest.mark.parametrize("kind", [LlamaConfig, Qwen3Config])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_numbers_with_two_wide_tensors_instead_of_four(kind, dtype):
    plain, lean = (model.to(dtype) for model in make_pair(kind))
    assert lean_mlps(lean) == 2
    assert lean_mlps(lean) == 0  # once is enough
    assert [type(module).__name__ for module in lean.modules()] == [type(module).__name__ for module in plain.modules()]
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


def test_another_activation_and_an_mlp_written_otherwise_are_left_alone():
    plain, lean = make_pair(GemmaConfig)
    lean_mlps(lean)
    ids = torch.randint(0, 50, (2, 9))
    with torch.inference_mode():
        assert torch.equal(lean(ids).logits, plain(ids).logits)
    other, _ = make_pair(Phi3Config, pad_token_id=0)  # gate and up are one matrix
    assert lean_mlps(other) == 0
