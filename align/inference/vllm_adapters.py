"""Stored adapters inside a vLLM model of this process: what no plain checkpoint can hold, computed by hooks.

vLLM names a layer's parts as transformers does, but queries, keys and values come from one matrix, ``qkv_proj``. The
hooks do here what ``align.models.tuning`` does there, on (N, hidden) tokens without a batch. They need the eager
model: a compiled one was traced without them. A prefix is safe with vLLM's caches, because it stands in the keys and
values of real places of the sequence. Left out: servers, whose process is not ours, and tensor parallelism.
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


def why_not_here(model_dir: Path, config: EngineConfig, server: bool = False) -> str | None:
    """Why vLLM, in this process or as a ``server``, cannot run the checkpoint for its stored adapter; None where it
    can, or where there is no adapter."""
    if not is_stored(model_dir):
        return None
    carried = f"the checkpoint carries an adapter of tuning {stored_tuning(model_dir).label}"
    kind = str(json.loads((model_dir / "config.json").read_text(encoding="utf-8")).get("model_type"))
    if server:
        return f"{carried}, which a vLLM server has no place for"
    if config.compile:
        return f"{carried}, which a compiled vLLM model has no place for (runtime.engine.compile)"
    if kind not in KINDS:
        return f"{carried}, which vLLM's {kind} models have no place for"
    return None


class Adapter:
    """The adapter of a checkpoint in the live model of vLLM."""

    def __init__(self, model: Any, model_dir: Path, dtype: torch.dtype) -> None:
        """Put the hooks in place; ``AttributeError`` where the model lacks the parts that ``KINDS`` promise."""
        described = json.loads((model_dir / FOLDER / DESCRIPTION).read_text(encoding="utf-8"))
        self.tuning, self.first = stored_tuning(model_dir), described["first_token"]
        self.weights: dict[str, torch.Tensor] = {}
        self.dtype, self.device = dtype, next(model.parameters()).device
        self.places = torch.empty(0, dtype=torch.long)
        self.take(adapter_weights(model_dir))
        trunk = model.model
        self.handles = []
        if isinstance(self.tuning, PrefixTuning):
            self.handles.append(trunk.embed_tokens.register_forward_hook(self._see))
        for number, layer in enumerate(trunk.layers):
            self._put(layer, f"model.layers.{number}")

    def take(self, weights: dict[str, torch.Tensor]) -> None:
        """Use these weights from now on."""
        for name, tensor in weights.items():
            self.weights[name] = tensor.detach().to(self.device, self.dtype, copy=True)

    def remove(self) -> None:
        """Leave the model as it was."""
        for handle in self.handles:
            handle.remove()

    def _put(self, layer: Any, name: str) -> None:
        if isinstance(self.tuning, PrefixTuning):
            hook = _Hook(self._replace, name, layer.self_attn)
            self.handles.append(layer.self_attn.qkv_proj.register_forward_hook(hook))
            return
        assert isinstance(self.tuning, AdaptersTuning)
        if self.tuning.kind == "llama_adapter":
            if f"{name}.self_attn.llama_adapter.gate" in self.weights:
                hook = _Hook(self._attend, name)
                self.handles.append(layer.self_attn.register_forward_hook(hook, with_kwargs=True))
            return
        for part in self.tuning.after:
            module = layer.self_attn if part == "attention" else layer.mlp
            where = f"{name}.{'self_attn' if part == 'attention' else 'mlp'}.bottleneck"
            self.handles.append(module.register_forward_hook(_Hook(self._behind, where)))

    def _behind(self, where: str, module: Any, inputs: Any, outputs: torch.Tensor) -> torch.Tensor:
        w = self.weights
        inner = F.gelu(F.linear(outputs, w[f"{where}.down"], w[f"{where}.down_bias"]))
        return outputs + F.linear(inner, w[f"{where}.up"], w[f"{where}.up_bias"])

    def _see(self, embedding: Any, inputs: tuple[torch.Tensor, ...], outputs: torch.Tensor) -> None:
        assert isinstance(self.tuning, PrefixTuning)
        numbers = inputs[0] - self.first  # (N,)
        self.places = torch.where((numbers >= 0) & (numbers < self.tuning.tokens), numbers, -1)

    def _replace(self, name: str, attention: Any, module: Any, inputs: Any, outputs: Any) -> Any:
        """Keys and values of the virtual tokens in (N, queries + keys + values)."""
        rows = [self.weights[f"{name}.self_attn.{matrix}.prefix.rows"] for matrix in ("k_proj", "v_proj")]
        learned = torch.cat(rows, dim=-1)[self.places.clamp(min=0)]  # (N, keys + values)
        queries, own = outputs[0].split([attention.q_size, 2 * attention.kv_size], dim=-1)
        own = torch.where((self.places >= 0)[:, None], learned, own)
        return torch.cat([queries, own], dim=-1), *outputs[1:]

    def _attend(self, name: str, attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> Any:
        """What ``align.models.tuning.llama_adapter`` adds, for (N, hidden)."""
        positions = kwargs["positions"] if "positions" in kwargs else args[0]
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[1]
        prompt, gate = (self.weights[f"{name}.self_attn.llama_adapter.{part}"] for part in ("prompt", "gate"))
        size, sizes = attention.head_dim, [attention.q_size, attention.kv_size, attention.kv_size]
        own, keys, _ = attention.qkv_proj(hidden)[0].split(sizes, dim=-1)
        own, _ = attention.rotary_emb(positions, own.contiguous(), keys.contiguous())
        _, keys, values = attention.qkv_proj(prompt[0])[0].split(sizes, dim=-1)
        own, keys, values = (part.unflatten(-1, (-1, size)).transpose(0, 1) for part in (own, keys, values))
        times = own.shape[0] // keys.shape[0]
        keys, values = (part.repeat_interleave(times, dim=0) for part in (keys, values))  # (heads, tokens, D)
        scores = (own @ keys.transpose(-1, -2)).float() * size**-0.5  # (heads, N, tokens)
        weights = (gate.float() * torch.softmax(scores, dim=-1)).to(values.dtype)
        added, _ = attention.o_proj((weights @ values).transpose(0, 1).flatten(1))
        return outputs + added


class _Hook:
    """A method of :class:`Adapter` with its first arguments filled in."""

    def __init__(self, method: Any, *given: Any) -> None:
        self.method, self.given = method, given

    def __call__(self, *args: Any) -> Any:
        return self.method(*self.given, *args)
