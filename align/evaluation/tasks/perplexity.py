"""Bits per byte of held-out plain text: how much a model forgot in training.

No template, no prompt: the text as it is, in windows as lm-eval's ``loglikelihood_rolling`` makes them. Bits per byte
compare models with different tokenizers, since all read the same bytes; loss per token does not. Perplexity itself is
``exp(loss)`` and not shown.
"""

from __future__ import annotations

import glob
import hashlib
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.config.recipe.source_settings import FilesSource, HubSource
from align.config.stages.evaluation.tasks import PerplexityConfig
from align.config.user_paths import matching_paths
from align.data.rows import read_rows, user
from align.errors import UserError
from align.evaluation.answers import Item, Measured
from align.evaluation.scorecard import SystemInfo, read_metrics
from align.evaluation.tasks.base import Task, TaskInputs
from align.evaluation.tasks.likelihood import Block, prefix_token, read_blocks, require_numbers, rolling_windows
from align.evaluation.tasks.records import (
    TaskRecord,
    describe_records,
    distinct_name,
    draw,
    numbered_ids,
    read_records,
    record_source,
)
from align.store.fingerprint import file_digest

if TYPE_CHECKING:
    from align.evaluation.participants import Reader

TEXT_SUFFIXES = (".txt", ".md")
TEXT_FIELDS = ("text", "content", "document", "page")
CONVERSATION_FIELDS = ("messages", "conversations", "prompt", "completion")
BLOCK_CHARACTERS = 200_000
"""Characters per cached result: an interrupted run loses at most one block."""
SHOWN_CHARACTERS = 500
"""Characters of a document among the samples."""
MAX_PREFIX_TEXTS = 64
"""Texts of the train split that baselines with ``shots`` choose from."""


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
    from align.data.sources import find_files

    texts: dict[Path, None] = {}
    record_patterns: list[str] = []
    for pattern in patterns:
        files = [path.absolute() for path in matching_paths(pattern, base) if path.is_file()]
        plain_texts = [path for path in files if path.suffix.lower() in TEXT_SUFFIXES]
        texts |= dict.fromkeys(plain_texts)
        if not plain_texts:
            record_patterns.append(pattern)
            find_files([pattern], base)  # raises UserError for a pattern without a match
        # A pattern that matches texts and records is replaced by the paths of its records.
        record_patterns += [glob.escape(str(path)) for path in files if plain_texts and path not in texts]
    return list(texts), FilesSource(type="files", paths=record_patterns) if record_patterns else None


def read_text(path: Path) -> str:
    """Return a file's text without its byte order mark. Raises ``UserError`` if it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8.") from None


def record_text(record: TaskRecord, fields: Sequence[str] | None) -> str:
    """Return a record's text: its ``fields``, or the usual text fields. Raises ``UserError`` if it has none."""
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

    A piece ends after the last line break in its second half, else after the last space there, else at the limit.
    """
    pieces = []
    while len(text) > limit:
        # The cut is at a line's end, else at a word's, but never in the first half: pieces would become too short.
        line_end, word_end = (text.rfind(sign, limit // 2, limit) + 1 for sign in ("\n", " "))
        end = line_end or word_end or limit
        pieces.append(text[:end])
        text = text[end:]
    return [*pieces, text]


def identities(config: PerplexityConfig, base: Path) -> dict[str, str]:
    """Return digests of the files, plain texts and records."""
    from align.data.sources import identity

    if config.files is None:
        return {}
    paths, records = find_documents(config.files, base)
    digests = {} if records is None else identity(records, base)
    for path in paths:
        digests[distinct_name(path.name, digests)] = f"sha256:{file_digest(path)}"
    return digests


def describe(config: PerplexityConfig, base: Path) -> dict[str, Any]:
    """Return what identifies the texts, and the limits on each document. JSON-able."""
    if config.texts is not None:
        description: dict[str, Any] = {"texts": config.texts}
    elif config.files is not None:
        description = {"files": identities(config, base)}
    else:
        description = describe_records(config, base)
    limits = {name: getattr(config, name) for name in ("fields", "chunk", "max_characters", "max_items")}
    return description | {name: value for name, value in limits.items() if value is not None}


def read_documents(config: PerplexityConfig, inputs: TaskInputs) -> list[Document]:
    """Return the texts, at most ``max_items``. Raises ``UserError`` for records without text, and for none at all."""
    if config.texts is not None:
        rows = read_rows(inputs.texts[config.texts].split("test"))
        documents = [Document(str(row["source"]), row["text"]) for row in rows]
    else:
        paths: list[Path] = []
        source: FilesSource | HubSource | None
        if config.files is None:
            source = record_source(config)
        else:
            paths, source = find_documents(config.files, inputs.base)
            source = source and source.model_copy(update=config.record_mapping())
        documents = [Document(path.name, read_text(path)) for path in paths]
        records = [] if source is None else read_records(source, inputs.base, config.columns)
        documents += [Document(source_name(record), record_text(record, config.fields)) for record in records]
    full = [document for document in documents if document.text.strip()]
    if len(full) < len(documents):
        inputs.warn(f"{len(documents) - len(full)} of {len(documents)} documents are empty and left out")
    if not full:
        raise UserError(f"there is no text in the {len(documents)} documents; nothing could be read.")
    if config.chunk is not None:
        pieces = [
            Document(document.source, piece) for document in full for piece in divide(document.text, config.chunk)
        ]
        full = [piece for piece in pieces if piece.text.strip()]
    cut = [Document(document.source, document.text[: config.max_characters]) for document in full]
    return draw(cut, config.max_items, inputs.seed)


def build(name: str, config: PerplexityConfig, inputs: TaskInputs) -> PerplexityTask:
    """Build the task from its texts."""
    task = PerplexityTask(name, read_documents(config, inputs), config.max_length)
    if config.texts is not None:
        rows = read_rows(inputs.texts[config.texts].split("train"))
        random.Random(f"shown:{inputs.seed}").shuffle(rows)  # noqa: S311
        task.prefix_texts = [row["text"] for row in rows[:MAX_PREFIX_TEXTS]]
    if len(task.documents) < 10:
        inputs.warn(
            f"{name}: {len(task.documents)} documents are a small sample; an interval over so few means little. "
            "Give more, or divide long ones by `chunk`."
        )
    task.description = describe(config, inputs.base)
    return task


class PerplexityTask(Task):
    """Documents that a checkpoint reads in windows."""

    reads = True
    kind = "perplexity"
    title = "Held-out text"

    def __init__(self, name: str, documents: Sequence[Document], max_length: int) -> None:
        self.name = name
        self.documents = list(documents)
        self.max_length = max_length
        self.metrics = read_metrics(self.kind)
        self.primary = "bits_per_byte"
        self.items = []
        ids = numbered_ids([document.id for document in self.documents])
        for id, document in zip(ids, self.documents, strict=True):
            text = document.text
            if len(text) > SHOWN_CHARACTERS:
                text = f"{text[:SHOWN_CHARACTERS]} …"
            self.items.append(Item(id, document.source, [user(text)]))
        self.description: dict[str, Any] = {}
        self.prefix_texts: list[str] | None = None
        """Texts that baselines with ``shots`` read first; None if prompting plays no part."""

    def check(self, info: SystemInfo) -> None:
        """Check that there are as many texts as a baseline has shots."""
        if self.prefix_texts is not None and info.shots > len(self.prefix_texts):
            raise UserError(
                f"baseline '{info.name}' shows {info.shots} texts, and there are {len(self.prefix_texts)}; lower shots."
            )

    def check_reading(self, info: SystemInfo, tokenizer: Any, max_length: int) -> None:
        """Check that what a prompted system reads first leaves room for the text."""
        self._prefix_ids(info, tokenizer, min(self.max_length, max_length))

    def settings(self) -> dict[str, Any]:
        """Return data and windows."""
        return {
            **self.description,
            "bytes": sum(len(document.text.encode()) for document in self.documents),
            "window": self.max_length,
            "windows": "disjoint, one token of context before each; the last one keeps as much as it can read",
        }

    def read(self, reader: Reader) -> Measured:
        """Return the loss under one checkpoint; a prompted system reads its prompt and texts before each window."""
        window = min(self.max_length, reader.max_length)
        prefix = self._prefix_ids(reader.info, reader.tokenizer, window)
        result = read_blocks(reader, self.name, self._blocks(reader, window, prefix))
        losses = result["losses"]
        tokens = result["tokens"]
        sizes = [len(document.text.encode()) for document in self.documents]
        # Weighted by bytes and by tokens, a mean over documents equals the rate over the whole text.
        return Measured(
            values={
                "bits_per_byte": [[loss / math.log(2) / size] for loss, size in zip(losses, sizes, strict=True)],
                "loss": [[loss / count] for loss, count in zip(losses, tokens, strict=True)],
            },
            weights={
                "bits_per_byte": [float(size) for size in sizes],
                "loss": [float(count) for count in tokens],
            },
            notes={
                "tokens": sum(tokens),
                "unknown_tokens": result["unknown"],
                "windows": result["windows"],
                "window": window,
                **({"tokens_shown_before": len(prefix)} if prefix else {}),
                "first_context": reader.tokenizer.decode([prefix_token(reader.tokenizer)]),
            },
        )

    def _blocks(self, reader: Reader, window: int, prefix: Sequence[int]) -> Iterator[Block]:
        """Yield blocks of documents, in order, of about ``BLOCK_CHARACTERS`` each."""
        blocks: list[list[Document]] = [[]]
        size = 0
        for document in self.documents:
            if size >= BLOCK_CHARACTERS:
                blocks.append([])
                size = 0
            blocks[-1].append(document)
            size += len(document.text)
        for number, block in enumerate(blocks):
            # The number changes with the computation, so results of an older version are not reused.
            identity = ["perplexity 3", window, [document.text for document in block], prefix]
            yield number, identity, partial(self._read_block, reader, block, window, prefix)

    def _prefix_ids(self, info: SystemInfo, tokenizer: Any, window: int) -> list[int]:
        """Return the ids that a prompted system reads before each window.

        Raises ``UserError`` if they fill half of a window or more.
        """
        if self.prefix_texts is None:
            return []
        parts = [*([info.system] if info.system else []), *self.prefix_texts[: info.shots]]
        if not parts:
            return []
        ids = tokenizer.encode("".join(f"{part}\n\n" for part in parts), add_special_tokens=False)
        if 2 * len(ids) >= window:
            raise UserError(
                f"{self.name}: '{info.name}' reads {len(ids)} tokens first, half of a window of {window} or more. "
                "Lower shots or raise max_length."
            )
        return [int(token) for token in ids]

    def _read_block(
        self, reader: Reader, block: Sequence[Document], window: int, prefix: Sequence[int] = ()
    ) -> dict[str, Any]:
        """Return the loss in nats and the number of tokens of each document."""
        tokenizer = reader.tokenizer
        # Without the tokenizer's special tokens: they are no part of the text, and a first context is there already.
        documents = [
            [int(token) for token in tokenizer.encode(document.text, add_special_tokens=False)] for document in block
        ]
        if not all(documents):
            raise UserError(
                f"{self.name}: '{reader.info.name}' has no token for a document that begins "
                f"{block[documents.index([])].text[:40]!r}. Leave it out."
            )
        first = prefix_token(tokenizer)
        # The prompt and its first context reduce the room in every window, so all have at most one length.
        shown = [first, *prefix] if prefix else []
        divided = [rolling_windows(ids, first, window - len(shown)) for ids in documents]
        if shown:
            divided = [_prepend(windows, shown) for windows in divided]
        pairs = [pair for windows in divided for pair in windows]
        flat = iter(reader.logprobs([context for context, _ in pairs], [targets for _, targets in pairs]))
        losses = [-math.fsum(value for _ in windows for value in next(flat)) for windows in divided]
        require_numbers(losses, self.name, reader.info.name)
        unknown = tokenizer.unk_token_id
        return {
            "losses": losses,
            "tokens": [len(ids) for ids in documents],
            "windows": len(pairs),
            "unknown": 0 if unknown is None else sum(ids.count(unknown) for ids in documents),
        }


def _prepend(windows: list[tuple[list[int], list[int]]], prefix: list[int]) -> list[tuple[list[int], list[int]]]:
    """Put the prefix before every window; it replaces the first window's context."""
    return [([*prefix, *(context if number else [])], targets) for number, (context, targets) in enumerate(windows)]
