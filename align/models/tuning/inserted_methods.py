"""Methods that insert modules: bottleneck adapters, LLaMA-Adapter, and prefix tuning.

Parallel (arXiv 2110.04366): a narrow gated MLP next to the layer's own, with the same activation. Their sum is one
gated MLP that is wider by the bottleneck's size, so it is saved as a plain checkpoint with a larger
``intermediate_size``. Sequential (arXiv 1902.00751, 2005.00052): ``y + W_up gelu(W_down y)`` on the output y of
attention or MLP, before the residual sum. No plain checkpoint can hold that, so it is stored next to one. Both start as
the identity.

Each such layer returns ``output + gate * W_o softmax(q k^T / sqrt(d)) v`` with k and v made from the learned tokens by
the layer's own matrices, and q the text's rotated queries (arXiv 2303.16199, section 3.2; one gate per layer, as in
peft). Excluded: the visual tokens of that paper, and models that normalize their queries or rotate only some of them.

Every row begins with virtual tokens (``virtual_tokens``). At their positions each layer's key and value matrices return
learned rows, whatever the layer below computed. Caches, padding and ragged rows therefore work unchanged, and the real
tokens see what they see with peft's prefix; peft does not rotate these keys, here they are rotated by their positions,
which training absorbs. Excluded: the network that Li and Liang train instead; starting from the keys and values of real
tokens makes it unnecessary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from align.config.tuning import AdaptersTuning, PrefixTuning
from align.errors import UserError
from align.models.compute.precision import float32_products
from align.models.tuning.inserted import (
    GATED,
    Insertion,
    attentions,
    decoder_layers,
    gated_mlps,
    train_insertions_only,
)
from align.models.tuning.virtual_tokens import NAME as TOKENS
from align.models.tuning.virtual_tokens import Tokens, add_embedding_rows, first_ids, insert_tokens, new_tokens

BOTTLENECK = "bottleneck"


class Parallel(Insertion):
    """``W_down (act(W_gate x) * W_up x)``. Its matrices are bare parameters, which no other method adapts."""

    def __init__(self, hidden: int, size: int) -> None:
        super().__init__()
        self.gate, self.up = (nn.Parameter(torch.empty(size, hidden)) for _ in range(2))
        self.down = nn.Parameter(torch.zeros(hidden, size))
        for matrix in (self.gate, self.up):
            nn.init.normal_(matrix, std=hidden**-0.5)

    def forward(self, inputs: torch.Tensor, activation: Any) -> torch.Tensor:
        """(B, T, H) -> (B, T, H)."""
        return F.linear(activation(F.linear(inputs, self.gate)) * F.linear(inputs, self.up), self.down)


class Sequential(Insertion):
    """``y + W_up gelu(W_down y + b) + c``."""

    def __init__(self, hidden: int, size: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(size, hidden))
        self.down_bias = nn.Parameter(torch.zeros(size))
        self.up = nn.Parameter(torch.zeros(hidden, size))
        self.up_bias = nn.Parameter(torch.zeros(hidden))
        nn.init.normal_(self.down, std=hidden**-0.5)

    def forward(self, outputs: torch.Tensor) -> torch.Tensor:
        """(B, T, H) -> (B, T, H)."""
        inner = F.gelu(F.linear(outputs, self.down, self.down_bias))
        return outputs + F.linear(inner, self.up, self.up_bias)


def insert_adapters(model: PreTrainedModel, tuning: AdaptersTuning) -> None:
    """Insert the modules of ``tuning``, initialized from torch's global generator."""
    if tuning.kind == "llama_adapter":
        _insert_llama_adapter(model, tuning)
        return
    hidden = model.config.get_text_config().hidden_size
    method = "adapters"
    if tuning.position == "parallel":
        for mlp in gated_mlps(model, method):
            _insert_module(mlp, Parallel(hidden, tuning.size), _add_parallel)
        return
    for layer in decoder_layers(model, method):
        for part in tuning.after:
            _insert_module(
                layer.self_attn if part == "attention" else layer.mlp,
                Sequential(hidden, tuning.size),
                _apply_sequential,
            )


def _insert_module(module: Any, bottleneck: Insertion, hook: Any) -> None:
    weight = next(module.parameters())
    module.add_module(BOTTLENECK, bottleneck.to(weight.device, weight.dtype if weight.is_floating_point() else None))
    module.register_forward_hook(hook)


def _add_parallel(mlp: Any, inputs: tuple[torch.Tensor, ...], outputs: torch.Tensor) -> torch.Tensor:
    return outputs + mlp.bottleneck(inputs[0], mlp.act_fn) if mlp.bottleneck.enabled else outputs


def _apply_sequential(module: Any, inputs: Any, outputs: Any) -> Any:
    if not module.bottleneck.enabled:
        return outputs
    if isinstance(outputs, tuple):  # attention returns its weights too
        return module.bottleneck(outputs[0]), *outputs[1:]
    return module.bottleneck(outputs)


def is_parallel(model: nn.Module) -> bool:
    """Return True for a model with bottlenecks that can be merged into its MLPs."""
    return any(isinstance(module, Parallel) for module in model.modules())


def merged_width(model: PreTrainedModel) -> int:
    """Return the width of each MLP with its parallel bottleneck merged."""
    size = next(module.gate.shape[0] for module in model.modules() if isinstance(module, Parallel))
    return int(model.config.get_text_config().intermediate_size) + size


def merge_into_mlps(model: nn.Module, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return ``weights`` of ``model`` with each parallel bottleneck merged into its MLP.

    ``sum_i down_i act(gate_i x) up_i x`` runs over the features of both: gate and up, shape (inner, hidden), get more
    rows, down (hidden, inner) more columns. The bottleneck has no biases, so the biases of its rows are zero.
    """
    merged = dict(weights)
    for name, module in list(model.named_modules()):
        if not isinstance(module, Parallel):
            continue
        mlp, _, _ = name.rpartition(".")
        gate, up, down = (f"{mlp}.{matrix}.weight" for matrix in GATED)
        # Gate and up get the bottleneck's rows at the end, down its columns.
        for matrix, addition, dim in ((gate, module.gate, 0), (up, module.up, 0), (down, module.down, 1)):
            merged[matrix] = torch.cat([merged[matrix], addition.detach().to(merged[matrix].dtype)], dim=dim)
            bias = matrix.removesuffix("weight") + "bias"
            if dim == 0 and bias in merged:
                merged[bias] = torch.cat([merged[bias], merged[bias].new_zeros(len(addition))])
        for key in module.state_dict():
            merged.pop(f"{name}.{key}", None)
    return merged


LLAMA_ADAPTER = "llama_adapter"
KINDS = ("llama", "mistral", "qwen2")
"""Model types whose queries are only a projection and a rotation."""


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


def _insert_llama_adapter(model: PreTrainedModel, tuning: AdaptersTuning) -> None:
    """Insert the tokens into the last layers."""
    if model.config.model_type not in KINDS:
        raise UserError(
            f"tuning.kind: llama_adapter supports {', '.join(KINDS)}, not {model.config.model_type}; use bottleneck."
        )
    attention_modules = attentions(model, "adapters")
    count = tuning.layers if tuning.layers is not None else max(1, len(attention_modules) - 2)
    if count > len(attention_modules):
        raise UserError(f"tuning.layers: {count} is more than the {len(attention_modules)} layers that this model has.")
    # The adapter's part passes the output matrix separately, which would add a bias a second time.
    if any(getattr(module.o_proj, "bias", None) is not None for module in attention_modules):
        raise UserError("tuning.kind: llama_adapter needs attention whose output has no bias. Use kind: bottleneck.")
    for attention in attention_modules[-count:]:
        weight = attention.o_proj.weight
        adapter = Gated(tuning.tokens, model.config.get_text_config().hidden_size)
        attention.add_module(LLAMA_ADAPTER, adapter.to(weight.device))
        attention.register_forward_hook(_add, with_kwargs=True)


def _add(attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> Any:
    adapter = attention.llama_adapter
    if not adapter.enabled:
        return outputs
    hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    return outputs[0] + adapter(attention, hidden, kwargs["position_embeddings"]), *outputs[1:]


PREFIX = "prefix"
MATRICES = ("k_proj", "v_proj")


class Rows(Insertion):
    """The learned output of one key or value matrix at the virtual tokens, (tokens, width)."""

    def __init__(self, tokens: Tokens, rows: torch.Tensor) -> None:
        super().__init__()
        self.rows = nn.Parameter(rows.detach().clone().float())
        self.tokens = [tokens]  # in a list, so it does not become a submodule

    def forward(self, outputs: torch.Tensor) -> torch.Tensor:
        """(B, T, width) -> (B, T, width) with the learned rows at the virtual tokens."""
        places = self.tokens[0].places  # (B, T)
        rows = self.rows[places.clamp(min=0)].to(outputs.dtype)
        return torch.where((places >= 0)[..., None], rows, outputs)


def wrap(model: PreTrainedModel, tuning: PrefixTuning, seed: int, tokenizer: Any) -> Any:
    """Return ``model`` with a trained prefix that starts as the keys and values of real tokens."""
    ids = new_tokens(tokenizer, tuning)
    if not hasattr(model.get_input_embeddings(), TOKENS):
        add_embedding_rows(model, ids)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        start = first_ids(tokenizer, tuning.text, len(ids))
    # Start from the keys and values that the frozen model computes for real tokens.
    insert_prefix(model, ids[0], _keys_and_values(model, start))
    return train_insertions_only(model)


def insert_prefix(model: PreTrainedModel, first: int, rows: list[dict[str, torch.Tensor]]) -> None:
    """Insert ``rows[layer][matrix]``, shape (tokens, width), into every layer; ``first`` is the first token's id."""
    tokens = Tokens(first, len(rows[0][MATRICES[0]]))
    insert_tokens(model, tokens)
    for attention, layer_rows in zip(attentions(model, "prefix"), rows, strict=True):
        for name in MATRICES:
            matrix = getattr(attention, name)
            matrix.add_module(PREFIX, Rows(tokens, layer_rows[name]).to(matrix.weight.device))
            matrix.register_forward_hook(_replace)


def widths(model: PreTrainedModel) -> list[dict[str, int]]:
    """Return the features of each layer's keys and values."""
    modules = attentions(model, "prefix")
    return [{name: getattr(attention, name).out_features for name in MATRICES} for attention in modules]


def _replace(matrix: Any, inputs: Any, outputs: torch.Tensor) -> torch.Tensor:
    replaced: torch.Tensor = matrix.prefix(outputs) if matrix.prefix.enabled else outputs
    return replaced


@torch.no_grad()
def _keys_and_values(model: Any, ids: list[int]) -> list[dict[str, torch.Tensor]]:
    """Return the outputs of the key and value matrices for a prompt of these tokens, (tokens, width) each."""
    rows: list[dict[str, torch.Tensor]] = [{} for _ in attentions(model, "prefix")]
    hooks = []
    for layer_rows, attention in zip(rows, attentions(model, "prefix"), strict=True):
        for name in MATRICES:
            # The defaults bind this layer and matrix. A closure would read the loop's last ones.
            def _store(_: Any, __: Any, outputs: torch.Tensor, layer_rows: Any = layer_rows, name: str = name) -> None:
                layer_rows[name] = outputs[0].float()

            hooks.append(getattr(attention, name).register_forward_hook(_store))
    try:
        device = model.get_input_embeddings().weight.device
        with float32_products(model):
            getattr(model, model.base_model_prefix)(input_ids=torch.tensor([ids], device=device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return rows
