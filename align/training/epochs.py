"""Split an epoch's rows over processes: every optimizer step uses the same rows as with one process.

accelerate distributes whole micro-batches and fills an epoch's last micro-batches with rows from its beginning, which
one process would not see again. Here a step has the same micro-batches as in one process, and the processes get them in
turn. If their number is not divisible, a process repeats a micro-batch with weight 0, so all processes run the same
number of passes. Each micro-batch carries a weight, under which the mean over processes equals the loss of one process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader

SHARE = "loss_share"
"""Key of a micro-batch's weight among its inputs."""

MicroBatch = list[tuple[int, float]]
"""Row indices of a micro-batch, each with the micro-batch's weight."""


def micro_batches_of_rank(
    order: Sequence[int], *, micro_batch: int, batch: int, part: int, rank: int, processes: int
) -> list[MicroBatch]:
    """Return the micro-batches of process ``rank`` for an epoch whose rows come in ``order``.

    One process would make steps of ``batch`` rows from micro-batches of ``micro_batch`` rows (the last are shorter),
    with the mean of the micro-batches' means as its loss. Here each micro-batch is cut into parts of ``part`` rows,
    which divides ``micro_batch``. Every process gets equally many.
    """
    micro_batches: list[MicroBatch] = []
    for start in range(0, len(order), batch):
        step_rows = order[start : start + batch]
        # The micro-batches that one process would run in this step.
        full_batches = [step_rows[first : first + micro_batch] for first in range(0, len(step_rows), micro_batch)]
        parts: list[tuple[Sequence[int], float]] = []
        for rows in full_batches:
            for first in range(0, len(rows), part):
                part_rows = rows[first : first + part]
                # A part counts by its share of the rows, so the parts add up to the micro-batch's mean.
                parts.append((part_rows, len(part_rows) / len(rows)))
        # Every process runs this many passes; part k belongs to process k modulo the number of processes.
        rounds = -(-len(parts) // processes)
        for index in range(rounds):
            number = index * processes + rank
            part_rows, share = parts[number] if number < len(parts) else (parts[0][0], 0.0)
            # The Trainer divides by the rounds, DDP by the processes.
            weight = share * rounds * processes / len(full_batches)
            micro_batches.append([(row, weight) for row in part_rows])
    return micro_batches


class RankBatchSampler:
    """Batch sampler over ``micro_batches_of_rank``; the trainer calls ``set_epoch`` at the start of each epoch."""

    def __init__(self, sampler: Any, **sizes: int) -> None:
        self.sampler = sampler
        self.sizes = sizes
        self.batch_sampler = self  # transformers calls set_epoch on this attribute

    def set_epoch(self, epoch: int) -> None:
        self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return len(micro_batches_of_rank(range(len(self.sampler)), **self.sizes))  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[MicroBatch]:
        yield from micro_batches_of_rank(list(self.sampler), **self.sizes)  # type: ignore[arg-type]


class _Weighted:
    """Dataset indexed by (row, weight) pairs."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, item: tuple[int, float]) -> tuple[Any, float]:
        return self.rows[item[0]], item[1]


def shared_loader(
    rows: Any, collate: Callable[[list[Any]], dict[str, Any]], sampler: Any, **sizes: int
) -> DataLoader[Any]:
    """Return a loader of this process's micro-batches; each has its weight under ``SHARE``."""

    def collated(items: list[tuple[Any, float]]) -> dict[str, Any]:
        return {**collate([row for row, _ in items]), SHARE: torch.tensor(items[0][1])}

    return DataLoader(_Weighted(rows), batch_sampler=RankBatchSampler(sampler, **sizes), collate_fn=collated)  # type: ignore[arg-type]


def is_copy(batch: dict[str, Any]) -> bool:
    """Return True for a micro-batch with weight 0, which runs only because the other processes run one."""
    return SHARE in batch and float(batch[SHARE]) == 0.0


def gather_uneven(gather: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Wrap accelerate's ``gather`` for tensors whose number of rows differs between processes.

    trl gathers its metrics by row, and an epoch's last micro-batches have different sizes.
    """

    def gathered(tensor: Any) -> Any:
        if not isinstance(tensor, torch.Tensor) or tensor.dim() == 0:
            return gather(tensor)
        # All processes exchange their number of rows, pad to the largest, gather, and cut the padding off.
        sizes = gather(torch.tensor([len(tensor)], device=tensor.device)).tolist()
        if len(set(sizes)) == 1:
            return gather(tensor)
        padded = tensor.new_zeros(max(sizes), *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        blocks = gather(padded).split(max(sizes))
        return torch.cat([block[:size] for block, size in zip(blocks, sizes, strict=True)])

    return gathered
