"""trl's DPO trainer on rows that are tokenized already, its reference scored once.

What is overridden is private in trl, so ``tests/training/test_trainers.py`` fails when an upgrade moves it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from trl.trainer.dpo_trainer import DPOTrainer

from align.training.order import by_length
from align.training.trainers import SCORING_TOKENS, Prepared


class PreparedDPO(Prepared, DPOTrainer):  # type: ignore[misc]
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
