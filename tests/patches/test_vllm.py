"""Patches of vLLM refuse versions in which their names have changed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from align.errors import UserError
from align.patches import vllm as patches

CPU_ATTENTION = "vllm.v1.attention.backends.cpu_attn"
TOP_K_TOP_P = "vllm.v1.sample.ops.topk_topp_sampler"


class Decoder(torch.nn.Module):
    """A class as transformers has them."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return input_ids


def pick(logprobs: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    return logprobs.argmax(-1)


def runner() -> Any:
    return SimpleNamespace(sampler=SimpleNamespace(topk_topp_sampler=SimpleNamespace(forward=print)))


@pytest.fixture(autouse=True)
def _require_vllm() -> None:
    pytest.importorskip("vllm")


def test_changed_attention_kernel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{CPU_ATTENTION}._get_attn_isa", lambda dtype, size: "vec")
    with pytest.raises(UserError, match=r"^vllm\S* \S+ .*_get_attn_isa has the parameters \(dtype, size\)"):
        patches.attention_kernel(torch.float32, 16, 64)


def test_changed_block_sizes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"{CPU_ATTENTION}.CPUAttentionBackend.get_supported_kernel_block_sizes"
    monkeypatch.setattr(name, staticmethod(lambda head_size: [16]))
    with pytest.raises(UserError, match="get_supported_kernel_block_sizes has the parameters"):
        patches.allow_blocks_of_16()


def test_blocks_of_16_are_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, MultipleOf

    original = staticmethod(CPUAttentionBackend.get_supported_kernel_block_sizes)
    monkeypatch.setattr(CPUAttentionBackend, "get_supported_kernel_block_sizes", original)
    patches.allow_blocks_of_16()
    (size,) = CPUAttentionBackend.get_supported_kernel_block_sizes()
    assert isinstance(size, MultipleOf)
    assert size.base == 16


@pytest.mark.parametrize(
    ("name", "replacement"),
    [
        (f"{TOP_K_TOP_P}.TopKTopPSampler.forward_native", lambda self, logits: logits),
        (f"{TOP_K_TOP_P}.apply_top_k_top_p", lambda logits: logits),
    ],
)
def test_changed_sampler_is_refused(name: str, replacement: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(name, replacement)
    with pytest.raises(UserError, match="has the parameters"):
        patches.draw_once_per_row(runner(), pick)


def test_runner_without_sampler_is_refused() -> None:
    with pytest.raises(UserError, match=r"has no sampler\.topk_topp_sampler"):
        patches.draw_once_per_row(SimpleNamespace(), pick)


FUSED = "vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method.UnquantizedFusedMoEMethod"
ROTARY = "vllm.model_executor.layers.rotary_embedding.base.RotaryEmbedding"


def test_changed_packing_of_experts_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{FUSED}._setup_kernel", lambda self, layer: None)
    with pytest.raises(UserError, match="_setup_kernel has the parameters"), patches.repack_experts(torch.nn.ReLU()):
        pass


def test_layer_that_is_not_reloaded_keeps_its_kernel() -> None:
    from vllm.model_executor.layers.fused_moe import unquantized_fused_moe_method as module

    model = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.ReLU())
    for layer, kernel in zip(model, ("first", "second"), strict=True):
        method = object.__new__(module.UnquantizedFusedMoEMethod)
        torch.nn.Module.__init__(method)
        method.moe_kernel = kernel
        layer.quant_method = method
    with patches.repack_experts(model):
        assert [layer.quant_method.moe_kernel for layer in model] == [None, None]
        model[0].quant_method.moe_kernel = "new"
    assert [layer.quant_method.moe_kernel for layer in model] == ["new", "second"]


def test_reloaded_convolutions_reach_the_mixer() -> None:
    from vllm.model_executor.layers.mamba.mamba_mixer2 import MambaMixer2

    layers = []
    for packed in (False, True):
        layer = object.__new__(MambaMixer2)
        torch.nn.Module.__init__(layer)
        layer.register_buffer("conv_weights", torch.zeros(6, 4), persistent=False)
        layer.conv1d = torch.nn.Module()
        layer.conv1d.weight = torch.nn.Parameter(torch.ones(6, 4) if packed else torch.full((6, 1, 4), 2.0))
        if packed:
            layer.conv1d._cpu_unpacked_conv_weight = torch.full((6, 4), 3.0)
        layers.append(layer)
    with patches.reload_on_cpu(torch.nn.Sequential(*layers)), torch.no_grad():
        pass
    assert [layer.conv_weights.unique().tolist() for layer in layers] == [[2.0], [3.0]]


def test_changed_rotary_embedding_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{ROTARY}.forward_cpu", lambda self, query, key: None)
    with pytest.raises(UserError, match="forward_cpu has the parameters"):
        patches.flatten_rotary(torch.nn.ReLU())


def test_transformers_classes_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.models.transformers.base import Base

    monkeypatch.setattr(Base, "_decorate_cls_for_torch_compile", Base._decorate_cls_for_torch_compile)
    patches.keep_transformers_classes()
    before = dict(vars(Decoder))
    Base._decorate_cls_for_torch_compile(object(), Decoder, {}, lambda config: True, is_encoder=False)
    assert dict(vars(Decoder)) == before


def test_changed_decoration_of_classes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    path = "vllm.model_executor.models.transformers.base.Base._decorate_cls_for_torch_compile"
    monkeypatch.setattr(path, lambda self, cls: cls)
    with pytest.raises(UserError, match=r"_decorate_cls_for_torch_compile has the parameters \(self, cls\)"):
        patches.keep_transformers_classes()


def test_thread_count_is_restored() -> None:
    original = torch.set_num_threads
    threads = torch.get_num_threads()
    with patches.keep_thread_count():
        torch.set_num_threads = print  # type: ignore[assignment]
    assert torch.set_num_threads is original
    assert torch.get_num_threads() == threads
