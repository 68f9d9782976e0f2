"""Reduce forgetting: anchor a model to its initial weights or distributions, or replay general data.

``anchor: l2`` pulls weights back (L2-SP, arXiv 1802.01483), decoupled from the gradient as AdamW's weight decay is.
``anchor: kl`` adds KL(start || model) over the vocabulary at the answers' tokens (learning without forgetting, arXiv
1606.09282). Importance per weight (EWC) is not supported. With ``replay`` each optimizer step sees a fraction of its
rows from the general data (ptx, arXiv 2203.02155 section 3.5), drawn without replacement until all were seen. Their
loss per answer token is added to the stage's loss. The rows depend on the step number only, so a resumed run sees the
same rows. A data recipe can mix the data beforehand instead.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from align.errors import UserError
from align.models.checkpoints.sharding import full_model, full_tensor
from align.models.compute.precision import cast_frozen_to_bf16
from align.models.fast.token_logprobs import logit_transform
from align.models.tuning.apply import initial_policy
from align.training.divergence import summed_kl, summed_nll, trunk_and_head
from align.training.input_checks import check_encoded
from align.training.order import by_length
from align.training.rows import MASKED, Encoded, collate_labeled, encode_supervised, read_split
from align.training.trainers import SCORING_TOKENS, answer_mask, part_of_step


class PullToStart(TrainerCallback):
    """Before each step: weight -= learning rate * strength * (weight - initial weight), for every trained weight.

    Costs one copy of the trained weights. Adapters are pulled to their initial values, which leave the model unchanged.
    """

    def __init__(self, model: Any, strength: float) -> None:
        """Copy the initial weights of ``model``; ``strength`` is per unit of learning rate."""
        self.strength = strength
        self.start = {p: p.detach().clone() for p in model.parameters() if p.requires_grad}

    @torch.no_grad()
    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for group in kwargs["optimizer"].param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:  # not frozen in this step
                    # lerp(start, s) = weight + s (start - weight), with the scheduler's current learning rate.
                    parameter.lerp_(self.start[parameter], min(1.0, group["lr"] * self.strength))

    @torch.no_grad()
    def facts(self) -> dict[str, float]:
        """Return ``moved``: the norm of the change relative to the norm of the initial weights."""
        change = sum(float(full_tensor((p - first).double().square().sum())) for p, first in self.start.items())
        length = sum(float(full_tensor(first.double().square().sum())) for first in self.start.values())
        return {"moved": math.sqrt(change / length)}


class KLToStart:
    """Loss term: ``weight`` times the mean over a step's supervised tokens of KL(initial || model), in nats.

    The model's hidden states come from its own forward pass; the initial model needs a second pass without gradients.
    With adapters it is the same model with adapters disabled, else a frozen copy (in bfloat16 if that is the
    precision).
    """

    has_own_rows = False

    def __init__(self, trainer: Any, weight: float, low: bool) -> None:
        """Use the initial model of ``trainer``. Raises ``UserError`` for a model without a vocabulary head."""
        self.weight = weight
        self.model = trainer.model
        trunk, head = trunk_and_head(self.model)
        if head is None:
            raise UserError("anchor: kl compares distributions, and a reward model has none; set `to: l2`.")
        self.copy: tuple[Any, Any] | None = None
        # A model with adapters is its own start while they are disabled. Any other model needs a copy.
        if not hasattr(self.model, "disable_adapter"):
            device = next(trunk.parameters()).device
            with full_model(self.model) as gathered_model:
                self.copy = copy.deepcopy(trunk_and_head(gathered_model))
            for module in self.copy:
                module.to(device).requires_grad_(False).eval()
                if low:
                    cast_frozen_to_bf16(module)
        elif type(head) is not torch.nn.Linear:
            raise UserError(
                "anchor: kl cannot tell the start's head from one that is adapted or trained; leave lm_head, and an "
                "embedding that it is tied to, out of targets, save_modules and train_tokens, or set `to: l2`."
            )
        self.hidden: torch.Tensor | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, store the last hidden states of the forward pass."""
        trunk, _ = trunk_and_head(self.model)

        def keep(module: Any, args: Any, output: Any) -> None:
            self.hidden = output[0]

        hook = trunk.register_forward_hook(keep)
        try:
            yield
        finally:
            hook.remove()

    def loss(self, trainer: Any, model: Any, inputs: Any) -> torch.Tensor:
        """Return the scalar term of one micro-batch over the tokens in its ``labels`` or ``completion_mask``."""
        hidden = self.hidden
        self.hidden = None
        mask = answer_mask(inputs)
        if "input_ids" not in inputs or mask is None:
            raise UserError("anchor: kl finds no answer tokens in this stage's batches; set `to: l2`.")
        # Without a padding mask the initial model would attend from one row to the next.
        if getattr(inputs.get("attention_mask"), "shape", None) != inputs["input_ids"].shape:
            raise UserError("anchor: kl needs separate rows; turn packing and padding_free off.")
        assert hidden is not None, "the forward pass was not seen"
        assert hidden.shape[:2] == inputs["input_ids"].shape, "hidden states are not those of the batch"
        trunk, head = trunk_and_head(self.model)
        names = ("input_ids", "attention_mask", "position_ids")
        model_inputs = {name: inputs[name] for name in names if name in inputs}
        # accelerate wraps only the trained model's forward pass in autocast.
        with trainer.accelerator.autocast():
            base, base_head = self._start(trunk, head, model_inputs)
            total = summed_kl(base[:, :-1][mask], base_head, hidden[:, :-1][mask], head, logit_transform(self.model))
        trainer.add_metric("kl_to_start", float(total.detach() / mask.sum().clamp(min=1)))
        return self.weight * part_of_step(total, trainer.step_tokens)

    @torch.no_grad()
    def _start(self, trunk: Any, head: Any, model_inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, Any]:
        """Return the initial model's last hidden states (B, T, H) and its head."""
        if self.copy is not None:
            return self.copy[0](**model_inputs, use_cache=False)[0], self.copy[1]
        with initial_policy(self.model), _evaluated(trunk):
            return trunk(**model_inputs, use_cache=False)[0], head


@contextmanager
def _evaluated(trunk: torch.nn.Module) -> Iterator[None]:
    """Inside, ``trunk`` is in evaluation mode: no noise and no dropout."""
    training = [module for module in trunk.modules() if module.training]
    trunk.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def replayed_rows(count: int, start: int, stop: int, seed: int) -> list[int]:
    """Return items ``start`` to ``stop`` of an endless sequence of the rows 0 to ``count`` - 1, shuffled per pass."""
    rows: list[int] = []
    while start < stop:
        # Each pass over the data has its own permutation, seeded by its number.
        turn, offset = divmod(start, count)
        order = np.random.default_rng([seed, turn]).permutation(count)
        part = order[offset : offset + stop - start]
        rows += [int(row) for row in part]
        start += len(part)
    return rows


class Replay(TrainerCallback):
    """Loss term: ``weight`` times the mean of -log p over the answers' tokens of a step's replayed rows.

    As a callback it has no effect. ``scores`` evaluate the general test rows.
    """

    has_own_rows = True

    def __init__(
        self, trainer: Any, train: Encoded, test: Encoded, *, rows_per_step: float, weight: float, seed: int
    ) -> None:
        """Use ``train`` and ``test`` rows with ``input_ids`` and ``labels``; ``rows_per_step`` may be a fraction."""
        self.trainer = trainer
        self.train = train
        self.test = test
        self.rows_per_step = rows_per_step
        self.weight = weight
        self.seed = seed

    def watching(self) -> AbstractContextManager[None]:
        """Return an empty context: the term does not read the stage's own forward pass."""
        return contextlib.nullcontext()

    def rows_of(self, step: int) -> list[int]:
        """Return the rows that optimizer step ``step`` (0 for the first) replays."""
        # A step's rows begin behind the rows of the step before, so fractions add up over the steps.
        start = int(step * self.rows_per_step)
        stop = int((step + 1) * self.rows_per_step)
        return replayed_rows(len(self.train.rows), start, stop, self.seed)

    def loss(self, trainer: Any, model: Any, inputs: Any) -> torch.Tensor:
        """Return the scalar term of this micro-batch for its share of the step's rows."""
        # The step's rows go to the micro-batches of all processes in turn.
        step_rows = self.rows_of(trainer.state.global_step)
        number, micro_batches = trainer.part
        rows = [self.train.rows[row] for row in step_rows[number::micro_batches]]
        if not rows:
            return torch.zeros((), device=next(self.trainer.model.parameters()).device)
        tokens = sum(_answer_tokens(self.train.rows[row]) for row in step_rows)
        total = self._summed(rows)
        trainer.add_metric("replay_loss", float(total.detach()) / sum(map(_answer_tokens, rows)))
        return self.weight * part_of_step(total, tokens)

    def _summed(self, rows: Sequence[dict[str, list[int]]]) -> torch.Tensor:
        """Return the summed loss of the answers' tokens of ``rows``, in nats."""
        trunk, head = trunk_and_head(self.trainer.model)
        device = next(trunk.parameters()).device
        batch = {name: tensor.to(device) for name, tensor in collate_labeled(rows, pad=0).items()}
        labels = batch.pop("labels")[:, 1:]
        with self.trainer.accelerator.autocast():
            hidden = trunk(**batch, use_cache=False)[0][:, :-1]
            is_label = labels != MASKED
            return summed_nll(labels[is_label], hidden[is_label], head, logit_transform(self.trainer.model))

    def scores(self) -> dict[str, float]:
        """Return ``replay_loss``: nats per answer token of the general test rows."""
        model = self.trainer.model
        training = model.training
        model.eval()
        with torch.no_grad():
            batches = by_length(self.test.lengths, SCORING_TOKENS)
            total = sum(float(self._summed([self.test.rows[row] for row in batch])) for batch in batches)
        model.train(training)
        return {"replay_loss": total / sum(map(_answer_tokens, self.test.rows))}

    def facts(self) -> dict[str, Any]:
        """Return ``replayed_rows``, the number of rows seen; repeats count again."""
        return {"replayed_rows": int(self.trainer.state.global_step * self.rows_per_step)}


def _answer_tokens(row: dict[str, list[int]]) -> int:
    return sum(label != MASKED for label in row["labels"][1:])


def make_replay(context: Any, trainer: Any) -> Replay:
    """Return the term for a stage whose config has ``replay``, with a warning for rows that do not fit.

    Raises ``UserError`` when no row can be used.
    """
    config = context.config
    data = context.artifact("replay")
    encoded = {}
    for split, most in (("train", None), ("test", config.eval_rows)):
        rows = read_split(data.split(split), most, f"{context.name}: replay")
        encoded[split] = encode_supervised(trainer.processing_class, rows, config.max_length)
        check_encoded(context, encoded[split], len(rows), f"replayed {split}")
    ratio = config.replay_fraction / (1 - config.replay_fraction)
    return Replay(
        trainer,
        encoded["train"],
        encoded["test"],
        rows_per_step=config.batch_size * ratio,
        weight=ratio if config.replay_weight is None else config.replay_weight,
        seed=context.seed,
    )
