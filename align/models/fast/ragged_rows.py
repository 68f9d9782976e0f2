"""Sequences of unlike lengths end to end in one row of tokens: no padding, except inside attention.

Everything but attention looks at one token at a time, so it can run over (1, N) real tokens. Attention gathers the
sequences into a few right-padded groups of like length, and gives its results back to their places. It is an attention
function of transformers' own registry, so any model that takes its attention from there can be run this way. On a CPU
short sequences take the products of matrices as they are written: torch's flash kernel there needs 2 to 4 times as long
up to a few hundred tokens, backwards above all. What several sequences begin with may stand there once (``Line``): each
goes on from it, and looks at its keys and values. Left out: sliding windows, linear attention, caches.
"""

from __future__ import annotations

import itertools
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
"""``gather`` (M,): for each place of the groups, the token that asks there, or N where it is padding; ``inverse`` (N,):
the place of each token; ``shapes``: (pieces, queries, keys) of each group; ``masks``: (S, 1, Q, K) or (1, 1, Q, K) bool
of each, True where a query may look. Where pieces go on from others, ``keys`` (K,) are the tokens that are looked at,
``own`` (N,) each token's place among them as part of its own piece, and ``again`` the (place, token, count) of those
that stand there once more, for a piece that goes on from theirs."""


def lay_out(lengths: Sequence[int], parents: Sequence[int | None] | None = None) -> Layout:
    """Groups for pieces of these lengths that follow one another. Causal.

    ``parents[i]``, an earlier piece, is what piece i goes on from: it sees that one and all that one goes on from. Two
    pieces that go on from the same see nothing of each other.
    """
    starts = [0, *itertools.accumulate(lengths)]
    total = starts[-1]
    before = _before(parents or [None] * len(lengths))
    seen = [sum(lengths[i] for i in path) for path in before]
    gather, inverse = [], torch.empty(total, dtype=torch.long)
    keys, own, again = [], torch.empty(total, dtype=torch.long), []
    shapes, masks = [], []
    place = of_keys = 0
    for members in _groups(lengths, seen):
        length, width = lengths[members[0]], max(seen[member] for member in members)
        for member in members:
            size, start = lengths[member], starts[member]
            tokens, more = torch.full((length,), total), torch.full((width,), total)
            tokens[:size] = torch.arange(start, start + size)
            inverse[start : start + size] = torch.arange(place, place + size)
            own[start : start + size] = torch.arange(of_keys, of_keys + size)
            at = 0
            for i in before[member]:
                more[at : at + lengths[i]] = torch.arange(starts[i], starts[i + 1])
                again.append((of_keys + length + at, starts[i], lengths[i]))
                at += lengths[i]
            gather.append(tokens)
            keys += [tokens, more]
            place += length
            of_keys += length + width
        shapes.append((len(members), length, length + width))
        masks.append(_visible(length, [seen[member] for member in members]))
    layout: Layout = {"gather": torch.cat(gather), "inverse": inverse, "shapes": shapes, "masks": masks}
    return layout | ({"keys": torch.cat(keys), "own": own, "again": again} if again else {})


def _before(parents: Sequence[int | None]) -> list[list[int]]:
    """The pieces that each goes on from, the first of all first."""
    found: list[list[int]] = []
    for parent in parents:
        found.append([] if parent is None else [*found[parent], parent])
    return found


def _groups(lengths: Sequence[int], seen: Sequence[int]) -> list[list[int]]:
    """Pieces by falling length, in groups whose padding is a fifth of the longest at most, before them too."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], -seen[i]))
    groups: list[list[int]] = []
    for i in order:
        first = groups[-1][0] if groups and len(groups[-1]) < GROUP else None
        if first is not None and lengths[i] >= 0.8 * lengths[first] and _alike(seen[i], seen[first]):
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def _alike(one: int, other: int) -> bool:
    return min(one, other) >= 0.8 * max(one, other)


def _visible(length: int, seen: Sequence[int]) -> torch.Tensor:
    """A piece's own tokens in their order, and behind them all of those it goes on from."""
    causal = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
    width = max(seen)
    if min(seen) == width:
        return torch.cat([causal, causal.new_ones(1, 1, length, width)], dim=-1)
    more = torch.arange(width) < torch.tensor(seen)[:, None]  # (S, W)
    return torch.cat([causal.expand(len(seen), -1, -1, -1), more[:, None, None].expand(-1, 1, length, -1)], dim=-1)


def to_device(layout: Layout, device: Any) -> Layout:
    """The layout with its tensors on ``device``."""
    moved = {name: layout[name].to(device) for name in ("gather", "inverse", "keys", "own") if name in layout}
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
    queries, keys, values = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # (N, h, D)
    queries = _TakeRows.apply(queries, layout["gather"])  # (M, h, D)
    if "keys" in layout:
        keys, values = (
            _TakeKeys.apply(rows, layout["keys"], layout["own"], layout["again"]) for rows in (keys, values)
        )
    else:
        keys, values = (_TakeRows.apply(rows, layout["gather"]) for rows in (keys, values))
    results, at, of_keys = [], 0, 0
    for (count, asking, seen), mask in zip(layout["shapes"], layout["masks"], strict=True):
        part, of_part = slice(at, at := at + count * asking), slice(of_keys, of_keys := of_keys + count * seen)
        q = queries[part].unflatten(0, (count, asking)).transpose(1, 2)  # (S, h, Q, D)
        k, v = (rows[of_part].unflatten(0, (count, seen)).transpose(1, 2) for rows in (keys, values))  # (S, h, K, D)
        results.append(_attend(q, k, v, mask, scale).transpose(1, 2).flatten(0, 1))
    return _TakeRows.apply(torch.cat(results), layout["inverse"])[None], None


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    if q.device.type == "cpu" and k.shape[2] <= SHORT:
        short: torch.Tensor = _ShortAttention.apply(q, k, v, mask, scale)
        return short
    times = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(times, dim=1), v.repeat_interleave(times, dim=1)
    if q.shape[2] == k.shape[2]:
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


class _TakeKeys(torch.autograd.Function):
    """``rows[index]``, where a row may be named by its own piece and again by those that go on from it.

    Its gradient is their sum, in float32: a beginning that many share would lose the last of it in bfloat16.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, rows: torch.Tensor, index: torch.Tensor, own: torch.Tensor, again: list[tuple[int, int, int]]
    ) -> torch.Tensor:
        ctx.save_for_backward(own)
        ctx.again = again
        return rows[index.clamp(max=len(rows) - 1)]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        (own,) = ctx.saved_tensors
        rows = grad[own].float()
        for place, token, count in ctx.again:  # whole slices: index_add_ on a CPU goes row by row
            rows[token : token + count] += grad[place : place + count]
        return rows.to(grad.dtype), None, None, None


class _ShortAttention(torch.autograd.Function):
    """softmax(q k^T scale) v of (S, h, Q, D) queries and (S, g, K, D) keys; g divides h, as in grouped-query attention.

    Queries that share keys are multiplied together. Weights are made again in the backward pass rather than kept.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float
    ) -> torch.Tensor:
        q, k, v = _by_group(q, k.shape[1]), k.contiguous(), v.contiguous()
        ctx.save_for_backward(q, k, v, mask)
        ctx.scale, ctx.heads = scale, q.shape[1] * q.shape[2] // mask.shape[2]
        return _by_head(_weights(q, k, mask, scale).to(v.dtype) @ v, ctx.heads)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        q, k, v, mask = ctx.saved_tensors
        weights = _weights(q, k, mask, ctx.scale)
        grad = _by_group(grad, k.shape[1])
        grad_v = weights.to(grad.dtype).transpose(-1, -2) @ grad
        of_weights = (grad @ v.transpose(-1, -2)).float()
        # d softmax: w * (g - sum w g), row by row
        inner = (of_weights * weights).sum(dim=-1, keepdim=True)
        of_scores = of_weights.sub_(inner).mul_(weights).mul_(ctx.scale).to(q.dtype)
        return _by_head(of_scores @ k, ctx.heads), of_scores.transpose(-1, -2) @ q, grad_v, None, None


def _by_group(rows: torch.Tensor, groups: int) -> torch.Tensor:
    """(S, h, Q, D) -> (S, g, h / g Q, D)."""
    return rows.contiguous().view(len(rows), groups, -1, rows.shape[-1])


def _by_head(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """... and back."""
    return rows.view(len(rows), heads, -1, rows.shape[-1])


def _weights(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    """(S, g, h / g Q, K) float32."""
    scores = (q @ k.transpose(-1, -2)).float().mul_(scale)
    scores.unflatten(2, (-1, mask.shape[2])).masked_fill_(~mask[:, :, None], float("-inf"))
    return torch.softmax(scores, dim=-1)


def _register() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(NAME, ragged_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


_register()
