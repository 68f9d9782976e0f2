"""Find the attention and MLP modules of a decoder's layers, and the layers that peft has adapted.

Modules are found by the names that most decoders of transformers use. Left out: decoders that fuse these matrices or
use other names (GPT-2, GPT-NeoX, Phi-3), which are refused.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from align.errors import UserError

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
GATED = ("gate_proj", "up_proj", "down_proj")


def decoder_layers(model: Any, method: str) -> list[Any]:
    """Return the layers from first to last. Raises ``UserError`` where they have no ``self_attn`` and ``mlp``."""
    # The trunk itself may be passed too.
    trunk = getattr(model, model.base_model_prefix, model)
    layers = list(getattr(trunk, "layers", []))
    if not layers or not all(hasattr(layer, "self_attn") and hasattr(layer, "mlp") for layer in layers):
        raise _unsupported(model, method, "layers of self_attn and mlp")
    return layers


def attentions(model: Any, method: str) -> list[Any]:
    """Return each layer's attention, with a matrix each for queries, keys, values and output."""
    modules = [layer.self_attn for layer in decoder_layers(model, method)]
    if not all(_has(module, ATTENTION) for module in modules):
        raise _unsupported(model, method, f"attention made of {', '.join(ATTENTION)}")
    return modules


def gated_mlps(model: Any, method: str) -> list[Any]:
    """Return each layer's MLP, made of ``gate_proj``, ``up_proj``, ``down_proj`` and ``act_fn``."""
    modules = [layer.mlp for layer in decoder_layers(model, method)]
    if not all(_has(module, GATED) and hasattr(module, "act_fn") for module in modules):
        raise _unsupported(model, method, f"a gated MLP of {', '.join(GATED)}")
    return modules


def _has(module: Any, names: tuple[str, ...]) -> bool:
    return all(isinstance(getattr(module, name, None), nn.Module) for name in names)


def _unsupported(model: Any, method: str, expected: str) -> UserError:
    return UserError(
        f"tuning.method: {method} needs {expected}, which this {model.config.model_type} has not. Take lora, or a "
        "model of the llama, mistral, qwen2, qwen3 or smollm3 kind."
    )


PEFT_PREFIX = "base_model.model."


def tuner_layers(model: Any) -> dict[str, Any]:
    """Return the layers that peft wraps around the model's own, by the plain name of the wrapped module."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {
        name.removeprefix(PEFT_PREFIX): module
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
    }
