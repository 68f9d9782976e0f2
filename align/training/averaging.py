"""Exponential moving average (EMA) of the trained weights, which is scored and saved in their place.

For adapters each factor is averaged by itself: the product of two averages, not the average of the products. The stage
``merge`` computes averages over runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from align.models.checkpoints.sharding import full_tensor, is_sharded, local_shard, reshard

FILE = "averages.safetensors"
"""The averages in a checkpoint's folder."""


def decay_at(step: int, decay: float) -> float:
    """Return the decay of a step: at most (1 + step) / (10 + step), or short runs would keep their initial weights."""
    return min(decay, (1 + step) / (10 + step))


class AverageWeights(TrainerCallback):
    """Averages every trainable weight after each step, in float32; at the end the averages become the model's weights.

    Costs one copy of the trained weights. The average includes weights that are frozen for some steps
    (``unfreezing.py``).
    """

    def __init__(self, model: Any, decay: float) -> None:
        self.model = model
        self.decay = decay
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.averages = {name: p.detach().clone() for name, p in self.trained.items()}
        self.in_place = False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Load the averages of the checkpoint that training resumes from."""
        if state.global_step == 0:
            return
        saved = load_file(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / FILE)
        for name, average in self.averages.items():
            average.copy_(local_shard(saved[name], average))

    @torch.no_grad()
    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Update: average = decay * average + (1 - decay) * weight."""
        # average += (1 - decay) (weight - average)
        share = 1 - decay_at(state.global_step, self.decay)
        for name, parameter in self.trained.items():
            self.averages[name].lerp_(parameter.detach(), share)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        averages = {name: full_tensor(average).contiguous() for name, average in self.averages.items()}
        if state.is_world_process_zero:
            save_file(averages, Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / FILE)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        # From here on the averages are the result, so scoring() swaps no more.
        self._swap()
        self.in_place = True

    @contextmanager
    def scoring(self) -> Iterator[None]:
        """Inside, the model's weights are the averages."""
        if self.in_place:
            yield
            return
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        """Swap weights and averages inside the same parameters, which the optimizer keeps."""
        reshard(self.model)
        for name, parameter in self.trained.items():
            if is_sharded(self.model):  # gathering reads the shards' own memory, so values are copied
                weights = parameter.clone()
                parameter.copy_(self.averages[name])
                self.averages[name] = weights
            else:
                parameter.data, self.averages[name] = self.averages[name], parameter.data
