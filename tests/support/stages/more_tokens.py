"""A checkpoint with a vocabulary of its own, for stages that take models of one vocabulary alone."""

from __future__ import annotations

from pathlib import Path

from align.models.loading import load_policy, load_tokenizer


def add_token(folder: Path, token: str) -> None:
    """Give the checkpoint one more token, and the embedding that goes with it."""
    tokenizer, model = load_tokenizer(folder), load_policy(folder)
    tokenizer.add_tokens([token])
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
