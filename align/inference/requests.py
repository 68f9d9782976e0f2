"""Requests to a model, their answers, and a cache of both on disk, so that nothing is asked twice.

A request is named by the sha256 of its canonical JSON: model, messages, sampling, seed and which of several samples it
is. The cache is one JSON line a write, sealed and appended; a process killed in the middle of one loses that line, and
one that was changed is not believed. Torch-free.
Left out: who answers (``endpoint.py``, ``local_model.py``) and what it costs (``asking.py``).
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import threading
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from align.data.rows import Message
from align.errors import UserError
from align.store.fingerprint import digest
from align.store.sealed import open_sealed, seal


@dataclass(frozen=True)
class Request:
    """One answer wanted: everything that decides it, and nothing else."""

    model: dict[str, str]
    """What stands for the model: the digest of a checkpoint, or an endpoint's address and its name of the model."""
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
    """Answers by key, in ``<folder>/answers-<number>.jsonl``: a file for each process that asked, its own.

    So any number of processes, on any number of machines, may share a folder without a lock; one reads what it finds
    when it opens the folder. A line is ``{"answers": [...], "seal": ...}``: what was written together is there together
    or not at all. Only places in the files are held in memory.
    """

    def __init__(self, folder: Path) -> None:
        """Open or make the cache: a half-written last line counts as not there, other unreadable lines are counted.

        A line whose content is not what was sealed is unreadable.
        """
        self.folder = folder
        self.unreadable = 0
        self.lost: list[Request] = []
        """Requests that were given up, once for each attempt: a server may have answered and charged for them."""
        self._places: dict[bytes, tuple[int, int, int, int]] = {}
        """Key -> which file, offset and length of the line, place within it."""
        self._last: tuple[tuple[int, int], list[Any]] = ((-1, -1), [])
        self._own: int | None = None
        """Descriptor of the file that this process writes, the last one; opened for the first answer."""
        self._end = 0
        self._writing = threading.Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            self._files = sorted(folder.glob("answers*.jsonl"), key=_number)
            for at, path in enumerate(self._files):
                self._read(at, path)
        except OSError as error:
            raise UserError(f"the cache of requests at {folder} cannot be opened: {error.strerror or error}.") from None

    def _read(self, at: int, path: Path) -> None:
        offset = 0
        with path.open("rb") as file:
            for line in file:
                if line.endswith(b"\n"):
                    self._note(line, at, offset)
                offset += len(line)

    def _note(self, line: bytes, at: int, offset: int) -> None:
        try:
            found = open_sealed(json.loads(line))
            keys = [bytes.fromhex(one["key"]) for one in found["answers"]]
            for one in found["answers"]:
                Answer(**one["answer"])
            lost = [Request(**one) for one in found.get("lost", [])]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            self.unreadable += 1
            return
        self.lost += lost
        for place, key in enumerate(keys):
            self._places.setdefault(key, (at, offset, len(line), place))

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: str) -> bool:
        return bytes.fromhex(key) in self._places

    def get(self, key: str) -> Found | None:
        """The answer to a request, or None."""
        where = self._places.get(bytes.fromhex(key))
        if where is None:
            return None
        at, offset, length, place = where
        if (at, offset) != self._last[0]:  # neighbors are read one after the other
            with self._files[at].open("rb") as file:
                file.seek(offset)
                self._last = (at, offset), json.loads(file.read(length))["answers"]
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
        lines = sorted({(at, offset) for at, offset, _, _ in self._places.values()})
        for at, some in itertools.groupby(lines, key=lambda line: line[0]):
            with self._files[at].open("rb") as file:
                for _, offset in some:
                    file.seek(offset)
                    for one in json.loads(file.readline())["answers"]:
                        if not one["copied"]:
                            yield Request(**one["request"]), Answer(**one["answer"])

    def lose(self, request: Request) -> None:
        """Note an attempt that was given up."""
        self._append({"answers": [], "lost": [asdict(request)]})

    def _append(self, entry: dict[str, Any]) -> None:
        line = json.dumps(seal(entry), ensure_ascii=True, sort_keys=True).encode("ascii") + b"\n"
        with self._writing:
            if self._own is None:
                self._own = self._begin()
            os.ftruncate(self._own, self._end)  # of an earlier line a full disk may have taken a part
            written = 0
            while written < len(line):
                written += os.pwrite(self._own, line[written:], self._end + written)
            self._note(line, len(self._files) - 1, self._end)
            self._end += len(line)

    def _begin(self) -> int:
        """Make a file that no other process has."""
        number = _number(self._files[-1]) if self._files else 0
        while True:
            number += 1
            path = self.folder / f"answers-{number}.jsonl"
            with contextlib.suppress(FileExistsError):
                made = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
                self._files.append(path)
                self._end = 0
                return made

    def sync(self) -> None:
        """Have the disk hold what was written: a kill needs none of this, a power cut does."""
        if self._own is not None:
            os.fsync(self._own)

    def close(self) -> None:
        """Sync and close the file."""
        self.sync()
        if self._own is not None:
            os.close(self._own)
            self._own = None


def _number(path: Path) -> int:
    """The number in a file's name; 0 for ``answers.jsonl``, which earlier versions shared."""
    number = path.stem.partition("-")[2]
    return int(number) if number.isdecimal() else 0
