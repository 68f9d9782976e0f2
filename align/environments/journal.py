"""The journal of an update's episodes, and environments whose results are in it before they are used. Torch-free.

The journal is a file of sealed JSON lines that is only appended to, so a killed update continues from it. Entries that
were written together share a line: after a kill the file has all of them or none. A line is synced before its entries
are visible. Lines after the first torn or damaged line are dropped, because entries depend on those before them.

A journaled environment performs no action twice. Only a request that the journal lacks needs an instance. A new
instance is brought to the point of the last instance by the state that was saved with the last result, or by repeating
the actions of the policy. This also happens after a call that exceeded its limit, because its instance is dropped.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections import deque
from collections.abc import Generator, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from align.data.rows import Message, Row
from align.environments.environment import Action
from align.environments.results import BadCall, EnvironmentFailed, Scores, Step, ToolError, ToolTimeout, clean
from align.environments.worker_pool import EnvironmentPool, Result
from align.store.json_files import DamagedFile, parse_sealed, seal, sync_folder

HEADER = "journal"
"""Kind of the first line, which holds the journal's key."""
FAILED = "failed"
NOT_REPEATED = frozenset({BadCall.kind, ToolTimeout.kind})
"""Kinds of errors that did not change the instance, or after which it is gone."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Position:
    """Place of an entry in an update."""

    kind: str
    """``reset``, ``turn``, ``call``, ``step`` or ``score``; callers may add others."""
    episode: int
    turn: int = 0
    index: int = 0
    """Number among several of a kind in a turn."""


class Journal:
    """Entries by their position, each written once. Any thread may read and write."""

    def __init__(self, path: Path, key: str = "") -> None:
        """Open or create the journal at ``path``.

        ``key`` identifies this update. The entries of a journal with another key are dropped.
        """
        self.path = path
        self.key = key
        self._entries: dict[Position, dict[str, Any]] = {}
        self._write_lock = threading.Lock()
        self._sync_lock = threading.Lock()
        self._written = self._synced = 0
        """Number of lines that this object has written, and number of them that are synced."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor: int | None = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        self._end = self._read()
        """Length of the valid lines in bytes."""
        # The file is new or has another key, so its content is overwritten.
        if not self._end:
            self._append({"kind": HEADER, "key": key})
            sync_folder(path.parent)

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, kind: str, episode: int, turn: int = 0, index: int = 0) -> dict[str, Any] | None:
        """Return an entry, or None if there is none."""
        return self.find(Position(kind, episode, turn, index))

    def find(self, position: Position) -> dict[str, Any] | None:
        """Return the entry at a position, or None."""
        return self._entries.get(position)

    def entries(self, episode: int) -> list[tuple[Position, dict[str, Any]]]:
        """Return the entries of an episode in the order in which they were written."""
        return [(position, entry) for position, entry in list(self._entries.items()) if position.episode == episode]

    def put(self, kind: str, episode: int, turn: int = 0, index: int = 0, *, entry: Mapping[str, Any]) -> None:
        """Write an entry, and return when it is on the disk."""
        self.put_all([(Position(kind, episode, turn, index), entry)])

    def put_all(self, entries: Iterable[tuple[Position, Mapping[str, Any]]]) -> None:
        """Write entries together, and return when they are on the disk.

        Raises ``ValueError`` for a position that has an entry, and ``OSError`` if the disk is full.
        """
        lines = []
        for position, entry in entries:
            if position in self._entries:
                raise ValueError(f"the journal has an entry of {position} already")
            lines.append({**asdict(position), "entry": dict(entry)})
        if lines:
            self._remember(self._append({"entries": lines}))

    def drop(self) -> None:
        """Delete the journal: its update is complete."""
        self.close()
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the file without deleting it. A line that a thread is writing is written and synced first."""
        with self._write_lock, self._sync_lock:
            if self._descriptor is None:
                return
            if self._synced < self._written:
                os.fsync(self._descriptor)
                self._synced = self._written
            os.close(self._descriptor)
            self._descriptor = None

    def _read(self) -> int:
        """Read the entries; return the length of the valid lines."""
        end = 0
        with self.path.open("rb") as file:
            for line in file:
                content = _read_line(line)
                if content is None or not self._accept(content, is_first=not end):
                    break
                end += len(line)
        return end

    def _accept(self, content: dict[str, Any], is_first: bool) -> bool:
        """Remember the entries of a line; return False for a line that does not belong to this journal."""
        if is_first:
            return content.get("kind") == HEADER and content.get("key") == self.key
        try:
            self._remember(content)
        except (KeyError, TypeError):
            return False
        return True

    def _remember(self, content: dict[str, Any]) -> None:
        # Read all positions first, so an invalid line adds no entry.
        names = [field.name for field in fields(Position)]
        positions = [Position(**{name: line[name] for name in names}) for line in content["entries"]]
        for position, line in zip(positions, content["entries"], strict=True):
            self._entries[position] = line["entry"]

    def _append(self, content: dict[str, Any]) -> dict[str, Any]:
        """Write a line and sync it; return it as it is read later."""
        text = json.dumps(seal(content)).encode("ascii") + b"\n"
        with self._write_lock:
            if self._descriptor is None:
                raise ValueError(f"the journal {self.path} is closed")
            # Remove a partial line that a kill or a full disk has left.
            os.ftruncate(self._descriptor, self._end)
            written = 0
            while written < len(text):
                written += os.pwrite(self._descriptor, text[written:], self._end + written)
            self._end += len(text)
            self._written += 1
            ticket = self._written
        with self._sync_lock:
            # Another thread's sync may have covered these lines.
            if self._synced < ticket:
                covered = self._written
                os.fsync(self._descriptor)
                self._synced = covered
        read: dict[str, Any] = json.loads(text)
        return read


def _read_line(line: bytes) -> dict[str, Any] | None:
    """Return the content of a line; None if the line is torn or damaged."""
    if not line.endswith(b"\n"):
        return None
    try:
        return parse_sealed(line)
    except DamagedFile:
        return None


@dataclass(frozen=True)
class CallResult:
    """The result of a tool, or the text of its error."""

    text: str
    error: str = ""
    """Kind of the error (``raised``, ``arguments`` or ``timeout``); empty if there was none."""
    seconds: float = 0.0


@dataclass
class _Request:
    position: Position
    inputs: tuple[Any, ...]
    described: dict[str, Any]
    """Fields of the entry that are known before the result."""
    kind: type[CallResult] | type[Step] | type[Scores] | None
    """Type of the result; None for a list of messages."""
    future: Future[Any]

    def entry(self, value: Any) -> dict[str, Any]:
        """Return the entry of a result."""
        return self.described | ({"messages": value} if self.kind is None else asdict(value))

    def result(self, entry: Mapping[str, Any]) -> Any:
        """Return the result in an entry."""
        if self.kind is None:
            return entry["messages"]
        return self.kind(**{field.name: entry[field.name] for field in fields(self.kind)})


class JournaledEnvironment:
    """The environment of one episode. Requests are answered in order; a future raises only ``EnvironmentFailed``."""

    def __init__(self, pool: EnvironmentPool, journal: Journal, episode: int, row: Row) -> None:
        self._pool = pool
        self._journal = journal
        self._episode = episode
        self._row = row
        self._lock = threading.Lock()
        self._waiting: deque[_Request] = deque()
        self._is_busy = False
        self._is_closed = False
        self.differing = 0
        """Number of repeated actions whose result differs from the first time."""

    def reset(self) -> Future[list[Message] | None]:
        """Begin the episode; the result is its first messages, or None for the row's prompt."""
        return self._ask(Position("reset", self._episode), (self._row,), {}, None)

    def call(self, turn: int, index: int, name: str, arguments: dict[str, Any]) -> Future[CallResult]:
        """Call a tool: the call ``index`` of the policy's turn ``turn``."""
        described = {"name": name, "arguments": arguments}
        return self._ask(Position("call", self._episode, turn, index), (name, arguments), described, CallResult)

    def step(self, turn: int, message: str) -> Future[Step]:
        """Answer the policy's turn ``turn``, which calls no tool."""
        return self._ask(Position("step", self._episode, turn), (message,), {"message": message}, Step)

    def score(self, messages: list[Message]) -> Future[Scores]:
        """Score the episode."""
        return self._ask(Position("score", self._episode), (messages,), {}, Scores)

    def close(self) -> Result:
        """Close the instance, if there is one. The result never raises."""
        self._is_closed = True
        return self._pool.close_episode(self._episode)

    # ---- requests ----

    def _ask(self, position: Position, inputs: tuple[Any, ...], described: dict[str, Any], kind: Any) -> Future[Any]:
        request = _Request(position, inputs, described, kind, Future())
        with self._lock:
            self._waiting.append(request)
            # The running request starts this request when it ends (_next_request).
            if self._is_busy:
                return request.future
            self._is_busy = True
        self._next_request()
        return request.future

    def _next_request(self) -> None:
        """Answer requests from the journal, and start the first request that it lacks."""
        while True:
            with self._lock:
                if not self._waiting:
                    self._is_busy = False
                    return
                request = self._waiting.popleft()
            entry = self._journal.find(request.position)
            if entry is None:
                self._continue(request, self._perform(request))
                return
            self._answer(request, entry)

    def _continue(self, request: _Request, performing: Generator[Result, None, dict[str, Any]]) -> None:
        """Run a request up to the next call, or to its end. An exception, such as a full disk, becomes its result."""
        try:
            try:
                result = next(performing)
            except StopIteration as end:
                self._write(request, end.value)
            else:
                result.add_done_callback(lambda _: self._continue(request, performing))
        except BaseException as error:
            if request.future.done():
                raise
            request.future.set_exception(error)
            self._next_request()

    def _perform(self, request: _Request) -> Generator[Result, None, dict[str, Any]]:
        """Yield each call of the pool, to continue when it is done, and return the request's entry."""
        method = request.position.kind
        if method != "reset" and not self._pool.is_open(self._episode):
            # After a resume or a timeout there is no instance. A new instance repeats the actions in the journal.
            restored = self._pool.submit(self._episode, "restore", self._row, *self._history())
            yield restored
            failure = restored.exception()
            if failure is not None:
                return _failure(f"the environment could not be restored: {failure}")
            self._count_differing(restored.result())
        result = self._pool.submit(self._episode, method, *request.inputs)
        yield result
        failure = result.exception()
        value: Any
        if isinstance(failure, ToolError) and method == "call":
            value = CallResult(clean(str(failure)), failure.kind, result.seconds)
        elif failure is not None:
            return _failure(str(failure))
        else:
            value = result.result()
            if method == "call":
                value = CallResult(value, "", result.seconds)
        entry = request.entry(value)
        # State and result are in the same entry, so they always match. No request follows a score.
        if method != "score" and self._pool.source.can_save and self._pool.is_open(self._episode):
            state = self._pool.submit(self._episode, "state")
            yield state
            failure = state.exception()
            if failure is not None:
                return _failure(str(failure))
            entry["state"] = state.result()
        return entry

    def _count_differing(self, differing: int) -> None:
        if differing and not self.differing:
            log.warning(
                "episode %d: %d repeated actions of the environment had another result than before; give its class "
                "state() and load(), or have it draw from a seed of the row.",
                self._episode,
                differing,
            )
        self.differing += differing

    def _write(self, request: _Request, entry: dict[str, Any]) -> None:
        # If the run ended early and closed the environment, the failure is not the environment's. A later run repeats
        # the request.
        if not (FAILED in entry and self._is_closed):
            self._journal.put_all([(request.position, entry)])
            # Read the entry back, so this run gets the result in the same form as a resumed run.
            entry = self._journal.find(request.position) or {}
        self._answer(request, entry)
        self._next_request()

    def _answer(self, request: _Request, entry: dict[str, Any]) -> None:
        if FAILED in entry:
            request.future.set_exception(EnvironmentFailed(entry[FAILED]))
        else:
            request.future.set_result(request.result(entry))

    def _history(self) -> tuple[list[Action], Any]:
        """Return the actions that a new instance must repeat, and the state to load before them, or None."""
        actions: list[Action] = []
        state: Any = None
        for position, entry in self._journal.entries(self._episode):
            if "state" in entry:
                state = entry["state"]
                # The state already contains these actions.
                actions.clear()
            elif position.kind == "call" and FAILED not in entry and entry["error"] not in NOT_REPEATED:
                actions.append(Action(entry["name"], entry["arguments"], entry["text"]))
            elif position.kind == "step" and FAILED not in entry:
                actions.append(Action(None, entry["message"], entry["messages"]))
        return actions, state


def _failure(text: str) -> dict[str, Any]:
    """Return the entry of a failure. Its text comes from a user or a server, so it may need cleaning."""
    return {FAILED: clean(text)}
