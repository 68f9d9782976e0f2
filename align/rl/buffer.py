"""Micro-batches of a rollout: which responses are learned from together, in which order, and their tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from accelerate.utils import send_to_device

from align.models.compute.processes import split_by_rank
from align.rl.packing import Batch, Form, plan
from align.rl.prompts import Text, derive_seed
from align.rl.rollout import Rollout

if TYPE_CHECKING:
    from align.rl.arguments import RolloutArguments
    from align.rl.objectives import Objective
    from align.rl.prompts import PtxRows
    from align.training.micro_batches import StepMemory


@dataclass(frozen=True)
class MiniBatch:
    """The responses of one optimizer step."""

    rollout: Rollout
    responses: list[int]
    """Response indices over all processes. Those of similar length follow each other."""
    step: int
    """Number of the optimizer step in the entire run."""
    longest_first: bool = False
    """True if the micro-batches come in reverse order."""

    def micro_batches(self, size: int) -> list[list[int]]:
        """Return the response indices of each micro-batch of ``size`` responses, over all processes."""
        parts = [self.responses[first : first + size] for first in range(0, len(self.responses), size)]
        return parts[::-1] if self.longest_first else parts


@dataclass(frozen=True)
class MicroBatch:
    """The rows that a process learns from in one forward and backward pass."""

    pack: Batch
    """The model's inputs: some of the responses and, behind them, supervised texts."""
    tensors: Batch
    """The objective's ``loss_inputs`` of the responses."""
    outputs: Batch | None = None
    """The model's outputs with their graphs, if the pass that measured the responses is reused."""

    @property
    def width(self) -> int:
        """Columns of the responses' tensors."""
        return int(self.tensors["learn_mask"].shape[1])

    @property
    def ptx_tokens(self) -> float:
        """Tokens of the supervised texts."""
        texts = int(self.pack.get("ptx", 0))
        return float(self.pack["response_mask"][-texts:].sum()) if texts else 0.0

    def to(self, device: torch.device) -> MicroBatch:
        """Return the micro-batch with its inputs on a device."""
        return replace(self, pack=send_to_device(self.pack, device), tensors=send_to_device(self.tensors, device))


class RolloutBuffer:
    """Turns a rollout into micro-batches for an objective, with supervised texts mixed in."""

    def __init__(
        self,
        objective: Objective,
        args: RolloutArguments,
        form: Form,
        pad_id: int,
        ptx: PtxRows | None,
        memory: StepMemory,
    ) -> None:
        self.objective = objective
        self.args = args
        self.config = args.config
        self.form = form
        self.pad_id = pad_id
        self.ptx = ptx
        self.memory = memory
        self.kept_outputs: list[Batch] = []
        """Outputs of the passes that measured the next micro-batches, with their graphs; ``load`` removes them."""

    def plan(self, rollout: Rollout, epoch: int) -> list[MiniBatch]:
        """Return the mini-batches of one epoch, shuffled by the seed, the update and the epoch.

        Every epoch cuts the same rollout anew. Its old log-probabilities and advantages stay the same.
        """
        seed = derive_seed(self.args.seed, "order", rollout.update, epoch, 0)
        planned = plan(
            rollout.groups,
            rollout.lengths,
            num_mini_batches=self.config.num_mini_batches,
            generator=torch.Generator().manual_seed(seed),
        )
        # Steps are numbered over the entire run, so a resumed run draws the same supervised texts.
        first_step = rollout.update * self.config.steps_per_update + epoch * len(planned)
        mini_batches = [MiniBatch(rollout, indices, first_step + number) for number, indices in enumerate(planned)]
        if epoch == 0 and self.count_reused(rollout.update, len(mini_batches[0].micro_batches(self.memory.rows))):
            # Reusing the passes of the longest saves most.
            mini_batches[0] = replace(mini_batches[0], longest_first=True)
        return mini_batches

    def count_reused(self, update: int, micro_batches: int) -> int:
        """Return the number of the first step's micro-batches that are learned from their measuring passes.

        These passes have the same rows and, before that step, the same weights. Returns 0 if the passes differ:
        measuring has no supervised texts, and uses no temperature but the sampling temperature.
        """
        has_own_temperature = self.objective.learns_likelihood and self.config.temperature != 1.0
        if self.ptx is not None or has_own_temperature or self.objective.rests_policy(update):
            return 0
        return math.floor(self.args.reuse_forward * micro_batches)

    def by_length(self, rollout: Rollout) -> list[list[int]]:
        """Return micro-batches of responses of similar length, for measuring without learning."""
        size = self.memory.rows
        # Batch similar lengths to reduce padding; order does not matter without learning.
        order = sorted(range(len(rollout)), key=rollout.lengths.__getitem__)
        return [order[start : start + size] for start in range(0, len(order), size)]

    def pack(self, rollout: Rollout, indices: list[int], texts: list[Text] | None = None) -> Batch:
        """Return model inputs of some of the responses and, behind them, supervised texts."""
        return rollout.pack(indices, self.pad_id, self.form, texts or [])

    def load(self, mini_batch: MiniBatch) -> list[MicroBatch]:
        """Return this process's micro-batches of an optimizer step."""
        rollout = mini_batch.rollout
        parts = mini_batch.micro_batches(self.memory.rows)
        texts = [] if self.ptx is None else self.ptx.draw(mini_batch.step, self.config.ptx_rows, self.args.seed)
        micro_batches = []
        # Every process has as many micro-batches: DDP and sharded models make their passes together.
        for index, indices, _ in split_by_rank(parts):
            # The texts of a step are dealt out to its micro-batches over all processes.
            pack = self.pack(rollout, indices, texts[index :: len(parts)])
            if self.objective.learns_likelihood:
                # Every row counts as supervised: SFT's loss knows no sampling temperature.
                pack["supervised"] = torch.tensor(len(pack["response_mask"]))
            # The outputs leave the list, so their activations are freed after the backward pass.
            outputs = self.kept_outputs.pop(0) if self.kept_outputs else None
            micro_batches.append(MicroBatch(pack, rollout.select(indices, self.objective.loss_inputs), outputs))
        return micro_batches
