"""Run sequences of different lengths as one row of tokens: no padding except inside attention.

Everything but attention looks at one token at a time, so it can run over the N real tokens as a (1, N) row. Attention
proceeds in three steps (``ragged_attention``):

1. Gather the tokens' queries, keys and values into a few groups of sequences of similar length, right-padded. The rows
   that are moved belong to one head, so a group has the (S, h, Q, D) layout that its matrix products need.
2. Attend within each group.
3. Gather the results into the tokens' places in the row.

It is registered as an attention function of transformers, so every model that looks up its attention in that registry
can run this way. On a CPU, short sequences use plain matrix products: torch's flash kernel there needs 2 to 4 times as
long up to a few hundred tokens, most of all backwards. A prefix that several sequences share may appear once
(``shared_parts.PrefixBatch``): each of them attends to the prefix's keys and values. Layers of linear attention get
whole rows (``stateful_layers``). Excluded: sliding windows, caches.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from align.models.compute.precision import float32_products
from align.models.fast.attention import FromGroups, HeadGather, ShortAttention, ToGroups
from align.models.fast.stateful_layers import carries_state, enable_rows, stateful_layers
from align.patches.transformers import attention_name

NAME = "align_ragged"
SHORT = 512
"""Keys up to which a CPU is faster without its flash kernel (benchmarks: 2 to 4 times at 100, even at 800)."""
GROUP_PAIRS = 8_000
"""Work of a further group, in pairs of a query and a key: its calls last as long, forward and backward, as the products
and the softmax of so many pairs (SmolLM2-135M on two cores: 1.4 ms, and 0.17 microseconds per pair of all heads)."""
MAX_PAIRS = 500_000
"""Most pairs of a group of several short segments: their weights, for every head, are in memory at once."""
MAX_GROUP = 128
"""Most segments of a group; the work of finding the best groups grows with it."""

Layout = dict[str, Any]
"""Places of a row's tokens in attention. A plain dict, because models pass it on as a keyword argument.

``slot_tokens`` (M,): for each slot of the padded groups, the index of the token whose query is there; N for padding.
``token_slots`` (N,): the slot of each token.
``shapes``: (segments, queries, keys) of each group.
``masks``: bool, (S, 1, Q, K) or (1, 1, Q, K) for each group; True where a query may look at a key.
``segments``: the lengths of the segments, and the segments that each of them continues.

Only where segments continue others:
``key_tokens`` (K,): for each key slot, the index of its token; N for padding.
``token_keys`` (N,): the key slot of each token within its own segment.
``prefix_copies``: (key slot, token, count) of each run of keys that is there again, for a segment that continues it.

``cache``: what attention derives from these at its first layer, for the layers after it.
"""


class LayoutCache(dict[tuple[Any, ...], Any]):
    """Values that attention derives from a layout, by their kind, and number of heads or type.

    A separate class: wrappers that cast a layer's arguments rebuild plain dicts, and would lose the values.
    """

    def get_or_compute(self, key: tuple[Any, ...], compute: Callable[[], Any]) -> Any:
        """Return what ``compute`` gives, computed once: all layers of a pass share the layout."""
        if key not in self:
            self[key] = compute()
        return self[key]


@dataclass
class _LayoutBuilder:
    """Collects the index tensors of a layout, segment by segment."""

    lengths: Sequence[int]
    starts: Sequence[int]
    """Offset of each segment in the row."""
    ancestors: Sequence[Sequence[int]]
    """The segments that each segment continues, the outermost first."""
    total: int
    """N, the tokens of the row; stands for padding in the index tensors."""
    slot_tokens: list[torch.Tensor] = field(default_factory=list)
    key_tokens: list[torch.Tensor] = field(default_factory=list)
    prefix_copies: list[tuple[int, int, int]] = field(default_factory=list)
    slots: int = 0
    key_slots: int = 0

    def __post_init__(self) -> None:
        self.token_slots = torch.empty(self.total, dtype=torch.long)
        self.token_keys = torch.empty(self.total, dtype=torch.long)

    def add(self, segment: int, queries: int, prefix_width: int) -> None:
        """Place one segment, padded to ``queries`` tokens, and before its keys its ancestors' keys, padded as well."""
        start = self.starts[segment]
        size = self.lengths[segment]
        # Queries: the segment's tokens, then padding.
        tokens = torch.full((queries,), self.total)
        tokens[:size] = torch.arange(start, start + size)
        self.token_slots[start : start + size] = torch.arange(self.slots, self.slots + size)
        first_key = self.key_slots + prefix_width
        self.token_keys[start : start + size] = torch.arange(first_key, first_key + size)

        # Keys: the ancestors' tokens, padded to the widest prefix of the group, then the segment's own.
        prefix = torch.full((prefix_width,), self.total)
        offset = 0
        for ancestor in self.ancestors[segment]:
            length = self.lengths[ancestor]
            prefix[offset : offset + length] = torch.arange(self.starts[ancestor], self.starts[ancestor + 1])
            self.prefix_copies.append((self.key_slots + offset, self.starts[ancestor], length))
            offset += length

        self.slot_tokens.append(tokens)
        self.key_tokens += [prefix, tokens]
        self.slots += queries
        self.key_slots += queries + prefix_width


def make_layout(lengths: Sequence[int], parents: Sequence[int | None] | None = None) -> Layout:
    """Return the layout of a row of segments with these lengths, for causal attention.

    ``parents[i]``, an earlier segment, is the segment that segment i continues: it sees that one and everything that
    one continues. Two segments that continue the same one do not see each other.
    """
    starts = [0, *itertools.accumulate(lengths)]
    ancestors = _find_ancestors(parents or [None] * len(lengths))
    prefix_lengths = [sum(lengths[i] for i in path) for path in ancestors]
    builder = _LayoutBuilder(lengths, starts, ancestors, total=starts[-1])
    shapes = []
    masks = []
    for members in _group_segments(lengths, prefix_lengths):
        queries = lengths[members[0]]  # the first member is the longest
        prefix_width = max(prefix_lengths[member] for member in members)
        for member in members:
            builder.add(member, queries, prefix_width)
        shapes.append((len(members), queries, queries + prefix_width))
        masks.append(_make_mask(queries, [prefix_lengths[member] for member in members]))
    layout: Layout = {
        "slot_tokens": torch.cat(builder.slot_tokens),
        "token_slots": builder.token_slots,
        "shapes": shapes,
        "masks": masks,
        "segments": (list(lengths), ancestors),
        "cache": LayoutCache(),
    }
    # Without prefixes the keys have the places of the queries, and one gather serves both.
    if builder.prefix_copies:
        layout["key_tokens"] = torch.cat(builder.key_tokens)
        layout["token_keys"] = builder.token_keys
        layout["prefix_copies"] = builder.prefix_copies
    return layout


def _find_ancestors(parents: Sequence[int | None]) -> list[list[int]]:
    """Return the segments that each segment continues, the outermost first."""
    ancestors: list[list[int]] = []
    for parent in parents:
        ancestors.append([] if parent is None else [*ancestors[parent], parent])
    return ancestors


def _group_segments(lengths: Sequence[int], prefix_lengths: Sequence[int]) -> list[list[int]]:
    """Sort segments by falling length and cut them into groups so attention needs the least work.

    Work is counted in pairs of a query and a key: padding adds pairs, and a further group is worth ``GROUP_PAIRS``.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], -prefix_lengths[i]))
    # work[n]: the least for the first n segments of the order; sizes[n]: the members of the last of their groups.
    work = [0]
    sizes = [0]
    # The best groups of the first ``end`` segments are a last group and the best groups of the segments before it.
    for end in range(1, len(order) + 1):
        best = None
        best_size = 0
        widest_prefix = 0
        for size in range(1, min(end, MAX_GROUP) + 1):
            longest = order[end - size]
            widest_prefix = max(widest_prefix, prefix_lengths[longest])
            keys = lengths[longest] + widest_prefix
            pairs = size * lengths[longest] * keys
            if size > 1 and keys <= SHORT and pairs > MAX_PAIRS:
                break
            total = work[end - size] + pairs + GROUP_PAIRS
            if best is None or total < best:
                best = total
                best_size = size
            # A larger group has more pairs yet, whatever comes before it.
            if pairs + GROUP_PAIRS > best:
                break
        assert best is not None
        work.append(best)
        sizes.append(best_size)
    groups = []
    end = len(order)
    while end:
        groups.append(order[end - sizes[end] : end])
        end -= sizes[end]
    return groups[::-1]


def _make_mask(queries: int, prefix_lengths: Sequence[int]) -> torch.Tensor:
    """Let each token see its own segment causally and its whole prefix: (S, 1, Q, K), or (1, 1, Q, K) for all alike."""
    causal = torch.ones(queries, queries, dtype=torch.bool).tril()[None, None]  # (1, 1, Q, Q)
    width = max(prefix_lengths)
    if min(prefix_lengths) == width:
        return torch.cat([causal.new_ones(1, 1, queries, width), causal], dim=-1)
    count = len(prefix_lengths)
    prefix = torch.arange(width) < torch.tensor(prefix_lengths)[:, None]  # (S, W)
    prefix = prefix[:, None, None].expand(-1, 1, queries, -1)
    return torch.cat([prefix, causal.expand(count, -1, -1, -1)], dim=-1)


def to_device(layout: Layout, device: Any) -> Layout:
    """Return the layout with its tensors on ``device``."""
    names = ("slot_tokens", "token_slots", "key_tokens", "token_keys")
    moved = {name: layout[name].to(device) for name in names if name in layout}
    masks = [mask.to(device) for mask in layout["masks"]]
    return layout | moved | {"masks": masks, "cache": LayoutCache()}


class NotRaggedError(RuntimeError):
    """A model turned out, while running, to need more of attention than ragged rows offer."""


def can_run_ragged(model: PreTrainedModel) -> bool:
    """Return True for a model that looks up its attention in transformers' registry and attends in full everywhere.

    Its other layers are those of ``stateful_layers``.
    """
    config = model.config.get_text_config()
    if getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None):
        return False
    if carries_state(config):
        # transformers marks only some of these families as compatible, but all of them look up their attention.
        return bool(stateful_layers(model)) and attention_name(config) in ("sdpa", NAME)
    if not set(getattr(config, "layer_types", None) or ()) <= {"full_attention"}:
        return False
    return bool(model.is_backend_compatible()) and attention_name(config) in ("sdpa", NAME)


def enable_ragged(model: PreTrainedModel) -> None:
    """Let ``model`` accept layouts; without one it works as before. Check ``can_run_ragged`` first."""
    model.set_attn_implementation(NAME)
    enable_rows(model)


def try_ragged(model: PreTrainedModel) -> bool:
    """Enable layouts if ``model`` can run on them, and return whether it can. Some families drop their arguments."""
    if not can_run_ragged(model):
        return False
    before = attention_name(model.config.get_text_config())
    enable_ragged(model)
    device = next(model.parameters()).device
    tokens = torch.zeros(1, 2, dtype=torch.long, device=device)  # two rows of one token
    try:
        with torch.no_grad(), float32_products(model.base_model):
            hidden_states(model.base_model, tokens, tokens, to_device(make_layout([1, 1]), device))
    except NotRaggedError:
        model.set_attn_implementation(before)
        return False
    return True


def hidden_states(
    trunk: Any, input_ids: torch.Tensor, position_ids: torch.Tensor, layout: Layout, states: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the last hidden states (N, H) of ``trunk`` for a row of (1, N) tokens with this layout.

    With ``states`` (N, H) these are its input in place of the tokens' embeddings.
    """
    # transformers leaves a 4D mask only. This one marks the row as ragged for ragged_attention.
    marker = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=input_ids.device)
    inputs: dict[str, Any] = {"input_ids": input_ids} if states is None else {"inputs_embeds": states[None]}
    output: torch.Tensor = trunk(
        **inputs, attention_mask=marker, position_ids=position_ids, use_cache=False, layout=layout
    ).last_hidden_state
    return output[0]


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
    """Attend within the sequences of ``layout``; without one, call torch's attention.

    Shapes: ``query``, ``key`` and ``value`` (1, heads, N, D) to (1, N, heads, D).

    Raises ``NotRaggedError`` when a model was run by ``hidden_states`` but did not pass the layout on.
    """
    if layout is None:
        if attention_mask is not None and attention_mask.numel() == 1 and query.shape[2] > 1:
            raise NotRaggedError(
                f"{type(module).__name__} does not pass its arguments on to attention; set padding_free off"
            )
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        output: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
        return output
    unsupported = ("position_bias", "softcap", "s_aux", "sliding_window")
    unknown = [name for name in unsupported if kwargs.get(name) is not None]
    unknown += ["dropout"] if kwargs.get("dropout") else []
    if unknown:
        raise NotRaggedError(
            f"{type(module).__name__} asks for {unknown[0]}, which ragged rows lack; set padding_free off"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    shape = query[0].transpose(0, 1).shape  # (N, h, D)

    # 1. From the row to the groups.
    query_gather = layout["cache"].get_or_compute(("queries", shape[1]), lambda: _gather_queries(layout, shape[1]))
    queries = ToGroups.apply(_head_rows(query), query_gather)  # (M h, D)
    heads = key.shape[1]
    key_gather = layout["cache"].get_or_compute(("keys", heads), lambda: _gather_keys(layout, heads))
    keys, values = (ToGroups.apply(_head_rows(tensor), key_gather) for tensor in (key, value))

    # 2. Attention, group by group.
    groups = zip(
        query_gather.split(queries),
        key_gather.split(keys),
        key_gather.split(values),
        layout["cache"].get_or_compute(("masks", query.dtype), lambda: _attention_masks(layout["masks"], query)),
        strict=True,
    )
    results = [_attend(q, k, v, mask, scale).reshape(-1, shape[-1]) for q, k, v, mask in groups]

    # 3. Back to the row.
    rows = FromGroups.apply(results[0] if len(results) == 1 else torch.cat(results), query_gather)
    return rows.view(1, *shape), None


def _gather_queries(layout: Layout, heads: int) -> HeadGather:
    shapes = [(count, queries) for count, queries, _ in layout["shapes"]]
    return HeadGather.of_slots(shapes, layout["slot_tokens"], layout["token_slots"], heads)


def _gather_keys(layout: Layout, heads: int) -> HeadGather:
    if "key_tokens" not in layout:
        return _gather_queries(layout, heads)
    shapes = [(count, keys) for count, _, keys in layout["shapes"]]
    gather = HeadGather.of_slots(shapes, layout["key_tokens"], layout["token_keys"], heads)
    gather.add_copies(layout["prefix_copies"])
    return gather


def _head_rows(tensor: torch.Tensor) -> torch.Tensor:
    """(1, h, N, D) -> (N h, D), without a copy where memory has the tokens outside, as projections leave it."""
    return tensor[0].transpose(0, 1).reshape(-1, tensor.shape[-1])


def _is_short(tensor: torch.Tensor, keys: int) -> bool:
    """Return True where matrix products are faster than torch's kernel."""
    return tensor.device.type == "cpu" and keys <= SHORT


def _attention_masks(masks: Sequence[torch.Tensor], query: torch.Tensor) -> list[torch.Tensor]:
    """Return each group's mask as its attention expects it.

    Short attention adds it to scores, 0 where a query may look and -inf elsewhere: filling lasts 3 times as long.
    """
    return [
        torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, float("-inf"))
        if _is_short(query, mask.shape[-1])
        else mask
        for mask in masks
    ]


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    if _is_short(q, k.shape[2]):
        output: torch.Tensor = ShortAttention.apply(q, k, v, mask, scale)
        return output
    repeats = q.shape[1] // k.shape[1]
    k = k.repeat_interleave(repeats, dim=1)
    v = v.repeat_interleave(repeats, dim=1)
    # Without a prefix, causal attention also hides the padding, which is on the right.
    if q.shape[2] == k.shape[2]:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def _register() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(NAME, ragged_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


_register()
