"""Requests to a model, their answers, and a cache of both on disk, so no request is sent twice.

A request's key is the sha256 of its canonical JSON: model, messages, sampling, seed, and its number among several
samples. The cache is an append-only file with one sealed JSON line per write. A process killed in the middle of a write
loses that line, and a line that was changed is ignored. Torch-free. Leaves out who answers (``endpoint_client.py``,
``align.extensions.synthesis.local_model``) and what it costs (``cached_client.py``).
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import threading
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from align.data.rows import Message
from align.errors import UserError
from align.store.fingerprint import digest
from align.store.json_files import parse_sealed, seal


@dataclass(frozen=True)
class Request:
    """Exactly the fields that decide one answer."""

    model: dict[str, str]
    """Identity of the model: the digest of a checkpoint, or an endpoint's address and its name of the model."""
    messages: list[Message]
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    sample: int = 0
    """Number among several answers to the same messages."""
    tools: str = ""
    """Functions that the model may call, as a JSON list; empty for none."""
    response_format: str = ""
    """Format of the answer, as JSON in OpenAI's ``response_format``; empty for text. Only servers read it."""

    @cached_property
    def key(self) -> str:
        """Return the sha256 of the request, 64 hex digits."""
        content = asdict(self)
        # As it was before these fields, so earlier answers stay in the caches.
        for name in ("tools", "response_format"):
            if not content[name]:
                del content[name]
        return digest(content)

    @property
    def own_seed(self) -> int:
        """Return the seed of this answer, in [0, 2**31): it follows from the key, whatever else is requested."""
        return int(self.key[:8], 16) >> 1


@dataclass(frozen=True)
class Answer:
    """The model's answer to a request."""

    text: str
    finished: bool = True
    """False when the length limit cut it off."""
    refused: bool = False
    """True when the endpoint said that it would not answer."""
    prompt_tokens: int | None = None
    """None if the endpoint does not say."""
    completion_tokens: int | None = None
    error: str = ""
    """Reason for a missing answer, if the request itself was at fault. Never cached."""
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    """Calls of tools: ``id``, ``name``, and ``arguments`` as the model wrote them, JSON text."""


@dataclass(frozen=True)
class Lookup:
    """An answer from a cache. ``copied`` is True when that cache copied it from another one."""

    answer: Answer
    copied: bool


@dataclass(frozen=True)
class _Position:
    """Place of an answer on disk: file, offset and length of its line, and index within the line."""

    file: int
    offset: int
    length: int
    index: int


class RequestCache:
    """Answers by key, in ``<folder>/answers-<number>.jsonl``, with a file for each process that writes.

    So any number of processes on any number of machines may share a folder without a lock; each reads what is there
    when it opens the folder. A line is ``{"answers": [...], "seal": ...}``: answers that were written together are
    there together or not at all. Memory holds only positions in the files.
    """

    def __init__(self, folder: Path) -> None:
        """Open or create the cache.

        A half-written last line is ignored. Other unreadable lines, such as a line whose content differs from its seal,
        are counted in ``unreadable``.
        """
        self.folder = folder
        self.unreadable = 0
        self.lost: list[Request] = []
        """Requests that were given up, once per attempt: a server may have answered and charged for them."""
        self._positions: dict[bytes, _Position] = {}
        self._last_line: tuple[tuple[int, int], list[Any]] = ((-1, -1), [])
        """File and offset of the line that was read last, and its answers."""
        self._descriptor: int | None = None
        """Descriptor of this process's file, the last of ``_files``; opened for the first answer."""
        self._end = 0
        """Length of that file's complete lines, in bytes."""
        self._write_lock = threading.Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            # Files of other processes are read once, now; what they write later is not seen.
            self._files = sorted(folder.glob("answers*.jsonl"), key=_number)
            for number, path in enumerate(self._files):
                self._read(number, path)
        except OSError as error:
            raise UserError(f"the cache of requests at {folder} cannot be opened: {error.strerror or error}.") from None

    def _read(self, number: int, path: Path) -> None:
        offset = 0
        with path.open("rb") as file:
            for line in file:
                if line.endswith(b"\n"):
                    self._index(line, number, offset)
                offset += len(line)

    def _index(self, line: bytes, file: int, offset: int) -> None:
        """Add the answers of a line to the index; the first answer to a request counts."""
        try:
            content = parse_sealed(line)
            # Everything is parsed before anything is indexed: a bad line has no effect.
            keys = [bytes.fromhex(entry["key"]) for entry in content["answers"]]
            for entry in content["answers"]:
                Answer(**entry["answer"])
            lost = [Request(**entry) for entry in content.get("lost", [])]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            self.unreadable += 1
            return
        self.lost += lost
        for index, key in enumerate(keys):
            self._positions.setdefault(key, _Position(file, offset, len(line), index))

    def __len__(self) -> int:
        return len(self._positions)

    def __contains__(self, key: str) -> bool:
        return bytes.fromhex(key) in self._positions

    def get(self, key: str) -> Lookup | None:
        """Return the answer to a request, or None."""
        position = self._positions.get(bytes.fromhex(key))
        if position is None:
            return None
        line = (position.file, position.offset)
        last = self._last_line  # read once, since another thread may replace it
        if line != last[0]:  # answers of one line are mostly read one after another
            with self._files[position.file].open("rb") as file:
                file.seek(position.offset)
                last = line, json.loads(file.read(position.length))["answers"]
            self._last_line = last
        entry = last[1][position.index]
        return Lookup(Answer(**entry["answer"]), entry["copied"])

    def put(self, answered: Iterable[tuple[Request, Answer]], *, copied: bool = False) -> None:
        """Write answers in one line: after a kill all of them are there, or none."""
        entries = [
            {"key": request.key, "request": asdict(request), "answer": asdict(answer), "copied": copied}
            for request, answer in answered
        ]
        if entries:
            self._append({"answers": entries})

    def asked(self) -> Iterator[tuple[Request, Answer]]:
        """Yield every request that was sent for this cache, with its answer. Copies from another cache are omitted."""
        # Sorted by file, so each file is opened once and read from its beginning to its end.
        lines = sorted({(position.file, position.offset) for position in self._positions.values()})
        for number, group in itertools.groupby(lines, key=lambda line: line[0]):
            with self._files[number].open("rb") as file:
                for _, offset in group:
                    file.seek(offset)
                    for entry in json.loads(file.readline())["answers"]:
                        if not entry["copied"]:
                            yield Request(**entry["request"]), Answer(**entry["answer"])

    def record_lost(self, request: Request) -> None:
        """Write down an attempt that was given up."""
        self._append({"answers": [], "lost": [asdict(request)]})

    def _append(self, entry: dict[str, Any]) -> None:
        line = json.dumps(seal(entry), ensure_ascii=True, sort_keys=True).encode("ascii") + b"\n"
        with self._write_lock:
            if self._descriptor is None:
                self._descriptor = self._create_file()
            # 1. Drop the part of an earlier line that a full disk may have cut off.
            os.ftruncate(self._descriptor, self._end)
            # 2. Write the line; readers ignore it until its end is there.
            written = 0
            while written < len(line):
                written += os.pwrite(self._descriptor, line[written:], self._end + written)
            # 3. Only a complete line moves the end of the file.
            self._index(line, len(self._files) - 1, self._end)
            self._end += len(line)

    def _create_file(self) -> int:
        """Create a file that no other process writes; returns its descriptor."""
        # Another process may choose the same number at this moment: exclusive creation decides.
        number = _number(self._files[-1]) if self._files else 0
        while True:
            number += 1
            path = self.folder / f"answers-{number}.jsonl"
            with contextlib.suppress(FileExistsError):
                descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
                self._files.append(path)
                self._end = 0
                return descriptor

    def sync(self) -> None:
        """Sync the file to disk. A kill does not need this, a power cut does."""
        if self._descriptor is not None:
            os.fsync(self._descriptor)

    def close(self) -> None:
        """Sync and close the file."""
        self.sync()
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _number(path: Path) -> int:
    """Return the number in a file's name; 0 for ``answers.jsonl``, which earlier versions shared."""
    number = path.stem.partition("-")[2]
    return int(number) if number.isdecimal() else 0
