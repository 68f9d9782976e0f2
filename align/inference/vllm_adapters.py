"""Stored adapters inside a vLLM model of this process, as forward hooks: adapters that no plain checkpoint can hold.

vLLM names a layer's modules as transformers does, but queries, keys and values come from one matrix, ``qkv_proj``. The
hooks compute what ``align.models.tuning`` computes in training, on (N, hidden) tokens without a batch dimension. They
need the eager model: a compiled one was traced without them. A prefix is safe with vLLM's caches, because it replaces
the keys and values of real positions. Leaves out servers, whose process is not ours, and tensor parallelism.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from align.config.runtime import EngineConfig
from align.config.tuning import AdaptersTuning, PrefixTuning
from align.inference.weights import adapter_weights
from align.models.tuning.stored import DESCRIPTION, FOLDER, is_stored, stored_tuning

KINDS = ("llama", "mistral", "qwen2", "qwen3")
"""Model types whose vLLM model has ``self_attn.qkv_proj`` and ``mlp``, each called as a module."""


def why_unsupported(model_dir: Path, config: EngineConfig, server: bool = False) -> str | None:
    """Say why vLLM cannot run the checkpoint's stored adapter, in this process or as a ``server``.

    Returns None where it can, and where there is no adapter.
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

    def __init__(self, model: Any, model_dir: Path, dtype: torch.dtype) -> None:
        """Register the hooks. Raises ``AttributeError`` where the model lacks the modules that ``KINDS`` have."""
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
            hook = _Hook(self._insert_prefix, name, layer.self_attn)
            self.handles.append(layer.self_attn.qkv_proj.register_forward_hook(hook))
            return
        assert isinstance(self.tuning, AdaptersTuning)
        if self.tuning.kind == "llama_adapter":
            if f"{name}.self_attn.llama_adapter.gate" in self.weights:
                hook = _Hook(self._add_llama_adapter, name)
                self.handles.append(layer.self_attn.register_forward_hook(hook, with_kwargs=True))
            return
        for part in self.tuning.after:
            module = layer.self_attn if part == "attention" else layer.mlp
            prefix = f"{name}.{'self_attn' if part == 'attention' else 'mlp'}.bottleneck"
            self.handles.append(module.register_forward_hook(_Hook(self._add_bottleneck, prefix)))

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
        """Return ``outputs`` (N, hidden) plus what ``align.models.tuning.llama_adapter`` adds."""
        positions = kwargs["positions"] if "positions" in kwargs else args[0]
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[1]
        prompt = self.weights[f"{name}.self_attn.llama_adapter.prompt"]
        gate = self.weights[f"{name}.self_attn.llama_adapter.gate"]
        size, sizes = attention.head_dim, [attention.q_size, attention.kv_size, attention.kv_size]
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


class _Hook:
    """A method of :class:`Adapter` with its first arguments filled in."""

    def __init__(self, method: Any, *first: Any) -> None:
        self.method, self.first = method, first

    def __call__(self, *args: Any) -> Any:
        return self.method(*self.first, *args)
