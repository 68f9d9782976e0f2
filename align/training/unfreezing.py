"""Which layers are open at which step, and the callback that opens and closes them.

A closed weight has no gradient and no optimizer state: AdamW makes a weight's state with its first gradient, and what
closes loses its own. What is open follows from the step alone, so a resumed run opens what the uninterrupted one had
open, and a checkpoint needs nothing of it. LISA's draws stand in ``lisa.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from align.config.tuning import FullTuning
from align.models.parameter_groups import Place, layer_stack, places, tied_head
from align.pipeline.context import StageContext
from align.training.lisa import drawn_layers

OpenAt = Callable[[int], frozenset[Place]]
"""Step (0 for the first) -> the places whose weights are trained in it."""


def open_at(tuning: FullTuning, model: Any, steps_per_epoch: int, seed: int) -> OpenAt:
    """The schedule of ``tuning`` for ``model``: a tied head counts as embeddings, a score head is always open."""
    _, stack = layer_stack(model)
    count, tied = len(stack), tied_head(model)

    def around(embeddings: bool, head: bool) -> set[Place]:
        found: set[Place] = {"score", "norm"}
        if embeddings or (tied and head):
            found.add("embeddings")
        if head:
            found.add("head")
        return found

    def unfrozen(step: int) -> frozenset[Place]:
        schedule = tuning.unfreeze
        assert schedule is not None
        starts = {start * (1 if schedule.unit == "steps" else steps_per_epoch): n for start, n in schedule.at.items()}
        last = max(opened for start, opened in starts.items() if math.ceil(start) <= step)
        layers: set[Place] = set(range(max(0, count - last), count))
        return frozenset(layers | around(schedule.embeddings and last >= count, schedule.head))

    def sampled(step: int) -> frozenset[Place]:
        lisa = tuning.lisa
        assert lisa is not None
        layers: set[Place] = set(drawn_layers(count, lisa.layers, step // lisa.every, seed))
        return frozenset(layers | around(lisa.embeddings, lisa.head))

    return sampled if tuning.lisa is not None else unfrozen


def steps_per_epoch(trainer: Any) -> int:
    """Optimizer steps of one pass over the trainer's rows, as transformers counts them."""
    args = trainer.args
    rows = int(args.train_batch_size) * max(1, int(args.world_size))
    micro_batches = math.ceil(len(trainer.train_dataset) / rows)
    return max(1, math.ceil(micro_batches / int(args.gradient_accumulation_steps)))


class OpenLayers(TrainerCallback):
    """Opens and closes weights before each step that the schedule has others open in.

    Weights that are frozen when it is made stay so. Those that are closed at every step are frozen at once, before the
    optimizer is made; the others are all open then, so that the optimizer, and DDP, know each of them.
    """

    def __init__(self, model: Any, schedule: OpenAt, steps: Iterable[int], context: StageContext | None = None) -> None:
        """``steps``: all steps of the run."""
        self.model, self.schedule, self.context = model, schedule, context
        where = places(model)
        self.where = {name: (p, where[name]) for name, p in model.named_parameters() if p.requires_grad}
        self.now: frozenset[Place] | None = None
        phases = set(map(schedule, steps))
        ever = frozenset().union(*phases)
        for name, (parameter, place) in list(self.where.items()):
            if place not in ever:
                parameter.requires_grad_(False)
                del self.where[name]
        self.most = max(self._weights(phase) for phase in phases)

    def _weights(self, phase: frozenset[Place]) -> int:
        return sum(p.numel() for p, place in self.where.values() if place in phase)

    def facts(self) -> dict[str, float]:
        """``trainable_parameters`` are those open at once, at most."""
        return {"trainable_parameters": self.most}

    def set_open(self, step: int, optimizer: Any) -> None:
        """Open what the schedule has open in ``step`` and close the rest, whose gradient and state are dropped."""
        wanted = self.schedule(step)
        if wanted == self.now:
            return
        state = getattr(optimizer, "optimizer", optimizer).state
        for parameter, place in self.where.values():
            is_open = place in wanted
            parameter.requires_grad_(is_open)
            if not is_open:
                parameter.grad = None
                state.pop(parameter, None)
        self.now = wanted
        if self.context is not None and (step == 0 or self.schedule(step - 1) != wanted):
            layers = sum(isinstance(place, int) for place in wanted)
            self.context.log(step + 1, layers_open=layers, weights_open=self._weights(wanted))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.set_open(state.global_step, kwargs["optimizer"])


def schedule_layers(context: StageContext, trainer: Any, tuning: FullTuning) -> OpenLayers:
    """The callback for a trl trainer; DDP is told to look for weights that a step does not use."""
    if trainer.args.world_size > 1:
        trainer.args.ddp_find_unused_parameters = True
    schedule = open_at(tuning, trainer.model, steps_per_epoch(trainer), context.seed)
    shown = context if trainer.is_world_process_zero() else None
    return OpenLayers(trainer.model, schedule, range(trainer.args.max_steps), shown)


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of what the optimizer keeps for its weights now."""
    tensors = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
