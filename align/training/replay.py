"""Replay general data with a stage's own data to reduce forgetting (ptx, arXiv 2203.02155 section 3.5).

Each optimizer step sees ``fraction`` of its rows from the general data, drawn without replacement until all were seen.
Their loss per answer token is added to the stage's loss. The rows depend on the step number only, so a resumed run sees
the same ones. A data recipe can mix the data beforehand instead.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from align.config.launch import rank, world_size
from align.models.fast.token_logprobs import logit_transform
from align.training.divergence import summed_nll, trunk_and_head
from align.training.order import by_length
from align.training.rows import MASKED, Encoded, collate_labeled
from align.training.trainers import SCORING_TOKENS, part_of_step


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
        """Take ``train`` and ``test`` rows with ``input_ids`` and ``labels``; ``rows_per_step`` may be a fraction."""
        self.trainer, self.train, self.test = trainer, train, test
        self.rows_per_step, self.weight, self.seed = rows_per_step, weight, seed
        self.step, self.micro = -1, 0

    def watching(self) -> AbstractContextManager[None]:
        """Return an empty context: the term does not read the stage's own forward pass."""
        return contextlib.nullcontext()

    def rows_of(self, step: int) -> list[int]:
        """Return the rows that optimizer step ``step`` (0 for the first) replays."""
        start, stop = int(step * self.rows_per_step), int((step + 1) * self.rows_per_step)
        return replayed_rows(len(self.train.rows), start, stop, self.seed)

    def loss(self, trainer: Any, model: Any, inputs: Any, num_items: Any) -> torch.Tensor:
        """Return the scalar term of this micro-batch for its share of the step's rows."""
        step = trainer.state.global_step
        micro_batches = trainer.current_gradient_accumulation_steps
        self.micro = self.micro + 1 if step == self.step else 0
        self.step = step
        # The step's rows go to the micro-batches of all processes in turn.
        step_rows, processes = self.rows_of(step), world_size()
        first = self.micro * processes + rank()
        rows = [self.train.rows[row] for row in step_rows[first :: micro_batches * processes]]
        if not rows:
            return torch.zeros((), device=next(self.trainer.model.parameters()).device)
        tokens = sum(_answer_tokens(self.train.rows[row]) for row in step_rows)
        total = self._summed(rows)
        trainer.add_metric("replay_loss", float(total.detach()) / sum(map(_answer_tokens, rows)))
        return self.weight * part_of_step(trainer, total, tokens, num_items)

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
    from align.training.input_checks import check_encoded
    from align.training.rows import encode_supervised, read_split

    config, data = context.config, context.artifact("replay")
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
