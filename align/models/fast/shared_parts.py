"""Compute what sequences or models have in common only once: common beginnings of rows, and frozen lower layers.

A chat template opens every conversation with the same system message, and the responses to one prompt share that whole
prompt. A causal model computes the same states for these tokens whatever follows, so the row holds them once
(``ragged_rows.make_layout``).

When only the last layers are trained, every model that shares the frozen weights below (a policy, its reference, a
critic next to it) has the same hidden states there. The lower layers run once, without gradients, and each model
continues from their states. Excluded: decoders that do more before, between or after their layers than Llama does
(``SPLITTABLE``); they run in one piece.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from align.models.fast.ragged_rows import make_layout

MIN_PREFIX = 8
"""Common tokens from which a prefix of all rows is worth its own segment."""
LEAST_SHARED = 4
"""Tokens from which ``share_prefixes`` reads a common part once. Attention for one more segment needs less time than
the matrix products for so many tokens do."""


class PrefixBatch:
    """Segments of tokens, concatenated into one row. A segment may continue an earlier one, its parent."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.lengths: list[int] = []
        self.starts: list[int] = []
        """Offset of each segment in the row."""
        self._parents: list[int | None] = []
        self._positions: list[int] = []

    def add(self, tokens: Sequence[int], parent: int | None = None) -> int:
        """Append a segment that continues ``parent`` (None: its own sequence) and return its index."""
        # Positions continue the parent's, so each token has the position that it has in a separate row.
        first_position = 0
        if parent is not None:
            last_of_parent = self.starts[parent] + self.lengths[parent] - 1
            first_position = self._positions[last_of_parent] + 1
        self._positions += range(first_position, first_position + len(tokens))
        self.starts.append(len(self.tokens))
        self.lengths.append(len(tokens))
        self._parents.append(parent)
        self.tokens += tokens
        return len(self.lengths) - 1

    def batch(self) -> dict[str, Any]:
        """Return ``input_ids`` and ``position_ids``, both (1, N), and their attention ``layout``."""
        return {
            "input_ids": torch.tensor([self.tokens]),
            "position_ids": torch.tensor([self._positions]),
            "layout": make_layout(self.lengths, self._parents),
        }


def common_prefix(rows: Sequence[Sequence[int]]) -> int:
    """Return the length of the prefix that all rows share; 0 for one row or a prefix below ``MIN_PREFIX``.

    Every row keeps at least one token after the prefix.
    """
    if len(rows) < 2:
        return 0
    # In sorted order the first and the last row differ most: what these two share, all rows share.
    first, *_, last = sorted(map(list, rows))
    limit = min(map(len, rows)) - 1
    length = next((index for index in range(limit) if first[index] != last[index]), limit)
    return length if length >= MIN_PREFIX else 0


def share_prefixes(rows: Sequence[Sequence[int]]) -> tuple[PrefixBatch, list[list[int]]]:
    """Return a line of tokens that holds what rows begin with in common once, and each row's places in it.

    The rows may share beginnings at several depths: a system message, the conversations that begin with it, the answers
    to a conversation. ``places[i][t]`` is the index in the line of token t of row i. Equal rows have the same places.
    """
    line = PrefixBatch()
    places: list[list[int]] = [[] for _ in rows]
    # In sorted order, rows with a common beginning are neighbors.
    order = sorted(range(len(rows)), key=lambda index: tuple(rows[index]))
    common = [_common_length(rows[first], rows[second]) for first, second in pairwise(order)]
    # Rows order[start:end] whose first tokens, as many as ``path`` has places, are in the line; ``parent`` ends them.
    pending: list[tuple[int, int, list[int], int | None]] = [(0, len(order), [], None)]
    while pending:
        start, end, path, parent = pending.pop()
        depth = len(path)
        while start < end:
            # The run of rows that continue alike for at least LEAST_SHARED tokens, or to the end of all of them.
            stop = start + 1
            while stop < end and _go_on_alike(rows[order[stop - 1]], rows[order[stop]], common[stop - 1], depth):
                stop += 1
            row = rows[order[start]]
            # What all neighbors in the run have in common, all its rows have in common.
            length = min(common[start : stop - 1], default=len(row))
            segment = parent
            longer_path = path
            if length > depth:
                segment = line.add(row[depth:length], parent)
                first = line.starts[segment]
                longer_path = [*path, *range(first, first + length - depth)]
            if len(rows[order[stop - 1]]) == length:
                # The last one has no further token, so the run's rows are equal.
                for index in order[start:stop]:
                    places[index] = longer_path
            else:
                pending.append((start, stop, longer_path, segment))
            start = stop
    return line, places


def _go_on_alike(first: Sequence[int], second: Sequence[int], common: int, depth: int) -> bool:
    """Return True where two rows with ``common`` tokens share a segment after the first ``depth`` tokens."""
    return common - depth >= LEAST_SHARED or common == len(first) == len(second)


def batches_of_shared(rows: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
    """Return the rows' indices in batches whose lines, by ``share_prefixes``, have about ``tokens`` tokens at most.

    Rows with a common beginning are in one batch if it has room; equal rows always are. A longer row is separate.
    """
    batches: list[list[int]] = []
    size = 0
    for index in sorted(range(len(rows)), key=lambda index: tuple(rows[index])):
        row = rows[index]
        if batches:
            # Rows are sorted, so a common beginning is with the row before. Its tokens are in the line already.
            common = _common_length(rows[batches[-1][-1]], row)
            added = len(row) - (common if common >= LEAST_SHARED else 0)
            if size + added <= tokens or list(row) == list(rows[batches[-1][-1]]):
                batches[-1].append(index)
                size += added
                continue
        batches.append([index])
        size = len(row)
    return batches


def _common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Return the number of tokens that two rows begin with in common."""
    limit = min(len(first), len(second))
    return next((index for index in range(limit) if first[index] != second[index]), limit)


SPLITTABLE = ("llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3")
"""Model types whose trunk is embeddings, ``layers`` and a ``norm``. The tests compare each with the unsplit model."""


def count_frozen_layers(trunk: Any) -> int:
    """Count the lowest layers without a trained weight; 0 for trained embeddings or a model that cannot be split."""
    if getattr(trunk.config, "model_type", "") not in SPLITTABLE or _is_trained(trunk.embed_tokens):
        return 0
    count = 0
    while count < len(trunk.layers) and not _is_trained(trunk.layers[count]):
        count += 1
    return count


def lower_weights_key(trunk: Any) -> tuple[int, ...]:
    """Return a key that is equal for trunks whose embeddings and first layer share memory."""
    first_parameter = next(trunk.layers[0].parameters())
    return trunk.embed_tokens.weight.data_ptr(), first_parameter.data_ptr()


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


@contextmanager
def run_lower_layers(trunk: Any, count: int) -> Iterator[None]:
    """Inside, ``trunk`` ends after its ``count`` lowest layers and skips its final norm."""
    with _replace_layers(trunk, trunk.layers[:count], nn.Identity()):
        yield


@contextmanager
def run_upper_layers(trunk: Any, count: int) -> Iterator[None]:
    """Inside, ``trunk`` accepts the states after its ``count`` lowest layers as ``inputs_embeds``."""
    # The layers keep their indices: transformers looks up a layer's mask in config.layer_types by its index.
    layers = nn.ModuleList([_SkippedLayer()] * count)
    layers.extend(trunk.layers[count:])
    with _replace_layers(trunk, layers, trunk.norm):
        yield


class _SkippedLayer(nn.Module):
    """Stand-in for a layer that has run already."""

    def forward(self, states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the (B, T, H) states unchanged."""
        return states


@contextmanager
def _replace_layers(trunk: Any, layers: nn.ModuleList, norm: nn.Module) -> Iterator[None]:
    original_layers = trunk.layers
    original_norm = trunk.norm
    trunk.layers = layers
    trunk.norm = norm
    try:
        yield
    finally:
        trunk.layers = original_layers
        trunk.norm = original_norm
