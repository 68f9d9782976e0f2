"""A teacher's distributions at the answers' tokens: its hidden states in memory, or its likeliest tokens from a cache.

The cached tokens depend on the teacher's weights and the rows' tokens, not on how the student learns. Another run finds
them in the store's cache and needs no teacher in memory.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch

from align.models.fast.token_logprobs import logit_transform
from align.store.fingerprint import canonical
from align.training.divergence import CHUNK, Known, Live, Measure, trunk_and_head
from align.training.order import by_length
from align.training.rows import MASKED
from align.training.sealed_tensors import read_tensors, write_tensors
from align.training.trainers import SCORING_TOKENS

LOG = logging.getLogger(__name__)

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


def answer_states(called: Any, plain: Any, inputs: Any) -> torch.Tensor:
    """Return the (N, H) hidden states that predict a batch's N labeled tokens, in order, by one call of ``called``.

    ``plain`` is the same model without its parallel wrapper. The head runs at no position.
    """
    # A hook reads the hidden states, so the call goes through the parallel wrapper, which gradients require. The head
    # is called with an empty selection. The last position would be a slice, for which torch's CPU product copies the
    # head once a row.
    ids = inputs["input_ids"]
    nothing = torch.empty(0, dtype=torch.long, device=ids.device)
    with hidden_states_of(plain) as hidden_states:
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

    def known(
        self,
        rows: Sequence[dict[str, Any]],
        collator: Callable[[list[dict[str, Any]]], Any],
        measure: Measure,
        vocabulary: int,
        on_progress: Callable[[int, int], object],
    ) -> list[Known]:
        """Return the ``top_k`` likeliest of the first ``vocabulary`` tokens at each labeled token of each row."""
        assert measure.top_k is not None
        device = next(self.model.parameters()).device
        results: list[Known] = [Known(torch.empty(0), torch.empty(0))] * len(rows)
        done = 0
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
                results[row] = Known(
                    torch.cat(ids)[start_token:end_token].clone(), torch.cat(logprobs)[start_token:end_token].clone()
                )
            done += len(batch)
            on_progress(done, len(rows))
        return results


@dataclass
class TeacherCache:
    """Cache of ``Known``. ``identity`` names everything that they depend on except the rows.

    ``warn`` is called for damaged files. ``hits`` and ``computed`` count rows.
    """

    folder: Path
    identity: dict[str, Any]
    warn: Callable[[str], object] = LOG.warning
    hits: int = 0
    computed: int = 0

    def known(self, rows: Sequence[dict[str, Any]], compute: Callable[[], list[Known]]) -> list[Known]:
        """Return the tokens for ``rows``, from a file or from ``compute``. A damaged file is ignored."""
        key = self._key(rows)
        file = self.folder / f"{key[:32]}.safetensors"
        counts = [sum(label != MASKED for label in row["labels"][1:]) for row in rows]
        cached = _read(file, key, sum(counts), self.warn)
        if cached is not None:
            self.hits += len(rows)
            ends = list(pairwise(accumulate([0, *counts])))
            return [Known(cached["ids"][start:end], cached["logprobs"][start:end]) for start, end in ends]
        results = compute()
        self.computed += len(rows)
        columns = {name: torch.cat([getattr(result, name) for result in results]) for name in ("ids", "logprobs")}
        write_tensors(file, key, columns)
        return results

    def _key(self, rows: Sequence[dict[str, Any]]) -> str:
        digest = hashlib.sha256(canonical({**self.identity, "version": VERSION}).encode())
        for row in rows:
            digest.update(f"{row['input_ids']}{[label != MASKED for label in row['labels']]}\n".encode())
        return digest.hexdigest()


def _read(file: Path, key: str, tokens: int, warn: Callable[[str], object]) -> dict[str, torch.Tensor] | None:
    columns = read_tensors(file, key, warn)
    if columns is None:
        return None
    is_valid = columns.keys() == {"ids", "logprobs"} and all(len(values) == tokens for values in columns.values())
    return columns if is_valid else None
