"""Plain texts for tasks that read them: files of one text each, records with a text field, and pieces of both."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from align.config.recipe.source_settings import FilesSource
from align.config.user_paths import matching_paths
from align.errors import UserError
from align.evaluation.tasks.task_records import TaskRecord

TEXT_SUFFIXES = (".txt", ".md")
TEXT_FIELDS = ("text", "content", "document", "page")
CONVERSATION_FIELDS = ("messages", "conversations", "prompt", "completion")


@dataclass(frozen=True)
class Document:
    """A text and the name of its source."""

    source: str
    text: str

    @property
    def id(self) -> str:
        """Digest of the text, 16 hex digits."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]


def find_documents(patterns: Sequence[str], base: Path) -> tuple[list[Path], FilesSource | None]:
    """Return the plain texts among the files that match the patterns, and a source of the files with records."""
    from align.data.source_identity import find_files

    texts: dict[Path, None] = {}
    record_patterns: list[str] = []
    for pattern in patterns:
        files = [path.absolute() for path in matching_paths(pattern, base) if path.is_file()]
        plain = [path for path in files if path.suffix.lower() in TEXT_SUFFIXES]
        texts |= dict.fromkeys(plain)
        if not plain:
            record_patterns.append(pattern)
            find_files([pattern], base)  # raises UserError for a pattern that matches nothing
        # A pattern that matches texts and records is replaced by the paths of its records.
        record_patterns += [glob.escape(str(path)) for path in files if plain and path not in texts]
    return list(texts), FilesSource(type="files", paths=record_patterns) if record_patterns else None


def read_text(path: Path) -> str:
    """Return a file's text without its byte order mark. Raises ``UserError`` where it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8.") from None


def record_text(record: TaskRecord, fields: Sequence[str] | None) -> str:
    """Return a record's text: its ``fields``, or the usual text fields. Raises ``UserError`` where it has none."""
    if fields is not None:
        return "\n\n".join(_field_text(record, field) for field in fields)
    field = next((name for name in TEXT_FIELDS if isinstance(record.get(name), str)), None)
    if field is not None:
        return str(record[field])
    parts = [name for name in CONVERSATION_FIELDS if record.get(name) is not None]
    if not parts:
        raise UserError(
            f"{record.where}: no field looks like text; there are {', '.join(sorted(record)) or 'none'}. Name the "
            f"text's: fields: [{next(iter(sorted(record)), 'text')}]."
        )
    return "\n\n".join(_field_text(record, name) for name in parts)


def _field_text(record: TaskRecord, field: str) -> str:
    """Return a field's text, or the contents of its messages."""
    value = record[field]
    if isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value):
        parts = [turn.get("content", turn.get("value")) for turn in value]
        if all(isinstance(part, str) for part in parts):
            return "\n\n".join(str(part) for part in parts)
    if not isinstance(value, str):
        raise record.field_error(field, "text or a list of messages")
    return value


def source_name(record: TaskRecord) -> str:
    """Return the file's name, for the table by source."""
    return record.where.rsplit(":", 1)[0].replace("\\", "/").rsplit("/", 1)[-1]


def divide(text: str, limit: int) -> list[str]:
    """Divide a text into pieces of at most ``limit`` characters.

    A piece ends behind the last line break in its second half, else behind the last space there, else at the limit.
    """
    pieces = []
    while len(text) > limit:
        # Cut at a line's end, else at a word's, but never in the first half: pieces would become too short.
        line_end, word_end = (text.rfind(sign, limit // 2, limit) + 1 for sign in ("\n", " "))
        end = line_end or word_end or limit
        pieces.append(text[:end])
        text = text[end:]
    return [*pieces, text]
