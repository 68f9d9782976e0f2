"""The order in which training rows are seen: rows of like length together, a function of seed and epoch alone.

transformers' own length grouping draws from the global random state, so a run resumed in its second epoch would see
another order than the uninterrupted one. Leaves out distributed sharding: accelerate cuts the order up by batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

WINDOW = 16
"""Batches per window inside which rows are sorted: enough to save the padding, few enough to stay random."""


def grouped_order(lengths: Sequence[int], micro_batch: int, batch: int, seed: int, epoch: int) -> list[int]:
    """Every row once, shuffled, such that each run of ``micro_batch`` rows has like lengths.

    Rows are shuffled, cut into windows of ``WINDOW`` batches, sorted by length inside each, cut into micro-batches,
    and the micro-batches shuffled. Only the last micro-batch may be short.
    """
    random = np.random.default_rng([seed, epoch])
    rows = random.permutation(len(lengths))
    window = WINDOW * batch
    micro_batches: list[list[int]] = []
    for start in range(0, len(rows), window):
        inside = sorted(rows[start : start + window].tolist(), key=lambda row: -lengths[row])
        micro_batches += [inside[at : at + micro_batch] for at in range(0, len(inside), micro_batch)]
    short = [micro for micro in micro_batches if len(micro) < micro_batch]
    full = [micro for micro in micro_batches if len(micro) == micro_batch]
    return [row for at in random.permutation(len(full)) for row in full[at]] + [row for micro in short for row in micro]


class GroupedOrder:
    """A sampler over ``grouped_order``; ``set_epoch`` is called by the trainer at the start of each epoch."""

    def __init__(self, lengths: Sequence[int], micro_batch: int, batch: int, seed: int) -> None:
        self.lengths, self.micro_batch, self.batch, self.seed = lengths, micro_batch, batch, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        yield from grouped_order(self.lengths, self.micro_batch, self.batch, self.seed, self.epoch)


def by_length(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Batches of row numbers for scoring, longest first: at most ``tokens`` padded tokens each, at least one row."""
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches
