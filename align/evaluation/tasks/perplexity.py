"""Bits per byte of held-out plain text: whether training made a model forget what it knew before.

No template, no prompt: the text as it is, in windows as lm-eval's ``loglikelihood_rolling`` makes them. Bits per byte
compare models with different tokenizers, since all are asked about the same bytes; loss per token does not. Left out:
perplexity itself, which is ``exp(loss)``.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from align.data.rows import read_rows, user
from align.errors import UserError
from align.evaluation.tasks.base import Given, Item, Measured, Metric, Reader, SystemInfo, Task, TaskConfig
from align.evaluation.tasks.documents import Document, divide, find_documents, read_text, source_of, text_of
from align.evaluation.tasks.encoding import prefix_token, rolling_windows
from align.evaluation.tasks.reading import TaskData, draw, read_records
from align.store.fingerprint import digest, file_digest

BLOCK_CHARACTERS = 200_000
"""Text read between two results on disk: what an interrupted reading loses."""
SHOWN = 500
"""Characters of a document that stand among the samples."""
MOST_SHOWN = 64
PLACES = ("files", "dataset", "revision", "config", "split")

METRICS = {
    "bits_per_byte": Metric(
        "bits per byte",
        "lower",
        "bits/byte",
        "what the text costs under the model, per byte of UTF-8; all documents together, so that long ones count more",
    ),
    "loss": Metric(
        "loss per token",
        "lower",
        "nats/token",
        "as bits per byte, per token; compares only models that share a tokenizer",
    ),
}


class PerplexityConfig(TaskData, TaskConfig):
    """Held-out plain text."""

    task: Literal["perplexity"] = "perplexity"
    files: list[str] | None = Field(None, min_length=1)
    """Paths or globs: .txt and .md files, a document each, and files of records as for the other tasks; relative to the
    current directory."""
    texts: str | None = None
    """Stage of plain texts, one of the evaluation's ``texts``, whose ``test`` split is read instead of files. A
    baseline with ``shots`` then reads as many texts of the ``train`` split before each of them, and one with ``system``
    that: what prompting can do for a domain."""
    fields: list[str] | None = Field(None, min_length=1)
    """Fields that make up a record's text, joined by a blank line. By default ``text`` (or content, document, page),
    else the contents of ``messages``, or of ``prompt`` and ``completion``, without a template."""
    chunk: int | None = Field(None, ge=200)
    """Divide documents into pieces of at most this many characters, at line breaks where there are some; each becomes a
    document of its own. One long file is a sample of one, and has no interval."""
    max_characters: int | None = Field(None, ge=1)
    """Read only the beginning of each document. In characters, so that every tokenizer reads the same text."""
    max_length: int = Field(1024, ge=1)
    """Tokens of a window, or as many as the model can read where that is fewer; more context makes text cheaper."""

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if self.texts is None:
            return super()._one_place()  # type: ignore[operator,no-any-return]
        given = [name for name in (*PLACES, "fields") if getattr(self, name) is not None]
        if given:
            raise ValueError(f"it has texts, so '{given[0]}' means nothing; drop one of them")
        return self

    def identities(self, base: Path) -> dict[str, str]:
        """Digests of the files."""
        from align.data.sources import identity

        if self.files is None:
            return {}
        texts, records = find_documents(self.files, base)
        found = {} if records is None else identity(records, base)
        for path in texts:
            name, number = path.name, 2
            while name in found:
                name, number = f"{path.name} ({number})", number + 1
            found[name] = f"sha256:{file_digest(path)}"
        return found

    def described(self, base: Path) -> dict[str, Any]:
        """Digests of the files, plain ones as well, or the dataset; and what is read of each document."""
        if self.texts is not None:
            found: dict[str, Any] = {"texts": self.texts}
        else:
            found = super().described(base) if self.files is None else {"files": self.identities(base)}
        limits = {name: getattr(self, name) for name in ("fields", "chunk", "max_characters", "max_items")}
        return found | {name: value for name, value in limits.items() if value is not None}

    def documents(self, given: Given) -> list[Document]:
        """The texts, at most ``max_items``. Raises ``UserError`` for records without text, and where there is none."""
        if self.texts is not None:
            rows = read_rows(given.texts[self.texts].split("test"))
            found = [Document(str(row["source"]), row["text"]) for row in rows]
        else:
            texts, source = ([], self.source()) if self.files is None else find_documents(self.files, given.base)
            found = [Document(path.name, read_text(path)) for path in texts]
            records = [] if source is None else read_records(source, given.base)
            found += [Document(source_of(record), text_of(record, self.fields)) for record in records]
        full = [one for one in found if one.text.strip()]
        if len(full) < len(found):
            given.warn(f"{len(found) - len(full)} of {len(found)} documents are empty and left out")
        if not full:
            raise UserError(f"there is no text in the {len(found)} documents; nothing could be read.")
        if self.chunk is not None:
            full = [Document(one.source, piece) for one in full for piece in divide(one.text, self.chunk)]
            full = [one for one in full if one.text.strip()]
        cut = [Document(one.source, one.text[: self.max_characters]) for one in full]
        return draw(cut, self.max_items, given.seed)

    def build(self, name: str, given: Given) -> PerplexityTask:
        """Read the texts."""
        task = PerplexityTask(name, self.documents(given), self.max_length)
        if self.texts is not None:
            shown = read_rows(given.texts[self.texts].split("train"))
            random.Random(f"shown:{given.seed}").shuffle(shown)  # noqa: S311
            task.shown = [row["text"] for row in shown[:MOST_SHOWN]]
        if len(task.documents) < 10:
            given.warn(
                f"{name}: {len(task.documents)} documents are a small sample; an interval over so few means little. "
                "Give more, or divide long ones by `chunk`."
            )
        task.described = self.described(given.base)
        return task


class PerplexityTask(Task):
    """See the module."""

    reads = True
    kind = "perplexity"
    title = "Held-out text"

    def __init__(self, name: str, documents: Sequence[Document], max_length: int) -> None:
        self.name, self.documents, self.max_length = name, list(documents), max_length
        self.metrics = METRICS
        self.primary = "bits_per_byte"
        seen: dict[str, int] = {}
        self.items = []
        for one in self.documents:
            seen[one.id] = number = seen.get(one.id, 0) + 1
            shown = one.text if len(one.text) <= SHOWN else f"{one.text[:SHOWN]} …"
            self.items.append(Item(one.id if number == 1 else f"{one.id}-{number}", one.source, [user(shown)]))
        self.described: dict[str, Any] = {}
        self.shown: list[str] | None = None
        """Texts that baselines with ``shots`` read first; None where prompting plays no part."""

    def check(self, info: SystemInfo) -> None:
        """There must be as many texts to show as a baseline shows."""
        if self.shown is not None and info.shots > len(self.shown):
            raise UserError(
                f"baseline '{info.name}' shows {info.shots} texts, and there are {len(self.shown)}; lower shots."
            )

    def settings(self) -> dict[str, Any]:
        """Data and windows."""
        return {
            **self.described,
            "bytes": sum(len(one.text.encode()) for one in self.documents),
            "window": self.max_length,
            "windows": "disjoint, one token of context before each; the last one keeps as much as it can read",
        }

    def read(self, reader: Reader) -> Measured:
        """The text's cost under one checkpoint; of ways of prompting, texts shown before and system messages count."""
        window = min(self.max_length, reader.max_length)
        before = self._before(reader, window)
        losses: list[float] = []
        tokens: list[int] = []
        windows = unknown = 0
        for number, block in enumerate(_blocks(self.documents)):
            identity = digest(["perplexity 2", window, [one.text for one in block], before])
            read = partial(self._read_block, reader, block, window, before)
            kept = reader.kept(f"{self.name}-{number}", identity, read)
            losses += kept["losses"]
            tokens += kept["tokens"]
            windows += kept["windows"]
            unknown += kept["unknown"]
        sizes = [len(one.text.encode()) for one in self.documents]
        prefix = prefix_token(reader.tokenizer)
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
                "unknown_tokens": unknown,
                "windows": windows,
                "window": window,
                **({"tokens_shown_before": len(before)} if before else {}),
                "first_context": reader.tokenizer.decode([prefix]),
            },
        )

    def _before(self, reader: Reader, window: int) -> list[int]:
        """Ids of what a prompted system reads before each window; raises ``UserError`` where they leave no room."""
        if self.shown is None:
            return []
        info = reader.info
        parts = [*([info.system] if info.system else []), *self.shown[: info.shots]]
        ids = reader.tokenizer.encode("".join(f"{part}\n\n" for part in parts), add_special_tokens=False)
        if parts and len(ids) > window // 2:
            raise UserError(
                f"{self.name}: what '{info.name}' reads first is {len(ids)} tokens, more than half of a window of "
                f"{window}. Lower shots or raise max_length."
            )
        return [int(token) for token in ids] if parts else []

    def _read_block(
        self, reader: Reader, block: Sequence[Document], window: int, before: Sequence[int] = ()
    ) -> dict[str, Any]:
        """Nats and tokens of each document."""
        tokenizer = reader.tokenizer
        # Without the tokenizer's own special tokens: they are no part of the text, and a prefix is there already.
        texts = [[int(token) for token in tokenizer.encode(one.text, add_special_tokens=False)] for one in block]
        if not all(texts):
            raise UserError(
                f"{self.name}: '{reader.info.name}' has no token for a document that begins "
                f"{block[texts.index([])].text[:40]!r}. Leave it out."
            )
        prefix = prefix_token(tokenizer)
        divided = [rolling_windows(ids, prefix, window - len(before)) for ids in texts]
        if before:
            divided = [
                [([prefix, *before, *(context if at else [])], asked) for at, (context, asked) in enumerate(windows)]
                for windows in divided
            ]
        pairs = [pair for windows in divided for pair in windows]
        flat = iter(reader.logprobs([context for context, _ in pairs], [asked for _, asked in pairs]))
        losses = [-math.fsum(value for _ in windows for value in next(flat)) for windows in divided]
        if any(math.isnan(loss) for loss in losses):
            raise RuntimeError(f"{self.name}: '{reader.info.name}' gives probabilities that are not numbers (NaN)")
        unknown = tokenizer.unk_token_id
        return {
            "losses": losses,
            "tokens": [len(ids) for ids in texts],
            "windows": len(pairs),
            "unknown": 0 if unknown is None else sum(ids.count(unknown) for ids in texts),
        }


def _blocks(documents: Sequence[Document]) -> list[list[Document]]:
    """Runs of documents with about ``BLOCK_CHARACTERS`` together."""
    found: list[list[Document]] = []
    size = 0
    for one in documents:
        if not found or size >= BLOCK_CHARACTERS:
            found.append([])
            size = 0
        found[-1].append(one)
        size += len(one.text)
    return found
