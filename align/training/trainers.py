"""trl's three trainers, taking rows that are tokenized already, in an order that a resumed run repeats.

What is overridden is private in trl, so ``tests/training/test_trainers.py`` fails when an upgrade moves it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import trl.trainer.utils
from datasets import Dataset
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.reward_trainer import RewardTrainer
from trl.trainer.sft_trainer import SFTTrainer

from align.training.order import GroupedOrder, by_length

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


class _Prepared:
    """Mixed in before a trl trainer: rows come tokenized, grouped by length, and no model card is written."""

    args: Any
    row_lengths: list[int]

    def _get_train_sampler(self, train_dataset: Any = None) -> GroupedOrder:
        processes = max(1, self.args.world_size)
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps * processes
        return GroupedOrder(self.row_lengths, self.args.train_batch_size, batch, self.args.seed)

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """trl writes one into every checkpoint folder; the artifact's record says more."""


class PreparedSFT(_Prepared, SFTTrainer):  # type: ignore[misc]
    """Rows: ``input_ids``, ``labels``."""


class PreparedReward(_Prepared, RewardTrainer):  # type: ignore[misc]
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


class PreparedDPO(_Prepared, DPOTrainer):  # type: ignore[misc]
    """Rows: ``prompt_ids``, ``chosen_ids``, ``rejected_ids``.

    The reference is the policy before its first step, and its log-probabilities are computed once, before training:
    no second model in memory, no second forward pass per epoch. They are kept in ``cache`` for a resumed run.
    ``before_reference`` is called with the trainer, complete but for them: the last moment at which refusing is cheap.
    """

    def __init__(
        self,
        *,
        cache: Path,
        on_progress: Callable[[int, int], None],
        before_reference: Callable[[Any], object] | None = None,
        **kwargs: Any,
    ) -> None:
        self._cache, self._on_progress, self._before_reference = cache, on_progress, before_reference
        super().__init__(**kwargs)
        # trl copies a fresh adapter as its reference; it is the base model, and scored already.
        model: Any = self.model
        if "ref" in getattr(model, "peft_config", {}):
            model.delete_adapter("ref")

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        check, self._before_reference = self._before_reference, None
        if check is not None:
            check(self)
        file = self._cache / f"reference_{name}.json"
        if file.is_file():
            columns = json.loads(file.read_text(encoding="utf-8"))
        else:
            columns = self._reference(dataset)
            draft = file.with_suffix(".draft")
            draft.write_text(json.dumps(columns), encoding="utf-8")
            draft.rename(file)
        for column, values in columns.items():
            dataset = dataset.add_column(column, values)
        return dataset

    def _reference(self, dataset: Dataset) -> dict[str, list[float]]:
        """``ref_chosen_logps`` and ``ref_rejected_logps``, nats per answer, in the order of ``dataset``."""
        rows = list(dataset)
        lengths = [len(r["prompt_ids"]) + max(len(r["chosen_ids"]), len(r["rejected_ids"])) for r in rows]
        chosen, rejected = [0.0] * len(rows), [0.0] * len(rows)
        done = 0
        model: Any = self.model
        model.eval()
        for batch in by_length(lengths, SCORING_TOKENS // 2):  # two sides a row
            inputs = self._prepare_inputs(self.data_collator([rows[at] for at in batch]))
            with torch.no_grad():
                sides = self.compute_ref_log_probs(model, inputs)
            for at, one, other in zip(batch, sides[0].tolist(), sides[1].tolist(), strict=True):
                chosen[at], rejected[at] = one, other
            done += len(batch)
            self._on_progress(done, len(rows))
        return {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
