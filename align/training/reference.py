"""A reference's log-probabilities of the answers that a stage learns from: computed once, and kept in the store.

They depend on the reference's weights and on the rows' tokens, and on nothing that is tuned: a run with another beta,
loss or learning rate finds them. So no second model is in memory while the policy trains. Leaves out references that
move during training (TR-DPO).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from trl.trainer.utils import add_fused_lm_head

from align.config.launch import rank
from align.models.processes import agreed, gathered, part_of
from align.store.fingerprint import canonical
from align.training.order import by_length
from align.training.sealed_tensors import read_tensors, write_tensors
from align.training.trainers import SCORING_TOKENS

VERSION = 1
"""Part of the key: raised when the same weights and rows should give other numbers."""


@dataclass(frozen=True)
class Answer:
    """Token ids of a prompt and of an answer to it; ``shared`` is the length of the shorter answer of its pair."""

    prompt: Sequence[int]
    ids: Sequence[int]
    shared: int | None = None


@dataclass(frozen=True)
class Sums:
    """Log-probabilities in nats, one per answer: of all its tokens, and of those beyond ``shared``."""

    total: list[float]
    tail: list[float]

    def weighted(self, tail_weight: float | None) -> list[float]:
        """What is compared: the whole sum, or one in which the tail counts ``tail_weight`` (LD-DPO's alpha)."""
        if tail_weight is None:
            return self.total
        return [total - (1 - tail_weight) * tail for total, tail in zip(self.total, self.tail, strict=True)]


@dataclass
class ReferenceCache:
    """Where sums are looked for and kept: the stage's own checkpoints, then a folder that stages share.

    ``identity`` names everything but the rows: the digest of the weights, how they were loaded, the precision. It
    counts for the stage's own file too: the weights behind one key may be another making of them. ``found`` and
    ``computed`` count the answers; ``warn`` is told of files that are not what was written.
    """

    own: Path
    shared: Path | None
    identity: dict[str, str]
    warn: Callable[[str], object] = print
    found: int = 0
    computed: int = 0
    files: list[Path] = field(default_factory=list)

    def sums(self, name: str, answers: Sequence[Answer], compute: Callable[[Sequence[Answer]], Sums]) -> Sums:
        """The sums of ``answers``, from a file or from ``compute``. A file that is damaged counts as none."""
        key = self.key(answers)
        places = [self.own / f"reference_{name}.safetensors"]
        if self.shared is not None:
            places.append(self.shared / f"{key[:32]}.safetensors")
        self.files += places[1:]
        known = [_read(place, key, len(answers), self.warn) for place in places] if rank() == 0 else []
        made = agreed(lambda: next((sums for sums in known if sums is not None), None))
        if made is None:
            made = _shared_out(answers, compute)
            self.computed += len(answers)
        else:
            self.found += len(answers)
        for place, sums in zip(places, known, strict=False):  # in the first process, which looked
            if sums is None:
                _write(place, key, made)
        return made

    def key(self, answers: Sequence[Answer]) -> str:
        """Digest of the identity and of every token, in order."""
        digest = hashlib.sha256(canonical({**self.identity, "version": VERSION}).encode())
        for answer in answers:
            line = f"{list(answer.prompt)}{list(answer.ids)}{answer.shared}\n"
            digest.update(line.encode())
        return digest.hexdigest()


def _shared_out(answers: Sequence[Answer], compute: Callable[[Sequence[Answer]], Sums]) -> Sums:
    """Sums of all answers, each process computing those of its part."""
    mine = part_of(len(answers))
    parts = gathered(compute(answers[mine.start : mine.stop]))
    return Sums([one for part in parts for one in part.total], [one for part in parts for one in part.tail])


def _read(file: Path, key: str, count: int, warn: Callable[[str], object]) -> Sums | None:
    found = read_tensors(file, key, warn)
    if found is None or found.keys() != {"total", "tail"} or any(one.shape != (count,) for one in found.values()):
        return None
    return Sums(found["total"].tolist(), found["tail"].tolist())


def _write(file: Path, key: str, sums: Sums) -> None:
    columns = {name: torch.tensor(getattr(sums, name), dtype=torch.float32) for name in ("total", "tail")}
    write_tensors(file, key, columns)


@contextmanager
def _fused(model: Any) -> Any:
    """``model`` with trl's head that scores labeled positions only, and without it again afterwards."""
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    before = plain.__dict__.get("forward")
    add_fused_lm_head(plain)
    try:
        yield model
    finally:
        if before is None:
            del plain.forward
        else:
            plain.forward = before


def answer_sums(
    model: Any,
    answers: Sequence[Answer],
    pad: int,
    bfloat16: bool,
    on_progress: Callable[[int, int], object] = lambda done, total: None,
) -> Sums:
    """Log-probabilities of ``answers`` by ``model`` in eval mode, on its device, as trl's trainers sum them.

    ``bfloat16`` is the type of the matrix products. Batches are by length, so padding is little; the order of the
    batches depends on the lengths alone.
    """
    device = next(model.parameters()).device
    total, tail, done = [0.0] * len(answers), [0.0] * len(answers), 0
    model.eval()
    with _fused(model), torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
        for batch in by_length([len(answer.prompt) + len(answer.ids) for answer in answers], SCORING_TOKENS):
            logprobs, position = _token_logprobs(model, [answers[at] for at in batch], pad, device)  # (B, T - 1) each
            limits = [answers[at].shared for at in batch]
            beyond = torch.tensor([1 << 30 if limit is None else limit for limit in limits], device=device)
            sums = logprobs.sum(dim=1), (logprobs * (position > beyond[:, None])).sum(dim=1)
            for row, one, other in zip(batch, sums[0].tolist(), sums[1].tolist(), strict=True):
                total[row], tail[row] = one, other
            done += len(batch)
            on_progress(done, len(answers))
    return Sums(total, tail)


def _token_logprobs(
    model: Any, answers: Sequence[Answer], pad: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities, 0 off the answers, and each answer token's number in its answer, from 1. (B, T - 1) both."""
    longest = max(len(answer.prompt) + len(answer.ids) for answer in answers)
    ids = torch.full((len(answers), longest), pad)  # (B, T)
    real = torch.zeros_like(ids)
    answered = torch.zeros_like(ids)
    for row, answer in enumerate(answers):
        start, end = len(answer.prompt), len(answer.prompt) + len(answer.ids)
        ids[row, :end] = torch.tensor([*answer.prompt, *answer.ids])
        real[row, :end] = 1
        answered[row, start:end] = 1
    ids, real, answered = ids.to(device), real.to(device), answered.to(device)
    labels = ids.masked_fill(answered == 0, -100)
    outputs = model(input_ids=ids, attention_mask=real, labels=labels, use_cache=False, fused_lm_head=True)
    # Methods that put virtual tokens before the row have more positions than the row.
    return outputs.log_probs[:, -(longest - 1) :].float(), answered[:, 1:].cumsum(dim=1)
