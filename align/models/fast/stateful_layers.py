"""Compute a line of rows in layers that pass a state from token to token: linear attention, convolutions, state spaces.

All other parts of a hybrid model read single tokens, or are attention, which a layout keeps within each row
(``ragged_rows``). Hooks around a stateful part give it whole rows and put the results back:

1. Gather the rows of the line, padded on the right: (1, N, H) becomes (B, T, H). A prefix that rows share is copied
   into each of them, so every row starts with an empty state. Rows of similar length form a group.
2. Compute each group.
3. Gather the result of each token from one of the rows that contain it.

A state depends on earlier tokens only, so padding and the chosen row do not change a result. transformers resets states
within a line only in CUDA kernels (``cu_seq_lens_q``, ``seq_idx``); its torch code ignores these arguments.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

MIXERS = {
    "bamba": "mamba",
    "falcon_h1": "mamba",
    "granitemoehybrid": "mamba",
    "lfm2": "conv",
    "lfm2_moe": "conv",
    "nemotron_h": "mixer",
    "olmo_hybrid": "linear_attn",
    "qwen3_5_moe_text": "linear_attn",
    "qwen3_5_text": "linear_attn",
    "qwen3_next": "linear_attn",
}
"""Type of model -> the name of the stateful part in its decoder layers. The tests compare each with single rows."""
LINEAR_ATTENTION = "linear_attention"
"""transformers' name of layers of linear attention and state spaces."""
LEAST_FILLED = 0.5
"""Length of the shortest row of a group as a share of the longest, so padding at most doubles the work."""


def carries_state(config: Any) -> bool:
    """Return True if a model has layers of linear attention, convolutions or a state space (LFM2, Mamba, Qwen3.5)."""
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None)
    if kinds:
        return any("attention" not in kind or kind.startswith("linear") for kind in kinds)
    return any(name.startswith(("mamba_", "ssm_", "state_size")) for name in vars(text))


def stateful_layers(model: PreTrainedModel) -> list[tuple[Any, Any]]:
    """Return the decoder layers with a stateful part, and this part; empty for a family that is not in ``MIXERS``."""
    name = MIXERS.get(model.config.get_text_config().model_type, "")
    # Nemotron-H calls the main part of every layer its mixer, and the layers tell their type.
    layers = [
        layer
        for layer in getattr(model.base_model, "layers", ())
        if getattr(layer, "block_type", LINEAR_ATTENTION) == LINEAR_ATTENTION
    ]
    pairs = [(layer, getattr(layer, name, None)) for layer in layers]
    return [(layer, mixer) for layer, mixer in pairs if isinstance(mixer, nn.Module)]


def enable_rows(model: PreTrainedModel) -> None:
    """Let the stateful layers of ``model`` compute lines with a layout; a second call has no effect."""
    for layer, mixer in stateful_layers(model):
        if not hasattr(mixer, "row_hooks"):
            mixer.row_hooks = _RowHooks(layer, mixer)


class _RowHooks:
    """The hooks of one layer. They do nothing in a call without a layout."""

    def __init__(self, layer: nn.Module, mixer: nn.Module) -> None:
        self._layout: dict[str, Any] | None = None
        self._line: torch.Tensor | None = None
        """States (N, H) of the line that the layer computes."""
        # The layer's arguments have the layout; some families do not pass it on to the mixer.
        layer.register_forward_pre_hook(self._note_layout, with_kwargs=True)
        mixer.register_forward_pre_hook(self._gather, with_kwargs=True)
        mixer.register_forward_hook(self._spread, with_kwargs=True)

    def _note_layout(self, layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._layout = kwargs.get("layout")

    def _gather(self, mixer: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Replace the line by the rows of the first group."""
        if self._layout is None:
            return None
        inputs = dict(zip(("hidden_states",), args, strict=False)) | kwargs
        inputs.pop("layout", None)
        self._line = inputs["hidden_states"][0]
        return (), inputs | {"hidden_states": Spread.apply(self._line, _rows_of(self._layout).places[0])}

    def _spread(self, mixer: nn.Module, args: Any, kwargs: dict[str, Any], output: torch.Tensor) -> Any:
        """Compute the other groups, and return the results (1, N, H) of the line's tokens."""
        if self._layout is None:
            return None
        rows = _rows_of(self._layout)
        line = self._line
        self._layout = self._line = None
        others = [mixer.forward(**kwargs | {"hidden_states": Spread.apply(line, part)}) for part in rows.places[1:]]
        results = torch.cat([group.flatten(0, 1) for group in (output, *others)])
        return results.index_select(0, rows.token_rows)[None]


@dataclass(frozen=True)
class _Rows:
    """The rows of a line, in groups of similar length."""

    places: list[torch.Tensor]
    """For each group, (B, T): the index in the line of each token, N on padding."""
    token_rows: torch.Tensor
    """(N,): a place of each token in the groups' rows, one after another."""


def _rows_of(layout: dict[str, Any]) -> _Rows:
    """Return the rows of a layout, computed once for all layers."""
    rows: _Rows = layout["cache"].get_or_compute(("rows",), lambda: _find_rows(layout))
    return rows


def _find_rows(layout: dict[str, Any]) -> _Rows:
    lengths, ancestors = layout["segments"]
    device = layout["slot_tokens"].device
    starts = [0, *itertools.accumulate(lengths)]
    # A row ends with a segment that no other continues, and begins with the segments that this one continues.
    continued = {segment for path in ancestors for segment in path}
    paths = [[*ancestors[last], last] for last in range(len(lengths)) if last not in continued]
    rows = [torch.cat([torch.arange(starts[i], starts[i + 1]) for i in path]) for path in paths]
    rows.sort(key=len, reverse=True)
    places: list[torch.Tensor] = []
    token_rows = torch.empty(starts[-1], dtype=torch.long)
    first = 0
    while rows:
        width = len(rows[0])
        # Rows are sorted by falling length, so the group is the first of them.
        group = [row for row in rows if len(row) >= LEAST_FILLED * width]
        rows = rows[len(group) :]
        padded = torch.full((len(group), width), starts[-1])
        for number, row in enumerate(group):
            padded[number, : len(row)] = row
            # A shared token is in several rows with equal results, so it does not matter which place stays.
            token_rows[row] = torch.arange(first, first + len(row))
            first += width
        places.append(padded.to(device))
    return _Rows(places, token_rows.to(device))


class Spread(torch.autograd.Function):
    """Rows (N, H) at ``places`` (B, T) -> (B, T, H), 0 where a place is N.

    The gradient of a row is the sum over its places, in float32: a prompt's last token predicts the first token of
    every answer to it.
    """

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """(N, H) at (B, T) places -> (B, T, H)."""
        ctx.save_for_backward(places)
        ctx.count = len(rows)
        is_padding = (places == len(rows))[..., None]
        return rows[places.clamp(max=len(rows) - 1)].masked_fill_(is_padding, 0)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        """(B, T, H) -> (N, H)."""
        (places,) = ctx.saved_tensors
        rows = grad.new_zeros(ctx.count + 1, grad.shape[-1], dtype=torch.float32)  # the last row stores padding's
        rows.index_add_(0, places.flatten(), grad.flatten(0, 1).float())
        return rows[: ctx.count].to(grad.dtype), None
