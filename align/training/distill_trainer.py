"""Distillation (GKD): trl's SFTTrainer with a teacher's distributions as targets, on the data's or student's answers.

Only seed and step decide which steps train on the student's own answers. They also seed the sampling, so a resumed run
repeats both. The teacher's distributions are its hidden states in memory, or its likeliest tokens from a cache. The
cached tokens depend on the teacher's weights and the rows' tokens, not on how the student learns: another run finds
them in the store's cache and needs no teacher in memory. Private methods of transformers and trl are overridden;
``tests/stages/test_distill.py`` covers them.
"""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from trl.trainer.sft_trainer import SFTTrainer

from align.inference.protocol import Response
from align.models.compute.processes import all_gather, rank_range
from align.models.fast.token_logprobs import logit_transform
from align.store.fingerprint import canonical
from align.training.divergence import (
    CHUNK,
    Live,
    Measure,
    TopTokens,
    summed_divergence,
    summed_nll,
    trunk_and_head,
)
from align.training.held_out import row_batches, scoring
from align.training.micro_batches import StepRows
from align.training.order import by_length
from align.training.rows import MASKED, Encoded, collate_labeled
from align.training.sealed_tensors import read_tensors, write_tensors
from align.training.trainers import SCORING_TOKENS, Prepared

Sampler = Callable[[Any, list[list[int]], int], list[Response]]
"""Samples a model's answers to prompts, token ids, for a step."""
Recorder = Callable[[int, list[int], list[list[int]], list[Response]], None]
"""Stores the answers of a step, with the numbers of the rows whose prompts they have, and these prompts."""


class AnswerCollator:
    """Collate ``input_ids``, ``attention_mask``, ``labels`` (B, T); ``row`` (B,) is negative for sampled answers."""

    def __init__(self, pad: int) -> None:
        self.pad = pad

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return collate_labeled(rows, self.pad) | {"row": torch.tensor([row.get("row", -1) for row in rows])}


class _Distilling(SFTTrainer):  # type: ignore[misc]
    measure: Measure
    teacher: Teacher | None = None
    top_tokens: Sequence[TopTokens] = ()
    sft_weight: float = 0.0
    on_policy: float = 0.0
    sampler: Sampler | None = None
    label_sampled: Callable[[list[dict[str, Any]], list[int]], list[TopTokens]] | None = None
    """Returns a teacher's tokens for sampled rows, given the numbers of the rows whose prompts they have. None if
    ``teacher`` reads the batches itself."""
    record: Recorder | None = None
    sampled_tokens: Sequence[TopTokens] = ()
    """Teacher's tokens for the rows that the current step sampled; row -1 has the first."""

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["input_ids", "labels", "row"]  # type: ignore[assignment]

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Return the rows of the next step; in on-policy steps the student samples their answers now."""
        steps, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        step = self.state.global_step
        if not steps or not is_on_policy_step(self.args.seed, step, self.on_policy):
            return steps, count
        assert self.sampler is not None
        # Each process samples and labels a part of the rows, and all of them get all rows.
        part = rank_range(len(steps[0].rows))
        originals = [steps[0].rows[index] for index in part]
        prompts = [prompt_of(row["input_ids"], row["labels"]) for row in originals]
        student = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        # A process without rows samples one as well, because all of them gather the weights of a sharded student.
        first = steps[0].rows[0]
        asked = prompts or [prompt_of(first["input_ids"], first["labels"])]
        answers = self.sampler(student, asked, step)[: len(prompts)]
        numbers = [int(row["row"]) for row in originals]
        if self.record is not None:
            self.record(step, numbers, prompts, answers)
        rows: list[dict[str, Any]] = [
            sampled_row(prompt, answer) | {"row": -1 - index}
            for index, prompt, answer in zip(part, prompts, answers, strict=True)
        ]
        if self.label_sampled is not None:
            self.sampled_tokens = [tokens for own in all_gather(self.label_sampled(rows, numbers)) for tokens in own]
        sampled = [StepRows([row for own in all_gather(rows) for row in own], steps[0].collate)]
        # Sampled answers have other lengths, so the divisor of the step is counted again.
        return sampled, self._get_num_items_in_batch(sampled, device)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the scalar divergence per token, plus ``sft_weight`` times the loss on the data's tokens."""
        student = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        with self.accelerator.autocast():
            hidden = answer_states(model, student, inputs)
            total = self.divergence(student, hidden, inputs)
            # Only answers of the data are imitated. Sampled answers (negative rows) are the student's own.
            if self.sft_weight and int(inputs["row"][0]) >= 0:
                shifted = inputs["labels"][:, 1:]
                targets, head = shifted[shifted != MASKED], trunk_and_head(student)[1]
                total = total + self.sft_weight * summed_nll(targets, hidden, head, logit_transform(student))
        # The Trainer passes the number of labels in all micro-batches of the step.
        loss = total / (len(hidden) if num_items_in_batch is None else num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # The count is over all processes, whose gradients are averaged.
            loss = loss * self.accelerator.num_processes
        return (loss, {"loss": loss}) if return_outputs else loss

    def divergence(
        self, student: Any, hidden: torch.Tensor, inputs: Any, top_tokens: Sequence[TopTokens] | None = None
    ) -> Any:
        """Return the scalar divergence, summed over the labeled tokens; ``hidden`` (N, H) predicts them."""
        rows = inputs["row"].tolist()
        top_tokens = self.top_tokens if top_tokens is None else top_tokens
        teacher: TopTokens | Live
        if rows[0] < 0:
            top_tokens = self.sampled_tokens
            rows = [-1 - row for row in rows]
        # A teacher in memory reads sampled answers, and without ``top_k`` all rows.
        if top_tokens:
            ids = torch.cat([top_tokens[row].ids for row in rows]).to(hidden.device, torch.long)
            logprobs = torch.cat([top_tokens[row].logprobs for row in rows]).to(hidden.device)
            teacher = TopTokens(ids, logprobs)
        else:
            assert self.teacher is not None
            teacher = self.teacher.live(inputs)
        return summed_divergence(self.measure, hidden, trunk_and_head(student)[1], teacher, logit_transform(student))


class PreparedDistill(Prepared, _Distilling):  # type: ignore[misc]
    """Rows: ``input_ids``, ``labels`` and ``row``, their index in the training split."""


def is_on_policy_step(seed: int, step: int, share: float) -> bool:
    """Return True for a step on the student's answers: ``share`` of the steps, from seed and step only."""
    return share > 0 and random.Random(f"on-policy:{seed}:{step}").random() < share  # noqa: S311


def sampled_row(prompt: list[int], answer: Response) -> dict[str, Any]:
    """Return the row of a sampled answer. Tokens that a thinking budget forced have no labels."""
    labels = list(answer.token_ids)
    for position in answer.forced:
        labels[position] = MASKED
    return {"input_ids": prompt + answer.token_ids, "labels": [MASKED] * len(prompt) + labels}


def prompt_of(ids: list[int], labels: list[int]) -> list[int]:
    """Return the tokens before the first labeled token."""
    return ids[: next((index for index, label in enumerate(labels) if label != MASKED), len(ids))]


def held_out(trainer: Any, encoded: Encoded, top_tokens: Sequence[TopTokens]) -> dict[str, float]:
    """Return ``divergence`` from the teacher and ``loss`` on the data, in nats per held-out answer token."""
    divergence, nll, tokens = 0.0, 0.0, 0
    student = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    with scoring(trainer):
        for _, inputs in row_batches(trainer, encoded):
            hidden = answer_states(student, student, inputs)
            shifted = inputs["labels"][:, 1:]
            targets = shifted[shifted != MASKED]
            divergence += float(trainer.divergence(student, hidden, inputs, top_tokens))
            nll += float(summed_nll(targets, hidden, trunk_and_head(student)[1], logit_transform(student)))
            tokens += len(targets)
    return {"divergence": divergence / tokens, "loss": nll / tokens}


LOG = logging.getLogger(__name__)

COLUMNS = ("ids", "logprobs")
"""Tensors of a cache file, and fields of ``TopTokens``."""
VERSION = 3
"""Part of the key; increased when the same weights and rows should give other numbers."""


@contextmanager
def hidden_states_of(model: Any) -> Any:
    """Inside, yield a list that collects the trunk's (B, T, H) hidden states, whatever wraps the model."""
    states: list[torch.Tensor] = []
    trunk = trunk_and_head(model)[0]
    handle = trunk.register_forward_hook(lambda module, args, output: states.append(output[0]))
    try:
        yield states
    finally:
        handle.remove()


def answer_states(called: Any, student: Any, inputs: Any) -> torch.Tensor:
    """Return the (N, H) hidden states that predict a batch's N labeled tokens, in order, by one call of ``called``.

    ``student`` is the same model without its parallel wrapper. The head runs at no position.
    """
    # A hook reads the hidden states, so the call goes through the parallel wrapper, which gradients require. The head
    # is called with an empty selection. The last position would be a slice, for which torch's CPU product copies the
    # head once a row.
    ids = inputs["input_ids"]
    nothing = torch.empty(0, dtype=torch.long, device=ids.device)
    with hidden_states_of(student) as hidden_states:
        called(input_ids=ids, attention_mask=inputs["attention_mask"], use_cache=False, logits_to_keep=nothing)
    # Methods with virtual tokens return more positions than the row has.
    states = hidden_states[-1][:, -ids.shape[1] :]  # (B, T, H), without virtual tokens in front
    predicting: torch.Tensor = states[:, :-1][inputs["labels"][:, 1:] != MASKED]
    return predicting


@dataclass(frozen=True)
class Teacher:
    """A frozen model in memory, next to the student."""

    model: Any
    bfloat16: bool
    """True for matrix products in bfloat16."""

    def live(self, inputs: Any) -> Live:
        """Return the teacher's hidden states for one batch, with its head."""
        device = inputs["input_ids"].device
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=self.bfloat16):
            return Live(answer_states(self.model, self.model, inputs), self._head, logit_transform(self.model))

    def _head(self, hidden: torch.Tensor) -> torch.Tensor:
        with torch.autocast(hidden.device.type, torch.bfloat16, enabled=self.bfloat16):
            logits: torch.Tensor = trunk_and_head(self.model)[1](hidden)
        return logits

    def find_top_tokens(
        self,
        rows: Sequence[dict[str, Any]],
        collator: Callable[[list[dict[str, Any]]], Any],
        measure: Measure,
        vocabulary: int,
        on_progress: Callable[[int, int], object],
    ) -> list[TopTokens]:
        """Return the ``top_k`` likeliest of the first ``vocabulary`` tokens at each labeled token of each row."""
        assert measure.top_k is not None
        device = next(self.model.parameters()).device
        results: list[TopTokens] = [TopTokens(torch.empty(0), torch.empty(0))] * len(rows)
        completed = 0
        for batch in by_length([len(row["input_ids"]) for row in rows], SCORING_TOKENS):
            inputs = {name: value.to(device) for name, value in collator([rows[row] for row in batch]).items()}
            live = self.live(inputs)
            ids, logprobs = [], []
            for start in range(0, len(live.hidden), CHUNK):
                with torch.no_grad():
                    product = live.head(live.hidden[start : start + CHUNK])[:, :vocabulary]
                    distribution = measure.log_softmax(product, live.transform)
                    best = distribution.topk(min(measure.top_k, product.shape[-1]), dim=-1)
                # int32 holds any vocabulary in half the space.
                ids.append(best.indices.to(torch.int32).cpu())
                logprobs.append(best.values.cpu())
            # The batch's tokens are in one sequence; cut it into rows by their number of labels.
            counts = [sum(label != MASKED for label in rows[row]["labels"][1:]) for row in batch]
            for row, (start_token, end_token) in zip(batch, pairwise(accumulate([0, *counts])), strict=True):
                results[row] = TopTokens(
                    torch.cat(ids)[start_token:end_token].clone(), torch.cat(logprobs)[start_token:end_token].clone()
                )
            completed += len(batch)
            on_progress(completed, len(rows))
        return results


@dataclass
class TeacherCache:
    """Cache of ``TopTokens``. ``identity`` names everything that they depend on except the rows.

    ``warn`` is called for damaged files. ``hits`` and ``computed`` count rows.
    """

    folder: Path
    identity: dict[str, Any]
    warn: Callable[[str], object] = LOG.warning
    hits: int = 0
    computed: int = 0

    def load(
        self,
        rows: Sequence[dict[str, Any]],
        compute: Callable[[], list[TopTokens]],
        also_read: Sequence[dict[str, Any]] = (),
    ) -> list[TopTokens]:
        """Return the tokens for ``rows``, from a file or from ``compute``. A damaged file is ignored.

        ``also_read`` are further rows that the tokens depend on.
        """
        key = self._key([*rows, *also_read])
        file = self.folder / f"{key[:32]}.safetensors"
        counts = [sum(label != MASKED for label in row["labels"][1:]) for row in rows]
        cached = read_tensors(file, key, COLUMNS, sum(counts), self.warn)
        if cached is not None:
            self.hits += len(rows)
            ends = list(pairwise(accumulate([0, *counts])))
            return [TopTokens(cached["ids"][start:end], cached["logprobs"][start:end]) for start, end in ends]
        results = compute()
        self.computed += len(rows)
        columns = {name: torch.cat([getattr(result, name) for result in results]) for name in COLUMNS}
        write_tensors(file, key, columns)
        return results

    def _key(self, rows: Sequence[dict[str, Any]]) -> str:
        digest = hashlib.sha256(canonical({**self.identity, "version": VERSION}).encode())
        for row in rows:
            digest.update(f"{row['input_ids']}{[label != MASKED for label in row['labels']]}\n".encode())
        return digest.hexdigest()
