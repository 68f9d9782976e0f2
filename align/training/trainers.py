"""trl's trainers, taking rows that are tokenized already, in an order that a resumed run repeats.

What is overridden is private in trl, so ``tests/training/test_trainers.py`` fails when an upgrade moves it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
import trl.trainer.utils
from trl.trainer.reward_trainer import RewardTrainer
from trl.trainer.sft_trainer import SFTTrainer

from align.training.epochs import SHARE, gathering_uneven, is_copy, shared_loader
from align.training.layer_rates import give_layers_their_rates
from align.training.order import GroupedOrder
from align.training.sharded import ShardingTrainer

COUNTED = ("labels", "shift_labels")
"""Inputs by which transformers counts what a step's loss is divided by."""
SCORING_TOKENS = 4096
"""Padded tokens per forward pass without gradients."""


def label_positions_only() -> None:
    """Make trl's fused head score only the positions that have a label, on CPUs too.

    trl 1.16 does so on GPUs alone; elsewhere every prompt and padding token goes through the vocabulary, which with
    49,000 tokens is most of a small model's work. The function is looked up in this module for that choice only.
    """
    trl.trainer.utils._use_triton = lambda device: True  # type: ignore[attr-defined]


class _Float32Head(torch.nn.Linear):
    """A linear layer that stays in float32 under autocast."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return torch.nn.functional.linear(hidden.float(), self.weight, self.bias)


def score_in_float32(model: Any) -> None:
    """Compute a reward model's score in float32: in bfloat16, scores near 4 are 1/32 apart and pairs tie.

    The class is swapped rather than ``forward`` replaced, so that the copy PEFT makes of the head keeps it.
    """
    model.score.__class__ = _Float32Head


class LossTerm(Protocol):
    """Something added to a micro-batch's loss."""

    of_the_step: bool
    """Whether it is a part of something that all micro-batches of a step share out, rather than about this one."""

    def watching(self) -> AbstractContextManager[None]:
        """Entered around trl's own forward pass, for a term that reads what it computes."""

    def loss(self, trainer: Any, model: Any, inputs: Any, num_items: Any) -> torch.Tensor:
        """The term, scaled as trl's loss is: over ``num_items`` where that is given, else as the micro-batch's mean."""


class Prepared(ShardingTrainer):
    """Mixed in before a trl trainer: rows come tokenized, grouped by length, and no model card is written."""

    train_dataset: Any
    row_lengths: list[int]
    layer_decay: float = 1.0
    """Each layer's learning rate as a share of the one's above it (``align.training.layer_rates``)."""
    terms: Sequence[LossTerm] = ()
    """What is added to trl's loss while training (``align.training.extras``)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.share_out()
        if self.args.world_size > 1:
            self.accelerator.gather = gathering_uneven(self.accelerator.gather)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        made = self.optimizer is None
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)  # type: ignore[misc]
        if made and self.layer_decay < 1:
            give_layers_their_rates(optimizer, self.model if model is None else model, self.layer_decay)
        return optimizer

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """trl's loss and the terms, weighted where processes share a step (``align.training.epochs``)."""
        share = inputs.pop(SHARE, None) if isinstance(inputs, dict) else None
        terms = self.terms if self.model.training else ()
        with contextlib.ExitStack() as watched:
            for term in terms:
                watched.enter_context(term.watching())
            found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]
        loss, *rest = found if return_outputs else (found,)
        # A loss over the step's items is a part of the whole as it is; only a copy of another's has to go.
        weight = 1.0 if share is None else share if num_items_in_batch is None else (share > 0).to(share.dtype)
        loss = loss if share is None else loss * weight
        for term in terms:
            own = term.loss(self, model, inputs, num_items_in_batch)
            loss = loss + (own if term.of_the_step else own * weight)
        return (loss, *rest) if return_outputs else loss

    def add_metric(self, name: str, value: float) -> None:
        """Add to what trl logs with the step, as a mean over its micro-batches; its trainers keep that in two ways."""
        kept = getattr(self, "_metrics", None)
        if kept is not None:
            kept["train"][name].append(value)
        else:
            self.store_metrics({name: value}, train_eval="train")  # type: ignore[attr-defined]

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return GroupedOrder(self.row_lengths, self._order_micro_batch, self._rows_per_step, self.args.seed)

    @property
    def _rows_per_step(self) -> int:
        rows: int = self.args.train_batch_size * self.args.gradient_accumulation_steps * max(1, self.args.world_size)
        return rows

    @property
    def _order_micro_batch(self) -> int:
        """Micro-batch of one process, by which rows are ordered however many processes there are."""
        return int(getattr(self.args, "order_micro_batch", self.args.train_batch_size))

    def get_train_dataloader(self) -> Any:
        """trl's, or where processes share a step one that deals them what one process would have seen."""
        plain = super().get_train_dataloader()  # type: ignore[misc]
        if self.args.world_size == 1:
            return plain
        return shared_loader(
            plain.dataset,
            plain.collate_fn,
            self._get_train_sampler(self.train_dataset),
            micro_batch=self._order_micro_batch,
            batch=self._rows_per_step,
            part=self.args.train_batch_size,
            rank=self.args.process_index,
            processes=self.args.world_size,
        )

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: Any) -> Any:
        """What the step's loss is divided by; a copy of another process's micro-batch is not counted."""
        counted = [
            {**batch, **{name: torch.full_like(batch[name], -100) for name in COUNTED if name in batch}}
            if is_copy(batch) else batch
            for batch in batch_samples
        ]  # fmt: skip
        return super()._get_num_items_in_batch(counted, device)  # type: ignore[misc]

    def _track_num_input_tokens(self, inputs: Any) -> None:
        if is_copy(inputs):
            inputs = {**inputs, "attention_mask": torch.zeros_like(inputs["input_ids"])}
        super()._track_num_input_tokens(inputs)  # type: ignore[misc]

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """trl writes one into every checkpoint folder; the artifact's record says more."""


class PreparedSFT(Prepared, SFTTrainer):  # type: ignore[misc]
    """Rows: ``input_ids``, ``labels``."""


class PreparedReward(Prepared, RewardTrainer):  # type: ignore[misc]
    """Rows: ``chosen_ids``, ``rejected_ids``. The score head learns at ``head_learning_rate``."""

    head_learning_rate: float

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        made = self.optimizer is None
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        if made:
            give_head_its_rate(optimizer, self.model if model is None else model, self.head_learning_rate)
        return optimizer


def give_head_its_rate(optimizer: torch.optim.Optimizer, model: Any, rate: float) -> None:
    """Move a reward model's trained head into a parameter group with the learning rate ``rate``."""
    head = {id(p): p for name, p in model.named_parameters() if "score." in name and p.requires_grad}
    for group in list(optimizer.param_groups):
        found = [p for p in group["params"] if id(p) in head]
        group["params"] = [p for p in group["params"] if id(p) not in head]
        if found:
            optimizer.add_param_group({**group, "params": found, "lr": rate})
