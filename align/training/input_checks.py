"""Load and check model, tokenizer and rows before the first step. Each fault is a known way to waste a training run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from align.errors import UserError
from align.models.chat.render import require_chat_template
from align.models.checkpoints.folder_checks import require_embeddings, require_same_vocabulary
from align.models.loading import load_tokenizer
from align.models.tuning.apply import load_for_tuning
from align.pipeline.context import StageContext
from align.training.rows import MASKED, Encoded, Row, refuse_long_rows


def load_model(context: StageContext, field: str = "model", reward: bool = False) -> tuple[Any, Any]:
    """Return the tokenizer and the model of the stage's input ``field``, loaded for its tuning and checked."""
    source = context.artifact(field).model
    tuning = context.config.tuning
    tokenizer = load_tokenizer(source, tuning)
    if context.config.evaluate is not None:
        # Imported late, because most stages have no tasks.
        from align.evaluation.training_tasks import TrainingTasks

        # Before the model is loaded and rows are scored. ``fit`` reads the items again, and then shows notes.
        TrainingTasks(context, tokenizer, is_quiet=True)
    model = load_for_tuning(source, tuning, context.precision, reward=reward)
    check_model(context.name, model, tokenizer)
    return tokenizer, model


def encode_splits(
    context: StageContext, stored: Mapping[str, list[Row]], encode: Callable[[list[Row], str], Encoded]
) -> dict[str, Encoded]:
    """Return the encoded and checked rows of each split; ``encode`` gets a split's rows and its name."""
    splits = {}
    for split, rows in stored.items():
        splits[split] = encode(rows, split)
        check_encoded(context, splits[split], len(rows), split)
    return splits


def check_model(stage: str, model: Any, tokenizer: Any) -> None:
    """Check chat template, end-of-turn and padding tokens, embeddings and float32 weights; raises ``UserError``."""
    require_chat_template(tokenizer, f"{stage}: the model")
    if tokenizer.eos_token_id is None:
        raise UserError(f"{stage}: the tokenizer has no eos token; set eos_token in the model's tokenizer_config.json.")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise UserError(
            f"{stage}: the tokenizer pads with {tokenizer.pad_token!r} and ends turns with {tokenizer.eos_token!r}; "
            "the two must differ, or padding is read as an answer's end. Set pad_token to another special token."
        )
    require_embeddings(tokenizer, model, stage, "tokenizer and weights are not of the same model.")
    trained = [p for p in model.parameters() if p.requires_grad]
    narrow = {str(p.dtype) for p in trained if p.dtype.itemsize < 4}
    # Not the user's fault: every loader here loads float32, because 16 bits would round AdamW's steps away.
    assert not narrow, f"trainable weights are {narrow}, not float32"


def check_encoded(context: StageContext, encoded: Encoded, total: int, split: str) -> None:
    """Warn of every cut or dropped row of a split's ``total`` rows.

    Raises ``UserError`` when none is left, and for rows to train on that are mostly too long.
    ``split`` is how the messages name the split.
    """
    max_length = context.config.max_length
    if split.endswith("train") and context.config.long_rows == "refuse":
        refuse_long_rows(context.name, "max_length", max_length, encoded.all_lengths, f"{split} rows")
    for reason, rows in encoded.counts.items():
        context.warn(f"{context.name}: {rows} of {total} {split} rows {reason} (max_length {max_length}).")
    if not encoded.rows:
        raise UserError(
            f"{context.name}: none of the {total} {split} rows can be used: "
            + "; ".join(f"{rows} {reason}" for reason, rows in encoded.counts.items())
            + f". Raise max_length (now {max_length}) or change the data."
        )


def check_ends(stage: str, encoded: Encoded, tokenizer: Any) -> None:
    """Raise ``UserError`` when no row teaches the end of a turn.

    The model would never learn to stop, which shows only when it is sampled from.
    """
    for row in encoded.rows:
        assert any(label != MASKED for label in row["labels"]), "a row without labels was not skipped"
    # The last label of an uncut row is its end of turn.
    ends = sum(row["labels"][-1] == tokenizer.eos_token_id for row in encoded.rows)
    if ends == 0:
        last = tokenizer.decode([row["labels"][-1] for row in encoded.rows[:1]])
        raise UserError(
            f"{stage}: in none of the {len(encoded.rows)} training rows is the end of the answer "
            f"({tokenizer.eos_token!r}) supervised; the first row's last token is {last!r}. The model would never "
            "learn to stop. Raise max_length, use a tokenizer whose eos is the chat template's end of turn, or use "
            "answers that were not all cut off when they were sampled (completion_finished)."
        )


def check_same_vocabulary(stage: str, first: Any, second: Any, names: tuple[str, str]) -> None:
    """Raise ``UserError`` unless two tokenizers give every token the same id."""
    labels = (f"{stage}: {names[0]}", names[1])
    require_same_vocabulary(first, second, labels, "use checkpoints of the same base model.")
