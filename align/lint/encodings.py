"""Readings of a row by training stages: the answers, their encoding, and the collator.

A kind of stage names its encoding in its record (``Stage.lint``), as an import path of a ``RowEncoding``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from align.config.validation import hint_nearest
from align.data.rows import Message, Row, is_finished
from align.errors import UserError, shorten, with_article
from align.lint.chat_format import ChatFormat
from align.lint.findings import Place
from align.models.chat.render import READ_THOUGHTS
from align.pipeline.registry import STAGES, find_stage, load_object
from align.training import rows as encoders
from align.training.unpaired import encode_unpaired

ANSWERS = frozenset({"completion", "chosen", "rejected"})
"""Fields of a row that hold an answer."""
PAIR = ("chosen", "rejected")


@dataclass(frozen=True)
class RowEncoding:
    """A training stage's reading of a row."""

    sides: tuple[str, ...]
    """Answers that it reads; none if it samples them."""
    encode: Callable[[Any, Sequence[Row], int], encoders.Encoded] | None = None
    """Encodes rows as ``encode(tokenizer, rows, max_length)``; None where prompts are rendered for sampling."""
    collator: str | None = None
    """Import path of the trainer's collator class, made as ``collator(pad_token_id=...)``."""

    @property
    def is_pair(self) -> bool:
        """True if it compares two answers."""
        return self.sides == PAIR

    @property
    def needed(self) -> tuple[str, ...]:
        """Fields that every row must have."""
        return (*self.sides, "label") if self.encode is encode_unpaired else self.sides

    def fits(self, row: Row) -> bool:
        """Return True for a row with all that the stage reads."""
        relevant = self.relevant_fields(row)
        if self.sides == ("completion",) and self.encode is not encode_unpaired:
            return bool(relevant.get("completion") or relevant.get("chosen"))
        return all(relevant.get(name) is not None for name in self.needed)

    def relevant_fields(self, row: Row) -> Row:
        """Return the row without the answers that the stage does not read."""
        read = set(self.sides)
        if read == {"completion"} and not row.get("completion"):
            read = {"chosen"}  # a supervised stage learns the better answer of a pair
        return {name: value for name, value in row.items() if name not in ANSWERS - read}

    def default_collator(self, tokenizer: Any) -> Collator | None:
        """Return the trainer's collator; None for prompts."""
        if self.collator is None:
            return None
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
        return load_object(self.collator)(pad_token_id=pad)  # type: ignore[no-any-return]


SUPERVISED = RowEncoding(
    ("completion",), encoders.encode_supervised, "trl.trainer.sft_trainer:DataCollatorForLanguageModeling"
)
PAIRS = RowEncoding(PAIR, encoders.encode_pairs, "align.training.preference_trainers:PairCollator")
SCORED_PAIRS = RowEncoding(PAIR, encoders.encode_conversations, "trl.trainer.reward_trainer:DataCollatorForPreference")
"""Both answers as complete conversations, which a reward model scores."""
UNPAIRED = RowEncoding(("completion",), encode_unpaired, "align.training.preference_trainers:UnpairedCollator")
PROMPTS = RowEncoding(())

DATA_ENCODINGS = {"instructions": SUPERVISED, "preferences": PAIRS, "unpaired": UNPAIRED, "prompts": PROMPTS}
"""Kind of a recipe's rows → the encoding of the stage that usually reads them."""


def encoding_of(kind: str) -> RowEncoding:
    """Return the encoding of a kind of training stage (a name or ``module:NAME``), or of a recipe's kind of rows.

    Raises ``UserError`` for an unknown kind, and for a stage whose rows cannot be linted.
    """
    if kind in DATA_ENCODINGS:
        return DATA_ENCODINGS[kind]
    kinds = [*DATA_ENCODINGS, *(name for name, stage in STAGES.items() if stage.lint is not None)]
    try:
        path = find_stage(kind).lint
    except KeyError:
        message = f"lint: unknown kind '{shorten(kind)}'.{hint_nearest(kind, kinds)} Known are {', '.join(kinds)}."
        raise UserError(message) from None
    if path is None:
        raise UserError(f"lint: stage '{kind}' names no row encoding (`lint` of its record), so it cannot be linted.")
    encoding = load_object(path)
    if not isinstance(encoding, RowEncoding):
        raise UserError(
            f"lint: '{path}' is {with_article(type(encoding).__name__)}, not an align.lint.encodings.RowEncoding."
        )
    return encoding


MASKED = -100
Collator = Callable[[list[dict[str, Any]]], Any]
BatchRow = tuple[list[int], list[int] | None, int | None]
"""Ids, labels, and the first id behind the sequence that is not attended to."""


@dataclass
class TokenSequence:
    """One sequence as the trainer sees it: a row's answer, or one side of its pair, or a document of a pack."""

    place: Place
    side: str
    """``completion``, ``chosen``, ``rejected`` or ``prompt``; ``text`` if the row behind it is not known."""
    ids: list[int]
    labels: list[int] | None
    """As long as ``ids``; None for a sequence without labels (a reward model's or a sampler's input)."""
    messages: list[Message]
    """The rendered turns, the answer's last; empty if they are not known."""
    finished: bool
    """False for an answer that was cut off."""
    chat_format: ChatFormat
    tools: str | None = ""
    """The row's tools, as JSON text."""
    prompt_turns: int = 0
    """Turns of the prompt among ``messages``."""
    hidden_end: int | None = None
    """The id behind ``ids`` that is in the batch but not attended to, if any."""

    @cached_property
    def text(self) -> str:
        """The decoded ids, control tokens included."""
        return self.chat_format.decode(self.ids)


def batch_rows(batch: Any) -> list[BatchRow]:
    """Return the sequences of a collated batch (B, T).

    Labels are the batch's ``labels``, or its ``completion_mask``. A batch without padding is one row (1, T); it is cut
    if its positions restart.
    """
    ids = batch["input_ids"].tolist()
    labels = batch["labels"].tolist() if "labels" in batch else None
    if labels is None and "completion_mask" in batch:
        labels = [_mask_labels(row, mask) for row, mask in zip(ids, batch["completion_mask"].tolist(), strict=True)]
    if "attention_mask" not in batch:
        # A flat batch has no mask: documents follow each other, and each begins at position 0.
        starts = [index for index, position in enumerate(batch["position_ids"][0].tolist()) if position == 0]
        spans = zip(starts, [*starts[1:], len(ids[0])], strict=True)
        return [(ids[0][start:end], None if labels is None else labels[0][start:end], None) for start, end in spans]
    sequences: list[BatchRow] = []
    for number, mask in enumerate(batch["attention_mask"].tolist()):
        attended = [index for index, flag in enumerate(mask) if flag]
        # The first id that is not attended to tells whether the end of turn was cut off by the mask.
        behind = attended[-1] + 1 if attended else 0
        row_ids = [ids[number][index] for index in attended]
        row_labels = None if labels is None else [labels[number][index] for index in attended]
        sequences.append((row_ids, row_labels, ids[number][behind] if behind < len(mask) else None))
    return sequences


def _mask_labels(ids: Sequence[int], mask: Sequence[int]) -> list[int]:
    return [token if is_labeled else MASKED for token, is_labeled in zip(ids, mask, strict=True)]


@dataclass(frozen=True)
class BatchReader:
    """Reads single rows through a trainer's collator."""

    collator: Collator
    chat_format: ChatFormat
    sides: tuple[str, ...]
    """Answers of a row, in the order of the batch."""

    def sequences(self, prepared: dict[str, Any], row: Row | None, place: Place) -> list[TokenSequence]:
        """Return the sequences that ``prepared``, a row of a trainer's dataset, becomes in a separate batch.

        ``row`` is the source row; without it only tokens are known.
        """
        parts = batch_rows(self.collator([prepared]))
        # Parts that do not match the row's sides cannot be compared with its turns.
        if row is None or len(parts) != len(self.sides):
            return [TokenSequence(place, "text", ids, labels, [], True, self.chat_format) for ids, labels, _ in parts]
        sequences = []
        for side, (ids, labels, hidden) in zip(self.sides, parts, strict=True):
            # A supervised stage learns the chosen answer of a pair.
            field = side if row.get(side) else "chosen"
            turns = [*row["prompt"], *(row.get(field) or [])]
            if row.get(READ_THOUGHTS):
                turns = [encoders.answer_only(turn) for turn in turns]
            sequence = TokenSequence(
                place=place,
                side=side,
                ids=ids,
                labels=labels,
                messages=turns,
                finished=is_finished(row, field),
                chat_format=self.chat_format,
                tools=row.get("tools"),
                prompt_turns=len(row["prompt"]),
                hidden_end=hidden if len(parts) == 1 else None,
            )
            sequences.append(sequence)
        return sequences


def padded_label_counts(prepared: Sequence[dict[str, Any]], collator: Collator) -> list[int]:
    """Return the number of labels of each sequence when ``prepared`` share a batch; empty without labels or mask."""
    batch = collator(list(prepared))
    if "labels" not in batch or "attention_mask" not in batch:
        return []
    counts: list[int] = (batch["labels"] != MASKED).sum(dim=1).tolist()
    return counts
