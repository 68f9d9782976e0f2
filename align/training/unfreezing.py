"""Schedules that train some layers in some steps, and the callback that unfreezes and freezes them.

A frozen weight has no gradient and no optimizer state: AdamW creates the state with the first gradient, and freezing
deletes it. The schedule depends on the step only, so a resumed run trains the same layers, and checkpoints need not
store it. LISA (arXiv 2403.17919, algorithm 1) samples the layers, each with equal probability.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from align.config.tuning import FullTuning
from align.models.parameter_groups import ParameterGroup, has_tied_head, layer_stack, parameter_groups
from align.pipeline.context import StageContext

LayerSchedule = Callable[[int], frozenset[ParameterGroup]]
"""Step (0 for the first) -> the parameter groups that are trained in it."""


def layer_schedule(tuning: FullTuning, model: Any, steps_per_epoch: int, seed: int) -> LayerSchedule:
    """Return the schedule of ``tuning`` for ``model``; a tied head counts as embeddings, a score head always trains."""
    _, stack = layer_stack(model)
    count = len(stack)
    tied = has_tied_head(model)

    def around(embeddings: bool, head: bool) -> set[ParameterGroup]:
        groups: set[ParameterGroup] = {"score", "norm"}
        if embeddings or (tied and head):
            groups.add("embeddings")
        if head:
            groups.add("head")
        return groups

    def unfrozen(step: int) -> frozenset[ParameterGroup]:
        schedule = tuning.unfreeze
        assert schedule is not None
        unit = 1 if schedule.unit == "steps" else steps_per_epoch
        reached = [layers for start, layers in schedule.at.items() if math.ceil(start * unit) <= step]
        open_layers = max(reached)
        # Layers open from the last one down.
        layers: set[ParameterGroup] = set(range(max(0, count - open_layers), count))
        return frozenset(layers | around(schedule.embeddings and open_layers >= count, schedule.head))

    def sampled(step: int) -> frozenset[ParameterGroup]:
        lisa = tuning.lisa
        assert lisa is not None
        layers: set[ParameterGroup] = set(sample_layers(count, lisa.layers, step // lisa.every, seed))
        return frozenset(layers | around(lisa.embeddings, lisa.head))

    return sampled if tuning.lisa is not None else unfrozen


def steps_per_epoch(trainer: Any) -> int:
    """Return the optimizer steps of one pass over the trainer's rows, as transformers counts them."""
    args = trainer.args
    rows = int(args.train_batch_size) * max(1, int(args.world_size))
    return max(1, math.ceil(len(trainer.train_dataset) / rows))


class OpenLayers(TrainerCallback):
    """Unfreezes and freezes weights before each step whose groups differ from the step before.

    Weights that are frozen initially stay frozen. Those that train in no step are frozen at once, before the optimizer
    is created. All others are trainable then, so the optimizer and DDP register each of them.
    """

    def __init__(
        self, model: Any, schedule: LayerSchedule, steps: Iterable[int], context: StageContext | None = None
    ) -> None:
        """Prepare ``model`` for the ``steps`` of the run."""
        self.model = model
        self.schedule = schedule
        self.context = context
        where = parameter_groups(model)
        self.where = {name: (p, where[name]) for name, p in model.named_parameters() if p.requires_grad}
        self.now: frozenset[ParameterGroup] | None = None
        # The schedule is a function of the step, so all phases of the run are known in advance.
        phases = set(map(schedule, steps))
        ever = frozenset().union(*phases)
        for name, (parameter, place) in list(self.where.items()):
            if place not in ever:
                parameter.requires_grad_(False)
                del self.where[name]
        self.most = max(self._weights(phase) for phase in phases)

    def _weights(self, phase: frozenset[ParameterGroup]) -> int:
        return sum(p.numel() for p, place in self.where.values() if place in phase)

    def facts(self) -> dict[str, float]:
        """Return ``trainable_parameters``, the most that train in one step."""
        return {"trainable_parameters": self.most}

    def set_open(self, step: int, optimizer: Any) -> None:
        """Unfreeze the groups of ``step`` and freeze the others, deleting their gradients and optimizer state."""
        open_groups = self.schedule(step)
        if open_groups == self.now:
            return
        # accelerate wraps the optimizer.
        state = getattr(optimizer, "optimizer", optimizer).state
        for parameter, place in self.where.values():
            is_open = place in open_groups
            parameter.requires_grad_(is_open)
            if not is_open:
                parameter.grad = None
                state.pop(parameter, None)
        self.now = open_groups
        # A resumed run sets its first phase without logging it again.
        if self.context is not None and (step == 0 or self.schedule(step - 1) != open_groups):
            layers = sum(isinstance(place, int) for place in open_groups)
            self.context.log(step + 1, layers_open=layers, weights_open=self._weights(open_groups))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.set_open(state.global_step, kwargs["optimizer"])


def schedule_layers(context: StageContext, trainer: Any, tuning: FullTuning) -> OpenLayers:
    """Return the callback for a trl trainer; DDP must search for weights that a step does not use."""
    if trainer.args.world_size > 1:
        trainer.args.ddp_find_unused_parameters = True
    schedule = layer_schedule(tuning, trainer.model, steps_per_epoch(trainer), context.seed)
    shown = context if trainer.is_world_process_zero() else None
    return OpenLayers(trainer.model, schedule, range(trainer.args.max_steps), shown)


def sample_layers(count: int, layers: int, period: int, seed: int) -> list[int]:
    """Return ``layers`` of ``count`` layers, without repeats, for one period of LISA, from its arguments only."""
    random = np.random.default_rng([seed, period])
    return sorted(int(layer) for layer in random.choice(count, size=min(layers, count), replace=False))
