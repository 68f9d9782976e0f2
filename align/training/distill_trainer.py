"""trl's SFTTrainer with a teacher's distributions as targets, on answers of the data or of the student (GKD).

Only seed and step decide which steps train on the student's own answers. They also seed the sampling, so a resumed run
repeats both. Private methods of transformers and trl are overridden; ``tests/stages/test_distill.py`` covers them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from accelerate.utils import send_to_device
from trl.trainer.sft_trainer import SFTTrainer

from align.models.fast.token_logprobs import logit_transform
from align.training.divergence import Known, Live, Measure, summed_divergence, summed_nll, trunk_and_head
from align.training.epochs import SHARE
from align.training.held_out import scoring
from align.training.order import by_length
from align.training.rows import MASKED, Encoded, collate_labeled
from align.training.teacher import Teacher, answer_states
from align.training.trainers import SCORING_TOKENS, Prepared

Sampler = Callable[[Any, list[list[int]], int], list[list[int]]]
"""Samples a model's answers to prompts, as token ids, for a step."""


class AnswerCollator:
    """Collate ``input_ids``, ``attention_mask``, ``labels`` (B, T); ``row`` (B,) is -1 for sampled answers."""

    def __init__(self, pad: int) -> None:
        self.pad = pad

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return collate_labeled(rows, self.pad) | {"row": torch.tensor([row.get("row", -1) for row in rows])}


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
        """Return the micro-batches of the next step; in on-policy steps the student samples their answers now."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        step = self.state.global_step
        if not batches or not is_on_policy_step(self.args.seed, step, self.on_policy):
            return batches, count
        assert self.sampler is not None
        prompts = [prompt_of(*row) for batch in batches for row in _rows_of(batch)]
        plain = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        # One call samples the answers of all micro-batches, which then go back to their batches in order.
        sampled = iter(zip(prompts, self.sampler(plain, prompts, step), strict=True))
        sampled_batches: list[Any] = []
        for batch in batches:
            rows = []
            for _ in range(len(batch["row"])):
                prompt, answer = next(sampled)
                rows.append({"input_ids": prompt + answer, "labels": [MASKED] * len(prompt) + answer})
            collated = self.data_collator(rows)
            if SHARE in batch:
                # The answers are new, but the micro-batch keeps its weight among the processes.
                collated[SHARE] = batch[SHARE]
            sampled_batches.append({name: value.to(device) for name, value in collated.items()})
        # Sampled answers have other lengths, so the divisor of the step is counted again.
        return sampled_batches, self._get_num_items_in_batch(sampled_batches, device)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the scalar divergence per token, plus ``sft_weight`` times the loss on the data's tokens."""
        plain = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        with self.accelerator.autocast():
            hidden = answer_states(model, plain, inputs)
            total = self.divergence(plain, hidden, inputs)
            # Only answers of the data are imitated. Sampled ones (row -1) are the student's own.
            if self.sft_weight and int(inputs["row"][0]) >= 0:
                shifted = inputs["labels"][:, 1:]
                targets, head = shifted[shifted != MASKED], trunk_and_head(plain)[1]
                total = total + self.sft_weight * summed_nll(targets, hidden, head, logit_transform(plain))
        # The Trainer passes the number of labels in all micro-batches of the step.
        loss = total / (len(hidden) if num_items_in_batch is None else num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = (
                loss * self.accelerator.num_processes
            )  # the count is over all processes, whose gradients are averaged
        return (loss, {"loss": loss}) if return_outputs else loss

    def divergence(self, plain: Any, hidden: torch.Tensor, inputs: Any, known: Sequence[Known] | None = None) -> Any:
        """Return the scalar divergence, summed over the labeled tokens; ``hidden`` (N, H) predicts them."""
        rows = inputs["row"].tolist()
        known = self.known if known is None else known
        teacher: Known | Live
        # Cached tokens exist for rows of the data. Sampled answers (row -1) need the teacher itself.
        if known and rows[0] >= 0:
            ids = torch.cat([known[row].ids for row in rows]).to(hidden.device, torch.long)
            logprobs = torch.cat([known[row].logprobs for row in rows]).to(hidden.device)
            teacher = Known(ids, logprobs)
        else:
            assert self.teacher is not None
            teacher = self.teacher.live(inputs)
        return summed_divergence(self.measure, hidden, trunk_and_head(plain)[1], teacher, logit_transform(plain))


class PreparedDistill(Prepared, _Distilling):  # type: ignore[misc]
    """Rows: ``input_ids``, ``labels`` and ``row``, their index in the training split."""


def is_on_policy_step(seed: int, step: int, share: float) -> bool:
    """Return True for a step on the student's answers: ``share`` of the steps, from seed and step only."""
    return share > 0 and random.Random(f"on-policy:{seed}:{step}").random() < share  # noqa: S311


def _rows_of(batch: Any) -> Iterator[tuple[list[int], list[int]]]:
    for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
        size = int(mask.sum())
        yield ids[:size].tolist(), labels[:size].tolist()


def prompt_of(ids: list[int], labels: list[int]) -> list[int]:
    """Return the tokens before the first labeled one."""
    return ids[: next((index for index, label in enumerate(labels) if label != MASKED), len(ids))]


def held_out(trainer: Any, encoded: Encoded, known: Sequence[Known]) -> dict[str, float]:
    """Return ``divergence`` from the teacher and ``loss`` on the data, in nats per held-out answer token."""
    divergence, nll, tokens = 0.0, 0.0, 0
    plain = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    with scoring(trainer):
        for batch in by_length(encoded.lengths, SCORING_TOKENS):
            inputs = send_to_device(trainer.data_collator([encoded.rows[row] for row in batch]), trainer.args.device)
            hidden = answer_states(plain, plain, inputs)
            shifted = inputs["labels"][:, 1:]
            targets = shifted[shifted != MASKED]
            divergence += float(trainer.divergence(plain, hidden, inputs, known))
            nll += float(summed_nll(targets, hidden, trunk_and_head(plain)[1], logit_transform(plain)))
            tokens += len(targets)
    return {"divergence": divergence / tokens, "loss": nll / tokens}
