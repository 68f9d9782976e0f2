"""trl's SFTTrainer with a teacher's distributions in place of the rows' tokens, on answers of data or student.

Which steps learn from the student's own answers follows from the seed and the step alone, and so do the answers' seeds:
a resumed run repeats both. What is overridden is private in transformers and trl (``tests/training/test_distill.py``).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from trl.trainer.sft_trainer import SFTTrainer

from align.models.trunk import soft_cap, trunk_and_head
from align.training.divergence import Known, Live, Measure, summed_divergence
from align.training.epochs import SHARE
from align.training.held_out import scoring
from align.training.order import by_length
from align.training.rows import MASKED, Encoded
from align.training.teacher import Teacher, answer_states
from align.training.token_losses import summed_nll
from align.training.trainers import SCORING_TOKENS, Prepared

Sampler = Callable[[Any, list[list[int]], int], list[list[int]]]
"""Answers of a model, given prompts' token ids and the step."""


class AnswerCollator:
    """Right-padded ``input_ids``, ``attention_mask``, ``labels``; ``row`` (B,) is -1 for a student's own answer."""

    def __init__(self, pad: int) -> None:
        self.pad = pad

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        width = max(len(row["input_ids"]) for row in rows)
        ids = torch.full((len(rows), width), self.pad)  # (B, T)
        labels = torch.full((len(rows), width), MASKED)
        mask = torch.zeros((len(rows), width), dtype=torch.long)
        for at, row in enumerate(rows):
            size = len(row["input_ids"])
            ids[at, :size], labels[at, :size] = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
            mask[at, :size] = 1
        found = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        return found | {"row": torch.tensor([row.get("row", -1) for row in rows])}


class _Distilling(SFTTrainer):  # type: ignore[misc]
    measure: Measure
    teacher: Teacher | None = None
    known: Sequence[Known] = ()
    sft_weight: float = 0.0
    on_policy: float = 0.0
    sampler: Sampler | None = None

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["input_ids", "labels", "row"]  # type: ignore[assignment]

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The micro-batches of the next step; in a share of the steps with answers that the student samples now."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        step = self.state.global_step
        if not batches or not own_answers(self.args.seed, step, self.on_policy):
            return batches, count
        assert self.sampler is not None
        prompts = [prompt_of(*row) for batch in batches for row in _rows_of(batch)]
        plain = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        answers = iter(self.sampler(plain, prompts, step))
        places = iter(prompts)
        own: list[Any] = []
        for batch in batches:
            pairs = [(next(places), next(answers)) for _ in range(len(batch["row"]))]
            made = self.data_collator([
                {"input_ids": prompt + answer, "labels": [MASKED] * len(prompt) + answer} for prompt, answer in pairs
            ])  # fmt: skip
            kept = {SHARE: batch[SHARE]} if SHARE in batch else {}
            own.append({name: value.to(device) for name, value in (made | kept).items()})
        return own, self._get_num_items_in_batch(own, device)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Divergence per token, and the data's tokens beside it."""
        plain = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        with self.accelerator.autocast():
            hidden = answer_states(model, plain, inputs)
            total = self.divergence(plain, hidden, inputs)
            if self.sft_weight and int(inputs["row"][0]) >= 0:
                shifted = inputs["labels"][:, 1:]
                targets, head = shifted[shifted != MASKED], trunk_and_head(plain)[1]
                total = total + self.sft_weight * summed_nll(targets, hidden, head, soft_cap(plain))
        loss = total / (len(hidden) if num_items_in_batch is None else num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # the count is of all processes, whose gradients are averaged
        return (loss, {"loss": loss}) if return_outputs else loss

    def divergence(self, plain: Any, hidden: torch.Tensor, inputs: Any, known: Sequence[Known] | None = None) -> Any:
        """Summed over the batch's labeled tokens."""
        rows = inputs["row"].tolist()
        known = self.known if known is None else known
        said: Known | Live
        if known and rows[0] >= 0:
            device = hidden.device
            ids = torch.cat([known[row].ids for row in rows]).to(device, torch.long)
            said = Known(ids, torch.cat([known[row].logprobs for row in rows]).to(device))
        else:
            assert self.teacher is not None
            said = self.teacher.live(inputs)
        return summed_divergence(self.measure, hidden, trunk_and_head(plain)[1], said, soft_cap(plain))


class PreparedDistill(Prepared, _Distilling):  # type: ignore[misc]
    """Rows: ``input_ids``, ``labels`` and ``row``, their number in the training split."""


def own_answers(seed: int, step: int, share: float) -> bool:
    """Whether a step learns from the student's answers: ``share`` of the steps, by seed and step alone."""
    return share > 0 and random.Random(f"on-policy:{seed}:{step}").random() < share  # noqa: S311


def _rows_of(batch: Any) -> Iterator[tuple[list[int], list[int]]]:
    for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
        size = int(mask.sum())
        yield ids[:size].tolist(), labels[:size].tolist()


def prompt_of(ids: list[int], labels: list[int]) -> list[int]:
    """The tokens before the first one that is learned."""
    return ids[: next((at for at, label in enumerate(labels) if label != MASKED), len(ids))]


def held_out(trainer: Any, encoded: Encoded, known: Sequence[Known]) -> dict[str, float]:
    """``divergence`` from the teacher and ``loss`` on the data, nats per token of the held-out answers."""
    apart, nll, tokens = 0.0, 0.0, 0
    plain = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    with scoring(trainer):
        for batch in by_length(encoded.lengths, SCORING_TOKENS):
            inputs = trainer._prepare_inputs(trainer.data_collator([encoded.rows[at] for at in batch]))
            hidden = answer_states(plain, plain, inputs)
            shifted = inputs["labels"][:, 1:]
            targets = shifted[shifted != MASKED]
            apart += float(trainer.divergence(plain, hidden, inputs, known))
            nll += float(summed_nll(targets, hidden, trunk_and_head(plain)[1], soft_cap(plain)))
            tokens += len(targets)
    return {"divergence": apart / tokens, "loss": nll / tokens}
