"""Micro-batches of a rollout: which responses are learned from together, in which order, and their tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from align.models.processes import split_by_rank
from align.rl.packing import Batch, Form, plan
from align.rl.prompts import derive_seed
from align.rl.rollout import Rollout, Text

if TYPE_CHECKING:
    from align.rl.arguments import RolloutArguments
    from align.rl.objectives.base import Objective
    from align.rl.ptx import PtxRows

MiniBatch = list[list[int]]
"""Response indices of each micro-batch of an optimizer step, over all processes."""


class RolloutBuffer:
    """Turns a rollout into micro-batches for an objective, with supervised texts mixed in."""

    def __init__(
        self, objective: Objective, args: RolloutArguments, form: Form, pad_id: int, ptx: PtxRows | None
    ) -> None:
        self.objective, self.args, self.form, self.pad_id, self.ptx = objective, args, form, pad_id, ptx

    def plan(self, rollout: Rollout, epoch: int) -> list[MiniBatch]:
        """Return the mini-batches of one epoch, shuffled by the seed, the update and the epoch."""
        seed = derive_seed(self.args.seed, "order", rollout.update, epoch, 0)
        return plan(
            rollout.groups,
            rollout.lengths,
            num_mini_batches=self.args.num_mini_batches,
            micro_batch_size=self.args.per_device_train_batch_size,
            generator=torch.Generator().manual_seed(seed),
        )

    def by_length(self, rollout: Rollout) -> MiniBatch:
        """Return micro-batches of responses of similar length, for measuring without learning."""
        size = self.args.per_device_train_batch_size
        # Similar lengths together, so that little of a batch is padding; order does not matter without learning.
        order = sorted(range(len(rollout)), key=rollout.lengths.__getitem__)
        return [order[start : start + size] for start in range(0, len(order), size)]

    def pack(self, rollout: Rollout, indices: list[int], texts: list[Text] | None = None) -> Batch:
        """Return model inputs of some of the responses and, behind them, supervised texts."""
        return rollout.pack(indices, self.pad_id, self.form, texts or [])

    def micro_batches(
        self, rollout: Rollout, epoch: int, mini_batches: list[MiniBatch], outputs: list[Batch]
    ) -> Iterator[dict[str, Any]]:
        """Yield this process's micro-batches of an epoch, as ``compute_loss`` takes them.

        ``outputs`` of the model, kept with their graphs, go to the first micro-batches and are removed from the list,
        so that their activations are freed after the backward pass.
        """
        for number, mini_batch in enumerate(mini_batches):
            # Steps are numbered over the entire run, so a resumed run draws the same texts.
            step = rollout.update * self.args.steps_per_update + epoch * len(mini_batches) + number
            texts = [] if self.ptx is None else self.ptx.draw(step, self.args.ptx_rows, self.args.seed)
            # In every process as many micro-batches: DDP and sharded models make their passes together.
            for index, indices, _ in split_by_rank(mini_batch):
                # The texts of a step are dealt out to its micro-batches over all processes.
                pack = self.pack(rollout, indices, texts[index :: len(mini_batch)])
                if self.objective.learns_likelihood:
                    # Every row counts as supervised: SFT's loss knows no sampling temperature.
                    pack["supervised"] = torch.tensor(len(pack["response_mask"]))
                batch: dict[str, Any] = {
                    "pack": pack,
                    "rollout": rollout.select(indices, self.objective.loss_inputs),
                }
                if outputs:
                    batch["outputs"] = outputs.pop(0)
                yield batch


class UpdateLoader:
    """The Trainer's data loader: micro-batches of rollouts that are sampled when the first one is asked for."""

    def __init__(
        self, make: Callable[[int], Iterator[dict[str, Any]]], start: Callable[[], int], updates: int, per_update: int
    ) -> None:
        """``make(update)`` yields the ``per_update`` micro-batches of an update, or none to end the run. ``start()``
        returns the first update; it is called at iteration, when a resumed run knows it."""
        self._make, self._start, self._updates, self._per_update = make, start, updates, per_update

    def __len__(self) -> int:
        return self._updates * self._per_update

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for update in range(self._start(), self._updates):
            micro_batches = self._make(update)
            # Asking for the first one makes the rollout; only then is it known whether the run goes on.
            first = next(micro_batches, None)
            if first is None:  # the trainer stops here
                return
            yield first
            yield from micro_batches
