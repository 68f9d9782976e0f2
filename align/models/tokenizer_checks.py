"""Check a tokenizer's files before a library reads them, and loaded tokenizers against models. Torch-free.

Left out: chat templates (``chat_template.py``), and the choice of eos and pad (``special_tokens.py``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from align.errors import UserError
from align.models.files import read_object, read_optional

TOKENIZER, SETTINGS, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
PLAIN = ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json")
"""Vocabulary files that transformers reads without a ``tokenizer.json``."""
NAMES = ("tokenizer_class", "eos_token", "pad_token", "bos_token", "unk_token")
"""Fields of ``tokenizer_config.json`` that are text; a token may be an object with its text in ``content``."""
FIX = "Fetch the model again, or correct the file."


def check_tokenizer(folder: Path, rows: int | None) -> None:
    """Raise ``UserError`` for tokenizer files that are damaged or belong to another model.

    ``rows`` is the number of tokens that the model embeds; None where it is not known.
    """
    file = folder / TOKENIZER
    _check_settings(folder)
    if not file.exists():
        if not any((folder / name).is_file() for name in PLAIN) and not list(folder.glob("*.tiktoken")):
            raise UserError(f"{folder}: holds no {TOKENIZER} and no other vocabulary. Fetch the missing file.")
        return
    ids = token_ids(file)
    highest = max(ids.values(), default=-1)
    if rows is not None and highest >= rows:
        raise UserError(
            f"{file}: has a token of the id {highest}, and the model embeds {rows} tokens: it is the tokenizer of "
            "another model. Fetch the model's own."
        )


def require_embeddings(tokenizer: Any, model: Any, place: str, remedy: str) -> None:
    """Raise ``UserError`` for a tokenizer with more tokens than ``model`` embeds; ``remedy`` ends the message."""
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise UserError(f"{place}: the tokenizer has {len(tokenizer)} tokens and the model embeds {rows}; {remedy}")


def require_same_vocabulary(first: Any, second: Any, names: tuple[str, str], remedy: str) -> None:
    """Raise ``UserError`` unless two tokenizers give every token the same id; ``remedy`` ends the message."""
    if first.get_vocab() != second.get_vocab():
        raise UserError(
            f"{names[0]} and {names[1]} have different vocabularies ({len(first)} and {len(second)} tokens); {remedy}"
        )


def _check_settings(folder: Path) -> None:
    file = folder / SETTINGS
    settings = read_optional(file)
    template = settings.get("chat_template")
    # transformers also accepts a list of named templates.
    named = isinstance(template, list) and all(
        isinstance(entry, dict) and isinstance(entry.get("template"), str) and isinstance(entry.get("name"), str)
        for entry in template
    )
    if template is not None and not isinstance(template, str | dict) and not named:
        raise UserError(f"{file}: chat_template is a {type(template).__name__}; expected text. {FIX}")
    for name in NAMES:
        value = settings.get(name)
        content = value.get("content") if isinstance(value, dict) else value
        if content is not None and not isinstance(content, str):
            raise UserError(f"{file}: {name} is {content!r}; expected text. {FIX}")
    versions = settings.get("fast_tokenizer_files") or []
    if not isinstance(versions, list) or any(name != Path(str(name)).name for name in versions):
        raise UserError(f"{file}: fast_tokenizer_files names {versions}; only files of the folder are read. {FIX}")
    for path in [folder / TEMPLATE, *sorted((folder / "additional_chat_templates").glob("*.jinja"))]:
        _check_text(path)


def _check_text(file: Path) -> None:
    if not file.exists():
        return
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read as text ({error}). {FIX}") from None
    if not text.strip():
        raise UserError(f"{file}: is empty. {FIX}")


def token_ids(file: Path) -> dict[str, int]:
    """Return every token of a ``tokenizer.json`` with its id. Raises ``UserError`` for a damaged file."""
    content = read_object(file)
    model = content.get("model")
    if not isinstance(model, dict):
        raise UserError(f"{file}: has no 'model' that holds a vocabulary. {FIX}")
    vocabulary = model.get("vocab") or {}
    if isinstance(vocabulary, list):  # Unigram: pieces with their scores, in the order of their ids
        pieces = [piece for piece in vocabulary if isinstance(piece, list) and piece]
        vocabulary = {str(piece[0]): index for index, piece in enumerate(pieces)}
    added = content.get("added_tokens") or []
    if not isinstance(vocabulary, dict) or not isinstance(added, list):
        raise UserError(f"{file}: its vocabulary is no mapping of tokens to ids. {FIX}")
    try:
        ids = vocabulary | {entry["content"]: entry["id"] for entry in added}
    except (KeyError, TypeError):
        raise UserError(f"{file}: added_tokens holds an entry without content and id. {FIX}") from None
    invalid = next((token for token, index in ids.items() if type(index) is not int or index < 0), None)
    if invalid is not None:
        raise UserError(
            f"{file}: the token {invalid!r} has the id {ids[invalid]!r}; expected a whole number from 0. {FIX}"
        )
    return ids
