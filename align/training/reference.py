"""Log-probabilities of a stage's training answers by the reference model, computed once and cached in the store.

They depend on the reference's weights and the rows' tokens, not on hyperparameters: a run with another beta, loss or
learning rate finds them. No second model is in memory while the policy trains. References that change during training
(TR-DPO) are not supported.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from trl.trainer.utils import add_fused_lm_head

from align.config.runtime.launch import rank
from align.models.checkpoints.conversion import plain_of
from align.models.compute.processes import all_gather, broadcast, rank_range
from align.store.fingerprint import canonical
from align.training.order import by_length
from align.training.rows import pad_right
from align.training.sealed_tensors import read_tensors, write_tensors
from align.training.trainers import SCORING_TOKENS

LOG = logging.getLogger(__name__)

VERSION = 2
"""Part of the key; increased when the same weights and rows should give other numbers."""
COLUMNS = ("total", "tail")
"""Tensors of a cache file, float32."""
NO_LIMIT = 1 << 30
"""Length above any answer's length."""


@dataclass(frozen=True)
class Answer:
    """Token ids of a prompt and of an answer to it."""

    prompt: Sequence[int]
    ids: Sequence[int]
    shared: int | None = None
    """Number of tokens that the assistant wrote in the shorter answer of its pair."""
    mask: Sequence[int] | None = None
    """1 on the tokens of ``ids`` that the assistant wrote, 0 between its turns; None if it wrote all."""


@dataclass(frozen=True)
class Sums:
    """Log-probabilities in nats, one per answer: of all its tokens, and of those after ``shared``."""

    total: list[float]
    tail: list[float]

    def weighted(self, tail_weight: float | None) -> list[float]:
        """Return the sums to compare; with ``tail_weight``, LD-DPO's alpha, the tail's part is scaled by it."""
        if tail_weight is None:
            return self.total
        return [total - (1 - tail_weight) * tail for total, tail in zip(self.total, self.tail, strict=True)]


@dataclass
class ReferenceCache:
    """Cache of sums in two places: the stage's own checkpoints, then a folder that stages share.

    ``identity`` names everything but the rows: the digest of the weights, how they were loaded, the precision. The
    stage's own file is also checked against it, because the same stage key may stand for weights that were trained
    again. ``hits`` and ``computed`` count answers; ``warn`` is called for damaged files.
    """

    stage_folder: Path
    shared: Path | None
    identity: dict[str, str]
    warn: Callable[[str], object] = LOG.warning
    hits: int = 0
    computed: int = 0
    files: list[Path] = field(default_factory=list)

    def sums(self, name: str, answers: Sequence[Answer], compute: Callable[[Sequence[Answer]], Sums]) -> Sums:
        """Return the sums of ``answers``, from a file or from ``compute``. A damaged file is ignored."""
        key = self.key(answers)
        paths = [self.stage_folder / f"reference_{name}.safetensors"]
        if self.shared is not None:
            paths.append(self.shared / f"{key[:32]}.safetensors")
        self.files += paths[1:]
        # Only the first process reads, so all processes make the same decision.
        cached = []
        if rank() == 0:
            cached = [read_tensors(path, key, COLUMNS, len(answers), self.warn) for path in paths]
        columns = broadcast(lambda: next((entry for entry in cached if entry is not None), None))
        if columns is None:
            result = _compute_in_parallel(answers, compute)
            self.computed += len(answers)
        else:
            result = Sums(columns["total"].tolist(), columns["tail"].tolist())
            self.hits += len(answers)
        # Write the sums to each place that had no sums or damaged sums.
        for path, entry in zip(paths, cached, strict=False):  # ``cached`` is empty in all but the first process
            if entry is None:
                write_tensors(
                    path, key, {name: torch.tensor(getattr(result, name), dtype=torch.float32) for name in COLUMNS}
                )
        return result

    def key(self, answers: Sequence[Answer]) -> str:
        """Return a digest of the identity and of every token, in order."""
        digest = hashlib.sha256(canonical({**self.identity, "version": VERSION}).encode())
        for answer in answers:
            mask = "" if answer.mask is None else list(answer.mask)
            line = f"{list(answer.prompt)}{list(answer.ids)}{answer.shared}{mask}\n"
            digest.update(line.encode())
        return digest.hexdigest()


def _compute_in_parallel(answers: Sequence[Answer], compute: Callable[[Sequence[Answer]], Sums]) -> Sums:
    """Compute the sums of all answers; each process computes a part."""
    indices = rank_range(len(answers))
    parts = all_gather(compute(answers[indices.start : indices.stop]))
    total = [value for part in parts for value in part.total]
    tail = [value for part in parts for value in part.tail]
    return Sums(total, tail)


@contextmanager
def _fused(model: Any) -> Any:
    """Inside, ``model`` has trl's fused head, which scores labeled positions only."""
    causal_model = plain_of(model)
    # trl replaces forward on the instance; the class's own method comes back by deleting that attribute.
    original = causal_model.__dict__.get("forward")
    add_fused_lm_head(causal_model)
    try:
        yield model
    finally:
        if original is None:
            del causal_model.forward
        else:
            causal_model.forward = original


def answer_sums(
    model: Any,
    answers: Sequence[Answer],
    pad: int,
    bfloat16: bool,
    on_progress: Callable[[int, int], object] = lambda completed, total: None,
) -> Sums:
    """Sum the log-probabilities of ``answers`` by ``model`` in eval mode, on its device, as trl's trainers do.

    ``bfloat16`` is the type of the matrix products. Batches are grouped by length to save padding; their order depends
    on the lengths only. Consecutive answers to the same prompt stay together, so the model reads the prompt once.
    """
    device = next(model.parameters()).device
    total = [0.0] * len(answers)
    tail = [0.0] * len(answers)
    completed = 0
    model.eval()
    with _fused(model), torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
        lengths = [len(answer.prompt) + len(answer.ids) for answer in answers]
        for batch in by_length(lengths, SCORING_TOKENS, _group_by_prompt(answers)):
            batch_answers = [answers[row] for row in batch]
            logprobs, positions = _token_logprobs(model, batch_answers, pad, device)  # (B, T - 1) each
            limits = [NO_LIMIT if answer.shared is None else answer.shared for answer in batch_answers]
            # LD-DPO: tokens after the length of the pair's shorter answer.
            in_tail = positions > torch.tensor(limits, device=device)[:, None]
            batch_total = logprobs.sum(dim=1).tolist()
            batch_tail = (logprobs * in_tail).sum(dim=1).tolist()
            for index, row in enumerate(batch):
                total[row] = batch_total[index]
                tail[row] = batch_tail[index]
            completed += len(batch)
            on_progress(completed, len(answers))
    return Sums(total, tail)


def _group_by_prompt(answers: Sequence[Answer]) -> list[list[int]]:
    """Return the indices of the answers of each run of equal prompts."""
    runs = itertools.groupby(range(len(answers)), key=lambda index: list(answers[index].prompt))
    return [list(indices) for _, indices in runs]


def _token_logprobs(
    model: Any, answers: Sequence[Answer], pad: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log-probabilities, 0 outside the answers, and each token's position in its answer, from 1: (B, T - 1)."""
    ids, attention_mask = pad_right([[*answer.prompt, *answer.ids] for answer in answers], pad)
    answer_mask = attention_mask.clone()
    for row, answer in enumerate(answers):
        start = len(answer.prompt)
        answer_mask[row, :start] = 0
        if answer.mask is not None:
            answer_mask[row, start : start + len(answer.ids)] = torch.tensor(answer.mask)
    ids = ids.to(device)
    attention_mask = attention_mask.to(device)
    answer_mask = answer_mask.to(device)
    # A token is predicted from the token before it, so the log-probabilities have no column for the first token.
    labels = ids.masked_fill(answer_mask == 0, -100)
    outputs = model(input_ids=ids, attention_mask=attention_mask, labels=labels, use_cache=False, fused_lm_head=True)
    # Methods with virtual tokens have more positions than the row.
    return outputs.log_probs[:, -(ids.shape[1] - 1) :].float(), answer_mask[:, 1:].cumsum(dim=1)
