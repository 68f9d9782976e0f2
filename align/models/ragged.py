"""Sequences of unlike lengths end to end in one row of tokens: no padding, except inside attention.

Everything but attention looks at one token at a time, so it can run over (1, N) real tokens. Attention gathers the
sequences into a few right-padded groups of like length, and gives its results back to their places. It is an attention
function of transformers' own registry, so any model that takes its attention from there can be run this way. On a CPU
short sequences take the products of matrices as they are written: torch's flash kernel there needs 2 to 4 times as long
up to a few hundred tokens, backwards above all. Left out: sliding windows, linear attention, caches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

NAME = "align_ragged"
SHORT = 512
"""Tokens up to which a CPU is better off without its flash kernel (benchmarks: 2 to 4 times at 100, even at 800)."""
GROUP = 8
"""Sequences of a group at most; a sequence much shorter than the longest of its group starts a new one."""

Layout = dict[str, Any]
"""``gather`` (M,): for each place of the groups, the token in it, or N where it is padding; ``inverse`` (N,): the place
of each token; ``shapes``: (sequences, length) of each group; ``masks``: (S, 1, L, L) or (1, 1, L, L) bool of each, True
where a query may look."""


def lay_out(lengths: Sequence[int], segments: Sequence[Sequence[int]] | None = None) -> Layout:
    """Groups for sequences of these lengths that follow one another.

    Causal; ``segments[i]`` further names the part each token of sequence i belongs to: it sees part 0 and its own.
    """
    starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
    total = starts[-1]
    gather, inverse = [], torch.empty(total, dtype=torch.long)
    shapes, masks = [], []
    place = 0
    for members in _groups(lengths):
        length = lengths[members[0]]
        parts = torch.full((len(members), length), -1)
        for at, member in enumerate(members):
            size, start = lengths[member], starts[member]
            tokens = torch.full((length,), total)
            tokens[:size] = torch.arange(start, start + size)
            gather.append(tokens)
            inverse[start : start + size] = torch.arange(place, place + size)
            place += length
            if segments is not None:
                parts[at, :size] = torch.tensor(segments[member])
        shapes.append((len(members), length))
        masks.append(_visible(length, parts if segments is not None else None))
    return {"gather": torch.cat(gather), "inverse": inverse, "shapes": shapes, "masks": masks}


def _groups(lengths: Sequence[int]) -> list[list[int]]:
    """Sequences by falling length, in groups whose padding is a fifth of the longest at most."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    groups: list[list[int]] = []
    for i in order:
        if groups and len(groups[-1]) < GROUP and lengths[i] >= 0.8 * lengths[groups[-1][0]]:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def _visible(length: int, parts: torch.Tensor | None) -> torch.Tensor:
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    if parts is None:
        return causal[None, None]
    return (causal & ((parts[:, None, :] == 0) | (parts[:, None, :] == parts[:, :, None])))[:, None]


def to_device(layout: Layout, device: Any) -> Layout:
    """The layout with its tensors on ``device``."""
    moved = {name: layout[name].to(device) for name in ("gather", "inverse")}
    return layout | moved | {"masks": [mask.to(device) for mask in layout["masks"]]}


class NotRaggedError(RuntimeError):
    """A model turned out, while running, to need more of attention than ragged rows have."""


def can_run_ragged(model: Any) -> bool:
    """Whether ``model`` takes its attention from transformers' registry, and all its layers attend in full."""
    config = model.config.get_text_config()
    if getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None):
        return False
    if not set(getattr(config, "layer_types", None) or ()) <= {"full_attention"}:
        return False
    return bool(model.is_backend_compatible()) and config._attn_implementation in ("sdpa", NAME)


def run_ragged(model: Any) -> None:
    """Let ``model`` take layouts; without one it works as before. Ask ``can_run_ragged`` first."""
    model.set_attn_implementation(NAME)


def hidden_states(
    trunk: Any, input_ids: torch.Tensor, position_ids: torch.Tensor, layout: Layout, states: torch.Tensor | None = None
) -> torch.Tensor:
    """(N, H) last hidden states of ``trunk`` for (1, N) tokens laid out so, or from (N, H) ``states`` it is given."""
    marker = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=input_ids.device)  # transformers leaves a 4D mask alone
    given: dict[str, Any] = {"input_ids": input_ids} if states is None else {"inputs_embeds": states[None]}
    found: torch.Tensor = trunk(
        **given, attention_mask=marker, position_ids=position_ids, use_cache=False, layout=layout
    ).last_hidden_state
    return found[0]


def ragged_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    layout: Layout | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of (1, heads, N, D) queries within the sequences of ``layout``, (1, N, heads, D); without one, torch's.

    Raises ``NotRaggedError`` when a model was run by ``hidden_states`` but kept the layout to itself.
    """
    if layout is None:
        if attention_mask is not None and attention_mask.numel() == 1 and query.shape[2] > 1:
            raise NotRaggedError(
                f"{type(module).__name__} does not hand its arguments on to attention; set padding_free off"
            )
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        plain: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
        return plain
    unknown = [name for name in ("position_bias", "softcap", "s_aux", "sliding_window") if kwargs.get(name) is not None]
    if unknown:
        raise NotRaggedError(
            f"{type(module).__name__} asks for {unknown[0]}, which ragged rows lack; set padding_free off"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    rows = [_TakeRows.apply(tensor[0].transpose(0, 1), layout["gather"]) for tensor in (query, key, value)]  # (M, h, D)
    results, start = [], 0
    for (count, length), mask in zip(layout["shapes"], layout["masks"], strict=True):
        part = slice(start, start + count * length)
        q, k, v = (tensor[part].unflatten(0, (count, length)).transpose(1, 2) for tensor in rows)  # (S, h, L, D)
        results.append(_attend(q, k, v, mask, scale).transpose(1, 2).flatten(0, 1))
        start = part.stop
    return _TakeRows.apply(torch.cat(results), layout["inverse"])[None], None


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    times = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(times, dim=1), v.repeat_interleave(times, dim=1)
    if q.device.type == "cpu" and q.shape[2] <= SHORT:
        short: torch.Tensor = _ShortAttention.apply(q, k, v, mask, scale)
        return short
    if mask.shape[0] == 1:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


class _TakeRows(torch.autograd.Function):
    """``rows[index]``, where no row is named twice and ``len(rows)`` stands for any: its gradient is a plain copy."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        ctx.save_for_backward(index)
        ctx.count = len(rows)
        return rows[index.clamp(max=len(rows) - 1)]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        (index,) = ctx.saved_tensors
        rows = grad.new_zeros(ctx.count + 1, *grad.shape[1:])
        rows[index] = grad
        return rows[: ctx.count], None


class _ShortAttention(torch.autograd.Function):
    """softmax(q k^T scale) v of (S, h, L, D); weights are made again in the backward pass rather than kept."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float
    ) -> torch.Tensor:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        ctx.save_for_backward(q, k, v, mask)
        ctx.scale = scale
        return _weights(q, k, mask, scale).to(v.dtype) @ v

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        q, k, v, mask = ctx.saved_tensors
        weights = _weights(q, k, mask, ctx.scale)
        grad = grad.contiguous()
        grad_v = weights.to(grad.dtype).transpose(-1, -2) @ grad
        of_weights = (grad @ v.transpose(-1, -2)).float()
        # d softmax: w * (g - sum w g), row by row
        inner = (of_weights * weights).sum(dim=-1, keepdim=True)
        of_scores = of_weights.sub_(inner).mul_(weights).mul_(ctx.scale).to(q.dtype)
        return of_scores @ k, of_scores.transpose(-1, -2) @ q, grad_v, None, None


def _weights(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    """(S, h, L, L) float32."""
    scores = (q @ k.transpose(-1, -2)).float().mul_(scale)
    return torch.softmax(scores.masked_fill_(~mask, float("-inf")), dim=-1)


def _register() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(NAME, ragged_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


_register()
