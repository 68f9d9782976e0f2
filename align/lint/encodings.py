"""How training stages read a row: which answers, how they are encoded, and who collates them.

A kind of stage names its encoding in its record (``Stage.lint``), as an import path of a ``RowEncoding``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from align.config.validation import hint_nearest
from align.data.rows import Row
from align.errors import UserError, shorten
from align.lint.batches import Collator
from align.pipeline.registry import STAGES, find_stage, load_object
from align.training import rows as encoders
from align.training.unpaired import encode_unpaired

ANSWERS = frozenset({"completion", "chosen", "rejected"})
"""Fields of a row that hold an answer."""
PAIR = ("chosen", "rejected")


@dataclass(frozen=True)
class RowEncoding:
    """What a training stage makes of a row."""

    sides: tuple[str, ...]
    """Answers that it reads; none where it samples them."""
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
PAIRS = RowEncoding(PAIR, encoders.encode_pairs, "align.training.answer_collators:PairCollator")
SCORED_PAIRS = RowEncoding(PAIR, encoders.encode_conversations, "trl.trainer.reward_trainer:DataCollatorForPreference")
"""Both answers as complete conversations, which a reward model scores."""
UNPAIRED = RowEncoding(("completion",), encode_unpaired, "align.training.answer_collators:UnpairedCollator")
PROMPTS = RowEncoding(())

DATA_ENCODINGS = {"instructions": SUPERVISED, "preferences": PAIRS, "unpaired": UNPAIRED, "prompts": PROMPTS}
"""Kind of a recipe's rows → the encoding of the stage that usually reads them."""


def encoding_of(kind: str) -> RowEncoding:
    """Return the encoding of a kind of training stage (a name or ``module:NAME``), or of a recipe's kind of rows.

    Raises ``UserError`` for an unknown kind, and for a stage whose rows cannot be linted.
    """
    if kind in DATA_ENCODINGS:
        return DATA_ENCODINGS[kind]
    known = [*DATA_ENCODINGS, *(name for name, stage in STAGES.items() if stage.lint is not None)]
    try:
        path = find_stage(kind).lint
    except KeyError:
        message = f"lint: unknown kind '{shorten(kind)}'.{hint_nearest(kind, known)} Known are {', '.join(known)}."
        raise UserError(message) from None
    if path is None:
        raise UserError(f"lint: stage '{kind}' names no row encoding (`lint` of its record), so it cannot be linted.")
    encoding = load_object(path)
    if not isinstance(encoding, RowEncoding):
        raise UserError(f"lint: '{path}' is a {type(encoding).__name__}, not an align.lint.encodings.RowEncoding.")
    return encoding
