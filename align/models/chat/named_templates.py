"""Chat templates that ship with align, by the name that users give them, and templates for training. Torch-free.

Each file below ``templates/`` writes a published format, without anything that changes with time. Excluded: the limits
of a template (``chat_template.py``), and the choice of eos (``special_tokens.py``).

Episodes append to what was sampled, so turn n must be a prefix of turn n+1. Some published templates drop thoughts of
earlier turns, move tools to the last question, or close the last answer with another token. A file below
``templates/training/`` writes the same prompts and keeps every earlier turn. Excluded: whether a template fits a
model's own, which its user checks.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from align.config.user_paths import user_path
from align.config.validation import nearest
from align.errors import UserError
from align.models.chat.template_settings import store, stored_settings
from align.models.checkpoints.folder_checks import SETTINGS, TEMPLATE, token_ids

FOLDER = Path(__file__).parent / "templates"
TABLES = json.loads((FOLDER / "templates.json").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class NamedTemplate:
    """A format of conversations."""

    models: str
    """Models that use it."""
    tokens: Sequence[str] = ()
    """Special tokens that it writes, next to bos and eos. The last one ends a turn; without any, eos does."""
    tools: bool = False
    """True if it has a place for tools, their calls and their results."""


TEMPLATES: dict[str, NamedTemplate] = {name: NamedTemplate(**fields) for name, fields in TABLES["named"].items()}


def template_file(chat_template: str, base: Path) -> Path:
    """Return the file of a template: a template that ships with align, by its name, or the user's own, by its path.

    Relative paths start at ``base``. Raises ``UserError`` for what is neither.
    """
    if chat_template in TEMPLATES:
        return FOLDER / f"{chat_template}.jinja"
    path = user_path(chat_template, base)
    if path.is_file():
        return path
    close = nearest(chat_template, TEMPLATES) if "/" not in chat_template else None
    hint = f" Did you mean '{close}'?" if close else f" Templates by name: {', '.join(TEMPLATES)}."
    raise UserError(
        f"chat_template: there is no file '{path.absolute()}'; relative paths start at the file that names "
        f"them. It is no template's name either.{hint}"
    )


def read_template(chat_template: str, base: Path) -> str:
    """Return the text of a template, by name or path."""
    file = template_file(chat_template, base)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"chat_template: '{file}' cannot be read as text ({error}).") from None
    if not text.strip():
        raise UserError(f"chat_template: '{file}' is empty.")
    return text


def require_tokens(chat_template: str, vocabulary: Collection[str], place: str) -> None:
    """Raise ``UserError`` if a named template writes a special token that is not in the vocabulary.

    The tokenizer would split it into pieces, and its model would not learn the end of a turn as one token.
    """
    tokens = TEMPLATES[chat_template].tokens if chat_template in TEMPLATES else ()
    missing = [token for token in tokens if token not in vocabulary]
    if missing:
        quoted = ", ".join(f'"{token}"' for token in missing)
        fitting = fitting_templates(vocabulary)
        raise UserError(
            f"chat_template: {chat_template} writes {', '.join(missing)}, which {place} has no token for. Add "
            f"`add_tokens: [{quoted}]`, whose embeddings training must learn, or use a template of tokens that are "
            f"there: {', '.join(fitting)}."
        )


def fitting_templates(vocabulary: Collection[str]) -> list[str]:
    """Return the named templates whose special tokens are in the vocabulary, those with their own tokens first."""
    fitting = [name for name, template in TEMPLATES.items() if all(token in vocabulary for token in template.tokens)]
    return sorted(fitting, key=lambda name: not TEMPLATES[name].tokens)


def templates_with_tools(vocabulary: Collection[str]) -> list[str]:
    """Return the named templates with a place for tools whose special tokens are in the vocabulary."""
    return [name for name in fitting_templates(vocabulary) if TEMPLATES[name].tools]


@lru_cache(maxsize=64)
def _tokens_of(file: Path, size: int, modified: int) -> frozenset[str]:
    """Return the tokens of a ``tokenizer.json``, read once per process while its size and time are unchanged."""
    return frozenset(token_ids(file))


def read_vocabulary(tokenizer_file: Path) -> frozenset[str]:
    """Return the tokens of a ``tokenizer.json``; empty if there is no such file."""
    if not tokenizer_file.is_file():
        return frozenset()
    status = tokenizer_file.stat()
    return _tokens_of(tokenizer_file, status.st_size, status.st_mtime_ns)


def has_template(folder: Path) -> bool:
    """Return True for a folder of a tokenizer with a chat template, in its own file or in its settings."""
    from align.models.checkpoints.files import read_optional

    if (folder / TEMPLATE).is_file() or list((folder / "additional_chat_templates").glob("*.jinja")):
        return True
    return bool(read_optional(folder / SETTINGS).get("chat_template"))


def explain_no_template(name: str, vocabulary: Collection[str]) -> str:
    """Return the message for a model without a chat template, with the templates that fit its vocabulary."""
    fitting = fitting_templates(vocabulary) if vocabulary else list(TEMPLATES)
    return (
        f"'{name}' has no chat template, so conversations cannot be rendered for it; it is probably a base "
        f"model. Name one in the field chat_template: one of align's whose tokens it has ({', '.join(fitting)}), or a "
        "Jinja file."
    )


TRAINING = FOLDER / "training"
TRAINING_TEMPLATES: dict[str, dict[str, list[str]]] = TABLES["training"]
"""Training templates by name, a narrower family's first.

``marks`` are texts that the model's own template has, all of them. ``tokens`` are the special tokens that the training
template writes, next to bos and eos.
"""


def training_templates(template: str, vocabulary: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield name and text of the training templates of a template's family whose tokens are in the vocabulary.

    They have the settings that the template has stored, such as its thinking switch.
    """
    for name, training in TRAINING_TEMPLATES.items():
        is_of_family = all(mark in template for mark in training["marks"])
        if is_of_family and all(token in vocabulary for token in training["tokens"]):
            yield name, store(read_training_template(name), stored_settings(template))


def read_training_template(name: str) -> str:
    """Return the text of a training template."""
    return (TRAINING / f"{name}.jinja").read_text(encoding="utf-8")
