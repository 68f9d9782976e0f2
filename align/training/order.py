"""Order training rows by similar length, as a function of seed and epoch only.

transformers' own length grouping draws from the global random state, so a run resumed in its second epoch would see
another order than the uninterrupted one. ``epochs.py`` splits the order over processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

WINDOW = 16
"""Batches per window in which rows are sorted: enough to save padding, few enough to stay random."""


def grouped_order(lengths: Sequence[int], micro_batch: int, batch: int, seed: int, epoch: int) -> list[int]:
    """Return every row once, shuffled into micro-batches of rows with similar length.

    Rows are shuffled, cut into windows of ``WINDOW`` batches, sorted by length in each window and cut into
    micro-batches, which are shuffled in turn. Only the last micro-batch may be short.
    """
    random = np.random.default_rng([seed, epoch])
    rows = random.permutation(len(lengths))
    window = WINDOW * batch
    micro_batches: list[list[int]] = []
    for start in range(0, len(rows), window):
        sorted_rows = sorted(rows[start : start + window].tolist(), key=lambda row: -lengths[row])
        # The window is sorted by length and cut, so each micro-batch has similar lengths.
        micro_batches += [sorted_rows[index : index + micro_batch] for index in range(0, len(sorted_rows), micro_batch)]
    # Only the last micro-batch of a window can be short. These go last.
    short = [batch_rows for batch_rows in micro_batches if len(batch_rows) < micro_batch]
    full = [batch_rows for batch_rows in micro_batches if len(batch_rows) == micro_batch]
    return [row for index in random.permutation(len(full)) for row in full[index]] + [
        row for batch_rows in short for row in batch_rows
    ]


class GroupedOrder:
    """Sampler over ``grouped_order``; the trainer calls ``set_epoch`` at the start of each epoch."""

    def __init__(self, lengths: Sequence[int], micro_batch: int, batch: int, seed: int) -> None:
        self.lengths = lengths
        self.micro_batch = micro_batch
        self.batch = batch
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        yield from grouped_order(self.lengths, self.micro_batch, self.batch, self.seed, self.epoch)


def by_length(lengths: Sequence[int], tokens: int, groups: Sequence[Sequence[int]] = ()) -> list[list[int]]:
    """Return batches of row indices for scoring, longest first, of at most ``tokens`` padded tokens.

    The rows of a group, such as the answers to one prompt, stay in one batch as far as it has room. Without ``groups``
    each row is a group. A row longer than ``tokens`` has a batch to itself, or shares it with a row of its group.
    Training needs the same memory for a pair.
    """
    parts = [part for group in groups for part in _cut(group, lengths, tokens)]
    parts = parts or [[row] for row in range(len(lengths))]
    longest = [max(lengths[row] for row in part) for part in parts]
    batches: list[list[int]] = []
    width = 0
    for index in sorted(range(len(parts)), key=lambda index: (-longest[index], index)):
        # Parts come by falling length, so the first part of a batch sets its width.
        if batches and width * (len(batches[-1]) + len(parts[index])) <= tokens:
            batches[-1] += parts[index]
        else:
            batches.append(parts[index])
            width = longest[index]
    return batches


def _cut(group: Sequence[int], lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Return the rows of a group in parts of at most ``tokens`` padded tokens or two rows."""
    size = max(2, tokens // max(1, *(lengths[row] for row in group)))
    return [list(group[start : start + size]) for start in range(0, len(group), size)]
