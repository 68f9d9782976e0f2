"""The prompts of a run: rendered once, then drawn epoch after epoch in an order that depends only on the seed.

The prompts of an update depend only on the seed and the update, so a resumed run needs no loader state.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from align.errors import UserError
from align.models.chat.render import render_prompt
from align.training.row_history import Continuation

Row = dict[str, Any]


def derive_seed(*parts: int | str) -> int:
    """Return a seed below 2**31 from any parts; equal parts give equal seeds, similar ones unrelated seeds."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


class Prompts:
    """Rows with a ``prompt`` (a text, or messages ending with a user turn) and their token ids.

    Raises ``UserError`` when no row is usable. ``dropped`` counts the prompts longer than ``max_length``.
    """

    continuation: Continuation | None = None
    """Order of a run that continues another with other prompts."""

    def __init__(self, rows: Iterable[Mapping[str, Any]], tokenizer: Any, max_length: int | None) -> None:
        self.rows: list[Row] = []
        self.token_ids: list[list[int]] = []
        self.dropped = 0
        for row in rows:
            ids = _token_ids(row, tokenizer)
            if max_length is not None and len(ids) > max_length:
                self.dropped += 1
                continue
            self.rows.append(dict(row))
            self.token_ids.append(ids)
        if not self.rows:
            raise UserError(
                f"no prompt is left to train on ({self.dropped} were longer than max_prompt_tokens {max_length}); "
                "check the prompts' split or raise max_prompt_tokens."
            )

    def __len__(self) -> int:
        return len(self.rows)

    def next(self, numbers: range, seed: int) -> list[int]:
        """Return the indices of the prompts ``numbers`` of the run: of the endless sequence, or its continuation."""
        continuation = self.continuation
        if continuation is None or numbers.start < continuation.start:
            return self.draw(numbers.start, len(numbers), seed)
        # A run that continues another with other prompts: those that are new to it, then epochs over all.
        start = numbers.start - continuation.start
        indices = continuation.first[start : start + len(numbers)]
        after = max(0, start - len(continuation.first))
        return indices + self.draw(after, len(numbers) - len(indices), seed)

    def draw(self, start: int, count: int, seed: int) -> list[int]:
        """Return the indices of prompts ``start`` to ``start + count`` of the endless sequence of shuffled epochs."""
        indices: list[int] = []
        while len(indices) < count:
            # Shuffle each epoch by its own seed, so any position is available without the epochs before it.
            epoch, offset = divmod(start + len(indices), len(self))
            generator = torch.Generator().manual_seed(derive_seed(seed, "prompts", epoch))
            order = torch.randperm(len(self), generator=generator).tolist()
            indices += order[offset : offset + count - len(indices)]
        return indices


def _token_ids(row: Mapping[str, Any], tokenizer: Any) -> list[int]:
    prompt = row.get("prompt")
    if isinstance(prompt, str):
        ids = [int(token) for token in tokenizer(prompt)["input_ids"]]
    elif isinstance(prompt, list) and prompt:
        ids = render_prompt(tokenizer, prompt, row.get("tools"))
    else:
        raise UserError(f"a row's 'prompt' should be a text or a list of messages; found {prompt!r}.")
    if not ids:
        raise UserError("a prompt has no tokens; remove empty prompts.")
    return ids
