"""Documents for tasks that read plain text: files of one text each, records with a text in them, and their pieces."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from align.config.user_paths import user_path
from align.data.source_configs import FilesSource
from align.errors import UserError
from align.evaluation.tasks.reading import TaskRecord

TEXT_FILES = (".txt", ".md")
TEXTS = ("text", "content", "document", "page")
CONVERSATIONS = ("messages", "conversations", "prompt", "completion")


@dataclass(frozen=True)
class Document:
    """A text and where it is from."""

    source: str
    text: str

    @property
    def id(self) -> str:
        """16 hex digits of the text."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]


def find_documents(patterns: Sequence[str], base: Path) -> tuple[list[Path], FilesSource | None]:
    """Plain texts among the files that fit the patterns, and a source of those that hold records."""
    from align.data.sources import find_files

    texts: dict[Path, None] = {}
    others: list[str] = []
    for pattern in patterns:
        names = glob.glob(str(user_path(pattern, base)), recursive=True)
        found = [Path(name).absolute() for name in sorted(names) if Path(name).is_file()]
        plain = [path for path in found if path.suffix.lower() in TEXT_FILES]
        texts |= dict.fromkeys(plain)
        if not plain:
            others.append(pattern)
            find_files([pattern], base)  # says what is wrong with a pattern that matches nothing
        others += [glob.escape(str(path)) for path in found if plain and path not in texts]
    return list(texts), FilesSource(type="files", paths=others) if others else None


def read_text(path: Path) -> str:
    """A file as it is, a byte order mark aside. Raises ``UserError`` for what is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8.") from None


def text_of(record: TaskRecord, fields: Sequence[str] | None) -> str:
    """A record's text: its ``fields``, or what looks like one. Raises ``UserError`` where nothing does."""
    if fields is not None:
        return "\n\n".join(_words(record, field) for field in fields)
    field = next((name for name in TEXTS if isinstance(record.get(name), str)), None)
    if field is not None:
        return str(record[field])
    parts = [name for name in CONVERSATIONS if record.get(name) is not None]
    if not parts:
        raise UserError(
            f"{record.where}: no field looks like text; there are {', '.join(sorted(record)) or 'none'}. Name the "
            f"text's: fields: [{next(iter(sorted(record)), 'text')}]."
        )
    return "\n\n".join(_words(record, name) for name in parts)


def _words(record: TaskRecord, field: str) -> str:
    """A field's text, or the contents of its messages."""
    value = record[field]
    if isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value):
        parts = [turn.get("content", turn.get("value")) for turn in value]
        if all(isinstance(part, str) for part in parts):
            return "\n\n".join(str(part) for part in parts)
    if not isinstance(value, str):
        raise record.wrong(field, "text or a list of messages")
    return value


def source_of(record: TaskRecord) -> str:
    """The file's name, for the table by source."""
    return record.where.rsplit(":", 1)[0].replace("\\", "/").rsplit("/", 1)[-1]


def divide(text: str, most: int) -> list[str]:
    """Pieces of at most ``most`` characters that make up the text, ended by a line break, else by a space, where one
    stands in their second half."""
    pieces = []
    while len(text) > most:
        ends = [text.rfind(sign, most // 2, most) + 1 for sign in ("\n", " ")]
        end = ends[0] or ends[1] or most
        pieces.append(text[:end])
        text = text[end:]
    return [*pieces, text]
