"""General data learned beside a stage's own (ptx, arXiv 2203.02155 section 3.5), so that less is forgotten.

Each optimizer step sees ``fraction`` of its rows from the general data, drawn without repeats until all had their turn;
their loss per token of the answers is added to the stage's, whichever that is. Which rows a step sees follows from its
number, so a resumed run sees the same. Left out: mixing at the source, which a data recipe does.
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
from align.models.trunk import soft_cap, trunk_and_head
from align.training.order import by_length
from align.training.rows import MASKED, Encoded
from align.training.token_losses import summed_nll

SCORING_TOKENS = 4096
"""Padded tokens per forward pass without gradients."""


def drawn(count: int, start: int, stop: int, seed: int) -> list[int]:
    """Numbers ``start`` to ``stop`` of an endless series of the rows 0 to ``count`` - 1, each pass in another order."""
    found: list[int] = []
    while start < stop:
        turn, at = divmod(start, count)
        order = np.random.default_rng([seed, turn]).permutation(count)
        taken = order[at : at + stop - start]
        found += [int(row) for row in taken]
        start += len(taken)
    return found


class Replay(TrainerCallback):
    """A loss term: ``weight`` times the mean over the answers' tokens of a step's replayed rows of -log p.

    As a callback it changes nothing; ``scores`` tell how well the general test rows are still answered.
    """

    of_the_step = True

    def __init__(
        self, trainer: Any, train: Encoded, test: Encoded, *, rows_per_step: float, weight: float, seed: int
    ) -> None:
        """``train`` and ``test`` have ``input_ids`` and ``labels``; a fraction of ``rows_per_step`` is carried over."""
        self.trainer, self.train, self.test = trainer, train, test
        self.rows_per_step, self.weight, self.seed = rows_per_step, weight, seed
        self.step, self.micro = -1, 0

    def watching(self) -> AbstractContextManager[None]:
        """Nothing of the stage's own forward pass is read."""
        return contextlib.nullcontext()

    def rows_of(self, step: int) -> list[int]:
        """The rows that optimizer step ``step`` (0 for the first) replays."""
        ends = (int(step * self.rows_per_step), int((step + 1) * self.rows_per_step))
        return drawn(len(self.train.rows), *ends, self.seed)

    def loss(self, trainer: Any, model: Any, inputs: Any, num_items: Any) -> torch.Tensor:
        """This micro-batch's part: it takes turns with the step's others, in all processes, in taking its rows."""
        step, parts = trainer.state.global_step, trainer.current_gradient_accumulation_steps
        self.step, self.micro = step, self.micro + 1 if step == self.step else 0
        every, processes = self.rows_of(step), world_size()
        mine = [self.train.rows[row] for row in every[self.micro * processes + rank() :: parts * processes]]
        if not mine:
            return torch.zeros((), device=next(self.trainer.model.parameters()).device)
        tokens = sum(_answer_tokens(self.train.rows[row]) for row in every)
        total = self._summed(mine)
        trainer.add_metric("replay_loss", float(total.detach()) / sum(map(_answer_tokens, mine)))
        # Without num_items the Trainer takes the mean over micro-batches, of which this is to be a sum; and in any case
        # gradients are averaged over processes.
        return self.weight * total / tokens * processes * (parts if num_items is None else 1)

    def _summed(self, rows: Sequence[dict[str, list[int]]]) -> torch.Tensor:
        """Summed loss of the answers' tokens of ``rows``, nats."""
        trunk, head = trunk_and_head(self.trainer.model)
        device = next(trunk.parameters()).device
        longest = max(len(row["input_ids"]) for row in rows)
        shape = (len(rows), longest)
        ids, labels = torch.zeros(shape, dtype=torch.long), torch.full(shape, MASKED)  # (B, T)
        mask = torch.zeros(shape, dtype=torch.long)
        for at, row in enumerate(rows):
            length = len(row["input_ids"])
            ids[at, :length] = torch.tensor(row["input_ids"])
            labels[at, :length] = torch.tensor(row["labels"])
            mask[at, :length] = 1
        ids, labels, mask = ids.to(device), labels.to(device)[:, 1:], mask.to(device)
        with self.trainer.accelerator.autocast():
            hidden = trunk(input_ids=ids, attention_mask=mask, use_cache=False)[0][:, :-1]
            kept = labels != MASKED
            return summed_nll(labels[kept], hidden[kept], head, soft_cap(self.trainer.model))

    def scores(self) -> dict[str, float]:
        """``replay_loss``: nats per token of the general test rows' answers."""
        model = self.trainer.model
        training = model.training
        model.eval()
        with torch.no_grad():
            batches = by_length(self.test.lengths, SCORING_TOKENS)
            total = sum(float(self._summed([self.test.rows[at] for at in batch])) for batch in batches)
        model.train(training)
        return {"replay_loss": total / sum(map(_answer_tokens, self.test.rows))}

    def facts(self) -> dict[str, Any]:
        """``replayed_rows``: how many rows were seen, those seen twice counted twice."""
        return {"replayed_rows": int(self.trainer.state.global_step * self.rows_per_step)}


def _answer_tokens(row: dict[str, list[int]]) -> int:
    return sum(label != MASKED for label in row["labels"][1:])


def make_replay(context: Any, trainer: Any) -> Replay:
    """The term for a stage whose config names ``replay``; rows that do not fit are counted and warned of.

    Raises ``UserError`` when no row of it can be used.
    """
    from align.training.input_checks import check_encoded
    from align.training.rows import encode_supervised, read_split

    config, data = context.config, context.artifact("replay")
    found = {}
    for split, most in (("train", None), ("test", config.eval_rows)):
        rows = read_split(data.split(split), most, f"{context.name}: replay")
        found[split] = encode_supervised(trainer.processing_class, rows, config.max_length)
        check_encoded(f"{context.name}: replay", found[split], len(rows), split, config.max_length, context.warn)
    ratio = config.replay_fraction / (1 - config.replay_fraction)
    return Replay(
        trainer,
        found["train"],
        found["test"],
        rows_per_step=config.batch_size * ratio,
        weight=ratio if config.replay_weight is None else config.replay_weight,
        seed=context.seed,
    )
