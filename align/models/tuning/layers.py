"""Where the parts of a decoder's layers are, for what is put between them.

Found by name, as most decoders of transformers name them. Left out: decoders that fuse these matrices or name them
otherwise (GPT-2, GPT-NeoX, Phi-3), which are refused with a sentence.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from align.errors import UserError

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
GATED = ("gate_proj", "up_proj", "down_proj")


def decoder_layers(model: Any, method: str) -> list[Any]:
    """The layers from first to last. ``UserError`` where they have no ``self_attn`` and ``mlp``."""
    trunk = getattr(model, model.base_model_prefix, model)
    layers = list(getattr(trunk, "layers", []))
    if not layers or not all(hasattr(layer, "self_attn") and hasattr(layer, "mlp") for layer in layers):
        raise _unknown(model, method, "layers of self_attn and mlp")
    return layers


def attentions(model: Any, method: str) -> list[Any]:
    """Each layer's attention, with a matrix each for queries, keys, values and output."""
    found = [layer.self_attn for layer in decoder_layers(model, method)]
    if not all(_has(module, ATTENTION) for module in found):
        raise _unknown(model, method, f"attention made of {', '.join(ATTENTION)}")
    return found


def gated_mlps(model: Any, method: str) -> list[Any]:
    """Each layer's MLP, made of ``gate_proj``, ``up_proj``, ``down_proj`` and ``act_fn``."""
    found = [layer.mlp for layer in decoder_layers(model, method)]
    if not all(_has(module, GATED) and hasattr(module, "act_fn") for module in found):
        raise _unknown(model, method, f"a gated MLP of {', '.join(GATED)}")
    return found


def _has(module: Any, names: tuple[str, ...]) -> bool:
    return all(isinstance(getattr(module, name, None), nn.Module) for name in names)


def _unknown(model: Any, method: str, expected: str) -> UserError:
    return UserError(
        f"tuning.method: {method} needs {expected}, which this {model.config.model_type} has not. Take lora, or a "
        "model of the llama, mistral, qwen2, qwen3 or smollm3 kind."
    )
