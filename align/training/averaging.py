"""An exponential average of the trained weights, kept beside them: what is scored and saved in their place.

With adapters it is the adapters that are averaged, each factor by itself: the product of two averages, not the average
of the products. Left out: averages over runs, which the stage ``merge`` makes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from align.models.sharding import forget_gathered, full, is_sharded, part

FILE = "averages.safetensors"
"""The averages in a checkpoint's folder."""


def decay_at(step: int, decay: float) -> float:
    """``decay`` after a rise, (1 + step) / (10 + step), without which short runs would keep their first weights."""
    return min(decay, (1 + step) / (10 + step))


class AverageWeights(TrainerCallback):
    """Averages every trainable weight after each step, in float32; at the end the averages are the model's weights.

    Costs a copy of what is trained. Weights that are closed for now (``unfreezing.py``) are averaged all the same.
    """

    def __init__(self, model: Any, decay: float) -> None:
        self.model, self.decay = model, decay
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.averages = {name: p.detach().clone() for name, p in self.trained.items()}
        self.in_place = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the averages of the checkpoint that is resumed from."""
        if state.global_step == 0:
            return
        kept = load_file(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / FILE)
        for name, average in self.averages.items():
            average.copy_(part(kept[name], average))

    @torch.no_grad()
    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """average = decay * average + (1 - decay) * weight"""
        share = 1 - decay_at(state.global_step, self.decay)
        for name, parameter in self.trained.items():
            self.averages[name].lerp_(parameter.detach(), share)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        whole = {name: full(average).contiguous() for name, average in self.averages.items()}
        if state.is_world_process_zero:
            save_file(whole, Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / FILE)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
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
        """Exchange weights and averages; the optimizer knows the parameters and notices nothing."""
        forget_gathered(self.model)
        for name, parameter in self.trained.items():
            if is_sharded(self.model):  # what is gathered is read from the parts' own memory
                held = parameter.clone()
                parameter.copy_(self.averages[name])
                self.averages[name] = held
            else:
                parameter.data, self.averages[name] = self.averages[name], parameter.data
