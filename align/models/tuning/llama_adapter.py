"""LLaMA-Adapter: learned tokens that the upper layers attend to in addition to the text, through a gate from 0.

Each such layer returns ``output + gate * W_o softmax(q k^T / sqrt(d)) v`` with k and v made from the learned tokens by
the layer's own matrices, and q the text's rotated queries (arXiv 2303.16199, section 3.2; one gate per layer, as in
peft). Left out: the visual tokens of that paper, and models that normalize their queries or rotate only some of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from align.config.tuning import AdaptersTuning
from align.errors import UserError
from align.models.tuning.inserted import Insertion
from align.models.tuning.layers import attentions

NAME = "llama_adapter"
KINDS = ("llama", "mistral", "qwen2")
"""Model types whose queries are a projection and a rotation, nothing else."""


class Gated(Insertion):
    """The learned tokens of one layer, and their gate."""

    def __init__(self, tokens: int, hidden: int) -> None:
        super().__init__()
        self.prompt = nn.Parameter(torch.empty(1, tokens, hidden))
        self.gate = nn.Parameter(torch.zeros(1))
        nn.init.normal_(self.prompt)

    def forward(
        self, attention: Any, hidden: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        """(B, T, hidden) -> (B, T, hidden), to be added to the output of ``attention``."""
        size = attention.head_dim
        queries = _rotated(_heads(attention.q_proj(hidden), size), rotation)  # (B, heads, T, D)
        prompt = self.prompt.to(hidden.dtype)
        keys, values = (_heads(matrix(prompt), size) for matrix in (attention.k_proj, attention.v_proj))
        # Grouped-query attention: each key head serves several query heads.
        repeats = queries.shape[1] // keys.shape[1]
        keys, values = (part.repeat_interleave(repeats, dim=1) for part in (keys, values))  # (1, heads, N, D)
        scores = (queries @ keys.transpose(-1, -2).to(queries.dtype)).float() * size**-0.5
        # The gate scales the weights of the learned tokens after their own softmax; at 0 the layer is unchanged.
        weights = self.gate.float() * torch.softmax(scores, dim=-1)
        context = (weights.to(values.dtype) @ values).transpose(1, 2).flatten(2)
        output: torch.Tensor = attention.o_proj(context)
        return output


def _heads(flat: torch.Tensor, size: int) -> torch.Tensor:
    split: torch.Tensor = flat.unflatten(-1, (-1, size))
    return split.transpose(1, 2)


def _rotated(queries: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Apply rotary positions to (B, heads, T, D) queries in halves, as Llama does; cos and sin are (B, T, D)."""
    cos, sin = (part.unsqueeze(1) for part in rotation)
    first_half, second_half = queries.chunk(2, dim=-1)
    return queries * cos + torch.cat([-second_half, first_half], dim=-1) * sin


def insert(model: Any, tuning: AdaptersTuning) -> None:
    """Insert the tokens into the last layers, initialized from torch's global generator."""
    if model.config.model_type not in KINDS:
        raise UserError(
            f"tuning.kind: llama_adapter supports models of the kind {', '.join(KINDS)}, and this one is "
            f"{model.config.model_type}. Take kind: bottleneck."
        )
    attention_modules = attentions(model, "adapters")
    count = tuning.layers if tuning.layers is not None else max(1, len(attention_modules) - 2)
    if count > len(attention_modules):
        raise UserError(f"tuning.layers: {count} is more than the {len(attention_modules)} layers that this model has.")
    if any(getattr(module.o_proj, "bias", None) is not None for module in attention_modules):
        raise UserError("tuning.kind: llama_adapter needs attention whose output has no bias. Take kind: bottleneck.")
    for attention in attention_modules[-count:]:
        weight = attention.o_proj.weight
        adapter = Gated(tuning.tokens, model.config.get_text_config().hidden_size)
        attention.add_module(NAME, adapter.to(weight.device))
        attention.register_forward_hook(_add, with_kwargs=True)


def _add(attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> Any:
    adapter = attention.llama_adapter
    if not adapter.enabled:
        return outputs
    hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    return outputs[0] + adapter(attention, hidden, kwargs["position_embeddings"]), *outputs[1:]
