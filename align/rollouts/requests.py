"""Requests to a model, their answers, and a cache of both on disk, so that nothing is asked twice.

A request is named by the sha256 of its canonical JSON: model, messages, sampling, seed and which of several samples it
is. The cache is one JSON line a write, appended; a process killed in the middle of one loses that line. Torch-free.
Left out: who answers (``endpoint.py``, ``local_model.py``) and what it costs (``asking.py``).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock

from align.data.rows import Message
from align.errors import UserError
from align.fingerprint import digest

FILE = "answers.jsonl"


@dataclass(frozen=True)
class Request:
    """One answer wanted: everything that decides it, and nothing else."""

    model: dict[str, str]
    """What stands for the model: the key of a checkpoint, or an endpoint's address and its name of the model."""
    messages: list[Message]
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    sample: int = 0
    """Which of several answers to the same messages this is."""

    @cached_property
    def key(self) -> str:
        """64 hex digits."""
        return digest(asdict(self))

    @property
    def own_seed(self) -> int:
        """Seed of this very answer, in [0, 2**31): it follows from the key, so order and company do not change it."""
        return int(self.key[:8], 16) >> 1


@dataclass(frozen=True)
class Answer:
    """What came back."""

    text: str
    finished: bool = True
    """False when the length limit cut it off."""
    refused: bool = False
    """The endpoint said that it would not answer."""
    prompt_tokens: int | None = None
    """None where the endpoint does not say."""
    completion_tokens: int | None = None
    error: str = ""
    """Why there is no answer, where the request itself was at fault. Never cached."""


@dataclass(frozen=True)
class Found:
    """An answer read from a cache, and whether that cache had it from another one."""

    answer: Answer
    copied: bool


class RequestCache:
    """Answers by key in ``<folder>/answers.jsonl``. Several processes may share a folder; one reads what it finds.

    A line is ``{"answers": [...]}``: what was written together is there together or not at all. Only places in the file
    are held in memory.
    """

    def __init__(self, folder: Path) -> None:
        """Open or make the cache: a half-written last line is cut off, other unreadable lines are left and counted."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.path = folder / FILE
            self._lock = FileLock(f"{self.path}.lock")
            with self._lock:
                self._file = self.path.open("a+b", buffering=0)
                self._cut_off_half_line()
        except OSError as error:
            raise UserError(f"the cache of requests at {folder} cannot be opened: {error.strerror or error}.") from None
        self.unreadable = 0
        self.lost: list[Request] = []
        """Requests that were given up, once for each attempt: a server may have answered and charged for them."""
        self._places: dict[bytes, tuple[int, int, int]] = {}  # key -> offset and length of the line, place within it
        self._last: tuple[int, list[Any]] = (-1, [])
        self._read_all()

    def _cut_off_half_line(self) -> None:
        """Under the lock nobody is in the middle of a line, so an end without a line break is a writer that died."""
        size = os.fstat(self._file.fileno()).st_size
        if size == 0 or os.pread(self._file.fileno(), 1, size - 1) == b"\n":
            return
        end = size
        while end > 0:
            start = max(0, end - (1 << 16))
            self._file.seek(start)
            at = self._file.read(end - start).rfind(b"\n")
            if at >= 0:
                end = start + at + 1
                break
            end = start
        os.ftruncate(self._file.fileno(), end)

    def _read_all(self) -> None:
        self._file.seek(0)
        offset = 0
        with self.path.open("rb") as file:
            for line in file:
                if line.endswith(b"\n"):
                    self._note(line, offset)
                offset += len(line)

    def _note(self, line: bytes, offset: int) -> None:
        try:
            found = json.loads(line)
            keys = [bytes.fromhex(one["key"]) for one in found["answers"]]
            for one in found["answers"]:
                Answer(**one["answer"])
            lost = [Request(**one) for one in found.get("lost", [])]
        except (ValueError, KeyError, TypeError, AttributeError):
            self.unreadable += 1
            return
        self.lost += lost
        for place, key in enumerate(keys):
            self._places.setdefault(key, (offset, len(line), place))

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: str) -> bool:
        return bytes.fromhex(key) in self._places

    def get(self, key: str) -> Found | None:
        """The answer to a request, or None."""
        where = self._places.get(bytes.fromhex(key))
        if where is None:
            return None
        offset, length, place = where
        if offset != self._last[0]:  # neighbours are read one after the other
            self._last = offset, json.loads(os.pread(self._file.fileno(), length, offset))["answers"]
        one = self._last[1][place]
        return Found(Answer(**one["answer"]), one["copied"])

    def put(self, answered: Iterable[tuple[Request, Answer]], *, copied: bool = False) -> None:
        """Keep answers, together: after a kill all of them are there or none."""
        entries = [
            {"key": request.key, "request": asdict(request), "answer": asdict(answer), "copied": copied}
            for request, answer in answered
        ]
        if entries:
            self._append({"answers": entries})

    def asked(self) -> Iterator[tuple[Request, Answer]]:
        """Everything that was answered for this cache, what was copied from another left out."""
        with self.path.open("rb") as file:
            for offset in sorted({offset for offset, _, _ in self._places.values()}):
                file.seek(offset)
                for one in json.loads(file.readline())["answers"]:
                    if not one["copied"]:
                        yield Request(**one["request"]), Answer(**one["answer"])

    def lose(self, request: Request) -> None:
        """Note an attempt that was given up."""
        self._append({"answers": [], "lost": [asdict(request)]})

    def _append(self, entry: dict[str, Any]) -> None:
        line = json.dumps(entry, ensure_ascii=True, sort_keys=True).encode("ascii") + b"\n"
        with self._lock:
            self._cut_off_half_line()
            offset = os.fstat(self._file.fileno()).st_size
            written = 0
            while written < len(line):  # a full disk may take a part of it, and then raises
                written += os.write(self._file.fileno(), line[written:])
        self._note(line, offset)

    def sync(self) -> None:
        """Have the disk hold what was written: a kill needs none of this, a power cut does."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Sync and close the file."""
        self.sync()
        self._file.close()
