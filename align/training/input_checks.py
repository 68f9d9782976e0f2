"""Checks on what an earlier stage hands over, before any step is taken: each a known way to train for nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from align.errors import UserError
from align.models.render import require_chat_template
from align.training.rows import MASKED, Encoded


def check_model(stage: str, model: Any, tokenizer: Any) -> None:
    """Chat template, end-of-turn and padding tokens, embeddings and float32 weights; ``UserError`` otherwise."""
    require_chat_template(tokenizer, f"{stage}: the model")
    if tokenizer.eos_token_id is None:
        raise UserError(f"{stage}: the tokenizer has no eos token; set eos_token in the model's tokenizer_config.json.")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise UserError(
            f"{stage}: the tokenizer pads with {tokenizer.pad_token!r} and ends turns with {tokenizer.eos_token!r}; "
            "the two must differ, or padding is read as an answer's end. Set pad_token to another special token."
        )
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise UserError(
            f"{stage}: the tokenizer has {len(tokenizer)} tokens and the model embeds {rows}; "
            "tokenizer and weights are not of the same model."
        )
    narrow = {str(p.dtype) for p in model.parameters() if p.requires_grad and p.dtype.itemsize < 4}
    # Not the user's doing: every loader here loads float32, because AdamW's steps are lost to rounding in 16 bits.
    assert not narrow, f"trainable weights are {narrow}, not float32"


def check_encoded(
    stage: str, encoded: Encoded, asked: int, split: str, max_length: int, warn: Callable[[str], None]
) -> None:
    """Warn of every cut or dropped row of ``asked``; ``UserError`` when none is left."""
    for what, rows in encoded.counts.items():
        warn(f"{stage}: {rows} of {asked} {split} rows {what} (max_length {max_length}).")
    if not encoded.rows:
        raise UserError(
            f"{stage}: none of the {asked} {split} rows can be used: "
            + "; ".join(f"{rows} {what}" for what, rows in encoded.counts.items())
            + f". Raise max_length (now {max_length}) or change the data."
        )


def check_ends(stage: str, encoded: Encoded, tokenizer: Any) -> None:
    """``UserError`` when no row teaches the end of a turn, or a row's labels are all masked.

    The model would never learn to stop, which shows only when it is sampled from.
    """
    for row in encoded.rows:
        assert any(label != MASKED for label in row["labels"]), "a row without labels was not left out"
    ends = sum(row["labels"][-1] == tokenizer.eos_token_id for row in encoded.rows)
    if ends == 0:
        last = tokenizer.decode([row["labels"][-1] for row in encoded.rows[:1]])
        raise UserError(
            f"{stage}: in none of the {len(encoded.rows)} training rows is the end of the answer "
            f"({tokenizer.eos_token!r}) supervised; the first row's last token is {last!r}. The model would never "
            "learn to stop. Raise max_length, use a tokenizer whose eos is the chat template's end of turn, or take "
            "answers that were not all cut off when they were sampled (completion_finished)."
        )


def check_same_vocabulary(stage: str, one: Any, other: Any, names: tuple[str, str]) -> None:
    """``UserError`` unless two tokenizers give every token the same id."""
    if one.get_vocab() != other.get_vocab():
        raise UserError(
            f"{stage}: {names[0]} and {names[1]} have different vocabularies "
            f"({len(one)} and {len(other)} tokens); take checkpoints that come from the same base model."
        )
