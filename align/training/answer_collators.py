"""trl's collators of answers, for answers of several turns: the text between the turns has no loss.

Rows say which tokens are the assistant's (``chosen_mask``, ``rejected_mask``, ``completion_mask``, ``rows.py``). Rows
without these columns are collated as trl does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

MASKS = ("chosen_mask", "rejected_mask", "completion_mask", "KL_completion_mask")
"""Columns of rows whose answers have several turns."""


@dataclass
class PairCollator(DataCollatorForPreference):  # type: ignore[misc]
    """Collates pairs, chosen answers above rejected ones: (2 B, T)."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return trl's batch, with a ``completion_mask`` that has the gaps of the answers."""
        batch: dict[str, Any] = super().torch_call(examples)
        # chunk() returns views, so the changes below reach the batch.
        chosen, rejected = batch["completion_mask"].chunk(2)
        _add_gaps(chosen, examples, "chosen_mask")
        _add_gaps(rejected, examples, "rejected_mask")
        return batch


@dataclass
class UnpairedCollator(DataCollatorForUnpairedPreference):  # type: ignore[misc]
    """Collates single answers, and the mismatched ones of KTO's reference point."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return trl's batch, with masks that have the gaps of the answers."""
        batch: dict[str, Any] = super().torch_call(examples)
        for name in ("completion_mask", "KL_completion_mask"):
            if name in batch:
                _add_gaps(batch[name], examples, name)
        return batch


def _add_gaps(completion_mask: torch.Tensor, rows: Sequence[dict[str, Any]], column: str) -> None:
    """Zero the entries of ``completion_mask`` (B, T) in place that are 0 in a row's own mask."""
    for index, row in enumerate(rows):
        mask = row.get(column)
        if mask is not None:
            start = len(row["prompt_ids"])
            completion_mask[index, start : start + len(mask)] = torch.tensor(mask)
