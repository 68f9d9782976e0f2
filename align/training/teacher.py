"""A teacher's word on the answers' tokens: its hidden states while it is in memory, or its likeliest tokens, kept.

What is kept depends on the teacher's weights and on the rows' tokens, and not on how the student learns: another run
finds it in the store's cache and needs no teacher in memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch

from align.models.trunk import soft_cap, trunk_and_head
from align.store.fingerprint import canonical
from align.training.divergence import CHUNK, Known, Live, Measure
from align.training.order import by_length
from align.training.rows import MASKED
from align.training.sealed_tensors import read_tensors, write_tensors
from align.training.trainers import SCORING_TOKENS

VERSION = 1
"""Part of the key: raised when the same weights and rows should give other numbers."""


@contextmanager
def hidden_states_of(model: Any) -> Any:
    """A list that the trunk's (B, T, H) hidden states are added to, whatever is wrapped around the model."""
    seen: list[torch.Tensor] = []
    trunk = trunk_and_head(model)[0]
    handle = trunk.register_forward_hook(lambda module, given, found: seen.append(found[0]))
    try:
        yield seen
    finally:
        handle.remove()


def answer_states(called: Any, plain: Any, inputs: Any) -> torch.Tensor:
    """(N, H) hidden states that predict the N labeled tokens of a batch, in its order, by one call of ``called``.

    ``plain`` is the same model without what trains it in parallel. The head runs at one position alone.
    """
    with hidden_states_of(plain) as seen:
        called(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False, logits_to_keep=1
        )
    width = inputs["input_ids"].shape[1]
    states: torch.Tensor = seen[-1][:, -width:][:, :-1][inputs["labels"][:, 1:] != MASKED]
    return states


@dataclass(frozen=True)
class Teacher:
    """A frozen model beside the student."""

    model: Any
    bfloat16: bool
    """Type of the matrix products."""

    def live(self, inputs: Any) -> Live:
        """For one batch. Its head stays with it."""
        device = inputs["input_ids"].device
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=self.bfloat16):
            return Live(answer_states(self.model, self.model, inputs), self._head, soft_cap(self.model))

    def _head(self, hidden: torch.Tensor) -> torch.Tensor:
        with torch.autocast(hidden.device.type, torch.bfloat16, enabled=self.bfloat16):
            logits: torch.Tensor = trunk_and_head(self.model)[1](hidden)
        return logits

    def known(
        self,
        rows: Sequence[dict[str, Any]],
        collator: Callable[[list[dict[str, Any]]], Any],
        measure: Measure,
        vocabulary: int,
        on_progress: Callable[[int, int], object],
    ) -> list[Known]:
        """The ``top_k`` likeliest of the first ``vocabulary`` tokens at each labeled token of each row."""
        assert measure.top_k is not None
        device = next(self.model.parameters()).device
        found: list[Known] = [Known(torch.empty(0), torch.empty(0))] * len(rows)
        done = 0
        for batch in by_length([len(row["input_ids"]) for row in rows], SCORING_TOKENS):
            inputs = {name: value.to(device) for name, value in collator([rows[at] for at in batch]).items()}
            live = self.live(inputs)
            ids, logprobs = [], []
            for start in range(0, len(live.hidden), CHUNK):
                with torch.no_grad():
                    logits = live.head(live.hidden[start : start + CHUNK])[:, :vocabulary]
                    best = measure.log_softmax(logits, live.cap).topk(min(measure.top_k, logits.shape[-1]), dim=-1)
                ids.append(best.indices.to(torch.int32).cpu())
                logprobs.append(best.values.cpu())
            counts = [sum(label != MASKED for label in rows[at]["labels"][1:]) for at in batch]
            for at, (a, b) in zip(batch, pairwise(accumulate([0, *counts])), strict=True):
                found[at] = Known(torch.cat(ids)[a:b].clone(), torch.cat(logprobs)[a:b].clone())
            done += len(batch)
            on_progress(done, len(rows))
        return found


@dataclass
class TeacherCache:
    """Files of ``Known``, by what they were made of. ``identity`` names all of that but the rows.

    ``warn`` is told of files that are not what was written.
    """

    folder: Path
    identity: dict[str, Any]
    warn: Callable[[str], object] = print
    found: int = 0
    computed: int = 0

    def known(self, rows: Sequence[dict[str, Any]], compute: Callable[[], list[Known]]) -> list[Known]:
        """Of ``rows``, from a file or from ``compute``. A file that is damaged counts as none."""
        key = self._key(rows)
        file = self.folder / f"{key[:32]}.safetensors"
        counts = [sum(label != MASKED for label in row["labels"][1:]) for row in rows]
        kept = _read(file, key, sum(counts), self.warn)
        if kept is not None:
            self.found += len(rows)
            ends = list(pairwise(accumulate([0, *counts])))
            return [Known(kept["ids"][a:b], kept["logprobs"][a:b]) for a, b in ends]
        made = compute()
        self.computed += len(rows)
        columns = {name: torch.cat([getattr(one, name) for one in made]) for name in ("ids", "logprobs")}
        write_tensors(file, key, columns)
        return made

    def _key(self, rows: Sequence[dict[str, Any]]) -> str:
        digest = hashlib.sha256(canonical({**self.identity, "version": VERSION}).encode())
        for row in rows:
            digest.update(f"{row['input_ids']}{[label != MASKED for label in row['labels']]}\n".encode())
        return digest.hexdigest()


def _read(file: Path, key: str, tokens: int, warn: Callable[[str], object]) -> dict[str, torch.Tensor] | None:
    found = read_tensors(file, key, warn)
    if found is None:
        return None
    whole = found.keys() == {"ids", "logprobs"} and all(len(values) == tokens for values in found.values())
    return found if whole else None
