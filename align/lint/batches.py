"""What a trainer's batches hold: token ids and labels of each row, without padding.

Rows go through the trainer's own collator, one by one, so that nothing here repeats what a trainer does. Leaves out
judging them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from align.data.rows import Message, Row, is_finished
from align.lint.dialect import Dialect
from align.lint.findings import Place

MASKED = -100
Collator = Callable[[list[dict[str, Any]]], Any]


@dataclass
class Tokens:
    """One sequence as the trainer sees it: the row's answer, or one side of its pair, or a document of a pack."""

    place: Place
    side: str
    """``completion``, ``chosen``, ``rejected`` or ``prompt``; ``text`` where the row behind it is not known."""
    ids: list[int]
    labels: list[int] | None
    """As long as ``ids``; None for what has no labels (a reward model's or a sampler's input)."""
    messages: list[Message]
    """The turns that were rendered, the answer last; empty where they are not known."""
    finished: bool
    """Whether the answer came to its end."""
    dialect: Dialect
    tools: str | None = ""
    """The row's tools, as JSON text."""
    hidden_end: int | None = None
    """The id behind ``ids`` that is in the batch but not attended to, if any."""

    @cached_property
    def text(self) -> str:
        """All of it, control tokens included."""
        return self.dialect.decode(self.ids)


def rows_of(batch: Any) -> list[tuple[list[int], list[int] | None, int | None]]:
    """Ids, labels and the first hidden id of every sequence of a collated batch.

    Labels are the batch's ``labels``, or its ``completion_mask``. A batch without padding is cut where its positions
    begin anew.
    """
    ids = batch["input_ids"].tolist()
    labels = batch["labels"].tolist() if "labels" in batch else None
    if labels is None and "completion_mask" in batch:
        labels = [
            [token if kept else MASKED for token, kept in zip(*pair, strict=True)]
            for pair in zip(ids, batch["completion_mask"].tolist(), strict=True)
        ]
    if "attention_mask" not in batch:
        starts = [at for at, position in enumerate(batch["position_ids"][0].tolist()) if position == 0]
        cuts = list(zip(starts, [*starts[1:], len(ids[0])], strict=True))
        return [(ids[0][a:b], None if labels is None else labels[0][a:b], None) for a, b in cuts]
    found: list[tuple[list[int], list[int] | None, int | None]] = []
    for number, mask in enumerate(batch["attention_mask"].tolist()):
        real = [at for at, attended in enumerate(mask) if attended]
        behind = real[-1] + 1 if real else 0
        found.append((
            [ids[number][at] for at in real],
            None if labels is None else [labels[number][at] for at in real],
            ids[number][behind] if behind < len(mask) else None,
        ))  # fmt: skip
    return found


def tokens_of(
    prepared: dict[str, Any], row: Row | None, place: Place, stage: str, collator: Collator, dialect: Dialect
) -> list[Tokens]:
    """The sequences that ``prepared``, a row of a trainer's dataset, becomes in a batch of its own."""
    pair = ("chosen", "rejected")
    names = {"sft": ("completion",), "kto": ("completion",), "dpo": pair, "reward": pair}[stage]
    parts = rows_of(collator([prepared]))
    if row is None or len(parts) != len(names):
        return [Tokens(place, "text", ids, labels, [], True, dialect) for ids, labels, _ in parts]
    found = []
    for name, (ids, labels, hidden) in zip(names, parts, strict=True):
        field = name if row.get(name) else "chosen"
        answer = row.get(field) or []
        found.append(
            Tokens(
                place, name, ids, labels, [*row["prompt"], *answer], is_finished(row, field),
                dialect, row.get("tools"), hidden if len(parts) == 1 else None,
            )
        )  # fmt: skip
    return found


def padded_labels(prepared: Sequence[dict[str, Any]], collator: Collator) -> list[int]:
    """How many labels each sequence has when ``prepared`` share a batch."""
    batch = collator(list(prepared))
    if "labels" not in batch or "attention_mask" not in batch:
        return []
    counts: list[int] = (batch["labels"] != MASKED).sum(dim=1).tolist()
    return counts
