"""Holding a model near the weights, or the distributions, it started from, so that it forgets less of what it knew.

``l2`` pulls weights back (L2-SP, arXiv 1802.01483), decoupled from the gradient as AdamW's weight decay is. ``kl`` adds
KL(start || model) over the vocabulary at the answers' tokens (learning without forgetting, arXiv 1606.09282). Left out:
importance per weight (EWC).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from align.errors import UserError
from align.models.precision import round_frozen
from align.models.sharding import full, whole
from align.models.trunk import soft_cap, trunk_and_head
from align.models.tuning.apply import initial_policy
from align.training.token_losses import summed_kl


class PullToStart(TrainerCallback):
    """Before each step: weight -= learning rate * strength * (weight - first weight), for every open weight.

    Costs a copy of what is trained. Adapters are pulled to their own start, where they change nothing.
    """

    def __init__(self, model: Any, strength: float) -> None:
        """``strength`` is per unit of learning rate; ``model`` is as it came in."""
        self.strength = strength
        self.start = {p: p.detach().clone() for p in model.parameters() if p.requires_grad}

    @torch.no_grad()
    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for group in kwargs["optimizer"].param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:  # a closed weight does not move
                    parameter.lerp_(self.start[parameter], min(1.0, group["lr"] * self.strength))

    @torch.no_grad()
    def facts(self) -> dict[str, float]:
        """``moved``: the length of the change as a share of the first weights' length."""
        change = sum(float(full((p - first).double().square().sum())) for p, first in self.start.items())
        length = sum(float(full(first.double().square().sum())) for first in self.start.values())
        return {"moved": math.sqrt(change / length)}


class KLToStart:
    """A loss term: ``weight`` times the mean over supervised tokens of KL(start || model), nats.

    The model's hidden states are read from its own forward pass; the start's cost a second one without gradients. With
    adapters the start is the same model with them switched off, else a frozen copy (in bfloat16 where that is the
    precision).
    """

    of_the_step = False

    def __init__(self, trainer: Any, weight: float, low: bool) -> None:
        """``trainer`` holds the model as it came in. Raises ``UserError`` for a model without distributions to hold."""
        self.weight = weight
        self.model = trainer.model
        trunk, head = trunk_and_head(self.model)
        if head is None:
            raise UserError("anchor: kl holds a model's distributions, and a reward model has none; take `to: l2`.")
        self.copy: tuple[Any, Any] | None = None
        if not hasattr(self.model, "disable_adapter"):
            device = next(trunk.parameters()).device
            with whole(self.model) as plain:
                self.copy = copy.deepcopy(trunk_and_head(plain))
            for module in self.copy:
                module.to(device).requires_grad_(False).eval()
                if low:
                    round_frozen(module)
        elif type(head) is not torch.nn.Linear:
            raise UserError("anchor: kl cannot tell the start's head from an adapted one; take lm_head out of targets.")
        self.hidden: torch.Tensor | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Keep the last hidden states of the forward pass inside."""
        trunk, _ = trunk_and_head(self.model)

        def keep(module: Any, given: Any, output: Any) -> None:
            self.hidden = output[0]

        hook = trunk.register_forward_hook(keep)
        try:
            yield
        finally:
            hook.remove()

    def loss(self, trainer: Any, model: Any, inputs: Any, num_items: Any) -> torch.Tensor:
        """The term for one micro-batch, of the tokens that ``labels`` or ``completion_mask`` of ``inputs`` name."""
        hidden, self.hidden = self.hidden, None
        if "input_ids" not in inputs or not {"labels", "completion_mask"} & set(inputs):
            raise UserError("anchor: kl knows no answers' tokens in this stage's batches; take `to: l2`.")
        if (
            getattr(inputs.get("attention_mask"), "shape", None) != inputs["input_ids"].shape
        ):  # the start would attend from one row to the next
            raise UserError("anchor: kl needs each row to stand alone; leave out packing and padding_free.")
        mask = inputs["labels"] != -100 if "labels" in inputs else inputs["completion_mask"] != 0
        mask = mask[:, 1:]  # (B, T - 1): the state before a token predicts it
        assert hidden is not None, "the forward pass was not seen"
        assert hidden.shape[:2] == inputs["input_ids"].shape, "hidden states are not those of the batch"
        trunk, head = trunk_and_head(self.model)
        names = ("input_ids", "attention_mask", "position_ids")
        given = {name: inputs[name] for name in names if name in inputs}
        # accelerate wraps the trained model's own forward pass in autocast, and nothing else.
        with trainer.accelerator.autocast():
            base, base_head = self._start(trunk, head, given)
            total = summed_kl(base[:, :-1][mask], base_head, hidden[:, :-1][mask], head, soft_cap(self.model))
        mean = total / mask.sum().clamp(min=1)
        trainer.add_metric("kl_to_start", float(mean.detach()))
        if num_items is None:
            alone: torch.Tensor = self.weight * mean
            return alone
        scale = trainer.accelerator.num_processes if trainer.args.average_tokens_across_devices else 1
        term: torch.Tensor = self.weight * scale * total / torch.as_tensor(num_items).clamp(min=1).to(total.device)
        return term

    @torch.no_grad()
    def _start(self, trunk: Any, head: Any, given: dict[str, torch.Tensor]) -> tuple[torch.Tensor, Any]:
        """The start's last hidden states (B, T, H), and the head over them."""
        if self.copy is not None:
            return self.copy[0](**given, use_cache=False)[0], self.copy[1]
        with initial_policy(self.model), _evaluated(trunk):
            return trunk(**given, use_cache=False)[0], head


@contextmanager
def _evaluated(trunk: torch.nn.Module) -> Iterator[None]:
    """Have ``trunk`` in evaluation mode, without the noise and dropout that are for what is trained."""
    training = [module for module in trunk.modules() if module.training]
    trunk.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
