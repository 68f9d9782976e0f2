"""An epoch's rows shared out among processes so that every optimizer step learns from those it has in one process.

accelerate shares out whole micro-batches, and fills an epoch's last ones with rows from its beginning, which one
process would not see. Here a step's micro-batches are those of one process, dealt out by turns. Where they do not come
out even, a process runs one once more with weight 0, so that all make the same passes. Each micro-batch carries the
weight under which the mean over processes is the one process's loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader

SHARE = "loss_share"
"""Name of a micro-batch's weight among its inputs."""

Micro = list[tuple[int, float]]
"""Rows of a micro-batch, each with the micro-batch's weight."""


def dealt(order: Sequence[int], *, micro_batch: int, batch: int, part: int, rank: int, processes: int) -> list[Micro]:
    """This process's micro-batches of an epoch whose rows come in ``order``.

    One process would take ``micro_batch`` rows at a time and make a step of ``batch`` rows, the last one of what is
    left, and its loss is the mean of its micro-batches' means. Here they come in parts of ``part`` rows, which divides
    ``micro_batch``. Every process gets as many.
    """
    mine: list[Micro] = []
    for start in range(0, len(order), batch):
        step = order[start : start + batch]
        whole = [step[at : at + micro_batch] for at in range(0, len(step), micro_batch)]
        parts = [
            (micro[at : at + part], min(part, len(micro) - at) / len(micro))
            for micro in whole for at in range(0, len(micro), part)
        ]  # fmt: skip
        rounds = -(-len(parts) // processes)
        for at in range(rounds):
            number = at * processes + rank
            rows, share = parts[number] if number < len(parts) else (parts[0][0], 0.0)
            # The Trainer divides by the rounds, the exchange of gradients by the processes.
            weight = share * rounds * processes / len(whole)
            mine.append([(row, weight) for row in rows])
    return mine


class Dealt:
    """A batch sampler over ``dealt``; ``set_epoch`` is called by the trainer at the start of each epoch."""

    def __init__(self, sampler: Any, **sizes: int) -> None:
        self.sampler, self.sizes = sampler, sizes
        self.batch_sampler = self  # where transformers looks for set_epoch

    def set_epoch(self, epoch: int) -> None:
        self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return len(dealt(range(len(self.sampler)), **self.sizes))  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Micro]:
        yield from dealt(list(self.sampler), **self.sizes)  # type: ignore[arg-type]


class _Weighted:
    """A data set asked for (row, weight) pairs."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, asked: tuple[int, float]) -> tuple[Any, float]:
        return self.rows[asked[0]], asked[1]


def shared_loader(
    rows: Any, collate: Callable[[list[Any]], dict[str, Any]], sampler: Any, **sizes: int
) -> DataLoader[Any]:
    """A loader of this process's micro-batches, as they are dealt out; each has its weight under ``SHARE``."""

    def collated(items: list[tuple[Any, float]]) -> dict[str, Any]:
        return {**collate([row for row, _ in items]), SHARE: torch.tensor(items[0][1])}

    return DataLoader(_Weighted(rows), batch_sampler=Dealt(sampler, **sizes), collate_fn=collated)  # type: ignore[arg-type]


def is_copy(batch: dict[str, Any]) -> bool:
    """Whether a micro-batch is run for company only."""
    return SHARE in batch and float(batch[SHARE]) == 0.0


def gathering_uneven(gather: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """accelerate's ``gather``, for tensors that may have more rows in one process than in another.

    trl gathers what it logs by row, and an epoch's last micro-batches are of different sizes.
    """

    def gathered(tensor: Any) -> Any:
        if not isinstance(tensor, torch.Tensor) or tensor.dim() == 0:
            return gather(tensor)
        sizes = gather(torch.tensor([len(tensor)], device=tensor.device)).tolist()
        if len(set(sizes)) == 1:
            return gather(tensor)
        padded = tensor.new_zeros(max(sizes), *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        blocks = gather(padded).split(max(sizes))
        return torch.cat([block[:size] for block, size in zip(blocks, sizes, strict=True)])

    return gathered
