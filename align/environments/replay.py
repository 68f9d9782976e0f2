"""An episode's environment whose results are in the journal before anybody sees them.

What the journal has is not done again. Only when something is asked for that it lacks, a new instance is brought to
where the last one was: by the state that was saved with the last result, else by repeating what the policy did. This
happens after a call that took too long as well, which its instance does not survive. Torch-free.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from typing import Any

from align.data.rows import Message, Row
from align.environments.environment import Action
from align.environments.errors import BadCall, EnvironmentFailed, ToolError, ToolTimeout
from align.environments.journal import Journal, Position
from align.environments.results import Scores, Step, clean
from align.environments.worker_pool import EnvironmentPool, Result

FAILED = "failed"
NOT_REPEATED = frozenset({BadCall.kind, ToolTimeout.kind})
"""Kinds of errors after which the instance is as it was, or gone."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CallResult:
    """The result of a tool, or what the model is told in its place."""

    text: str
    error: str = ""
    """Kind of the error (``raised``, ``arguments`` or ``timeout``); empty where there was none."""
    seconds: float = 0.0


@dataclass
class _Request:
    position: Position
    method: str
    inputs: tuple[Any, ...]
    describe: Callable[[Any], dict[str, Any]]
    """Makes the entry of a result."""
    read: Callable[[dict[str, Any]], Any]
    """Makes the result of an entry."""
    future: Future[Any]


class JournaledEnvironment:
    """The environment of one episode. Requests are answered in order; a future raises ``EnvironmentFailed`` alone."""

    def __init__(self, pool: EnvironmentPool, journal: Journal, episode: int, row: Row) -> None:
        self._pool, self._journal, self._episode, self._row = pool, journal, episode, row
        self._lock = threading.Lock()
        self._waiting: deque[_Request] = deque()
        self._is_busy = False
        self._is_closed = False
        self.differing = 0
        """Actions that had another result when they were repeated."""

    def reset(self) -> Future[list[Message] | None]:
        """Begin the episode; the first messages, or None for the row's prompt."""

        def describe(messages: list[Message] | None) -> dict[str, Any]:
            return {"messages": messages}

        return self._ask("reset", 0, 0, (self._row,), describe, lambda entry: entry["messages"])

    def call(self, turn: int, index: int, name: str, arguments: dict[str, Any]) -> Future[CallResult]:
        """Call a tool: the call ``index`` of the policy's turn ``turn``."""

        def describe(result: CallResult) -> dict[str, Any]:
            return {"name": name, "arguments": arguments, **asdict(result)}

        def read(entry: dict[str, Any]) -> CallResult:
            return CallResult(entry["text"], entry["error"], entry["seconds"])

        return self._ask("call", turn, index, (name, arguments), describe, read)

    def step(self, turn: int, message: str) -> Future[Step]:
        """Answer the policy's turn ``turn``, which calls no tool."""

        def describe(step: Step) -> dict[str, Any]:
            return {"message": message, **asdict(step)}

        return self._ask("step", turn, 0, (message,), describe, lambda entry: Step(entry["messages"], entry["done"]))

    def score(self, messages: list[Message]) -> Future[Scores]:
        """Score the episode."""

        def read(entry: dict[str, Any]) -> Scores:
            return Scores(entry["total"], entry["parts"], entry["turns"])

        return self._ask("score", 0, 0, (messages,), asdict, read)

    def close(self) -> Result:
        """Close the instance, if there is one. The result never raises."""
        self._is_closed = True
        return self._pool.close_episode(self._episode)

    # ---- requests, one after the other ----

    def _ask(
        self,
        method: str,
        turn: int,
        index: int,
        inputs: tuple[Any, ...],
        describe: Callable[[Any], dict[str, Any]],
        read: Callable[[dict[str, Any]], Any],
    ) -> Future[Any]:
        future: Future[Any] = Future()
        position = Position(method, self._episode, turn, index)
        request = _Request(position, method, inputs, describe, read, future)
        with self._lock:
            self._waiting.append(request)
            # The request under way takes up this one when it is done (_go_on).
            if self._is_busy:
                return future
            self._is_busy = True
        self._go_on()
        return future

    def _go_on(self) -> None:
        """Answer what the journal has, and start the first request that it lacks."""
        while True:
            with self._lock:
                if not self._waiting:
                    self._is_busy = False
                    return
                request = self._waiting.popleft()
            entry = self._journal.find(request.position)
            if entry is None:
                self._guard(request, lambda request=request: self._start(request))  # type: ignore[misc]
                return
            self._answer(request, entry)

    def _start(self, request: _Request) -> None:
        if request.method == "reset" or self._pool.is_open(self._episode):
            self._perform(request)
            return
        # There is no live instance, after a resume or a timeout. A new one repeats what the journal has.
        restored = self._pool.submit(self._episode, "restore", self._row, *self._history())
        restored.add_done_callback(lambda done: self._guard(request, lambda: self._after_restore(request, restored)))

    def _after_restore(self, request: _Request, restored: Result) -> None:
        failure = restored.exception()
        if failure is not None:
            self._write(request, _failure(f"the environment could not be restored: {failure}"))
            return
        differing = restored.result()
        if differing and not self.differing:
            log.warning(
                "episode %d: %d repeated actions of the environment had another result than before; give its class "
                "state() and load(), or have it draw from a seed of the row.",
                self._episode,
                differing,
            )
        self.differing += differing
        self._perform(request)

    def _perform(self, request: _Request) -> None:
        result = self._pool.submit(self._episode, request.method, *request.inputs)
        result.add_done_callback(lambda done: self._guard(request, lambda: self._after_call(request, result)))

    def _after_call(self, request: _Request, result: Result) -> None:
        failure = result.exception()
        value: Any
        if isinstance(failure, ToolError) and request.method == "call":
            value = CallResult(clean(str(failure)), failure.kind, result.seconds)
        elif failure is not None:
            self._write(request, _failure(str(failure)))
            return
        else:
            value = result.result()
            if request.method == "call":
                value = CallResult(value, "", result.seconds)
        entry = request.describe(value)
        # The state is written in the same entry as the result, so the two always match. Nothing follows a score.
        if request.method == "score" or not self._pool.source.can_save or not self._pool.is_open(self._episode):
            self._write(request, entry)
            return
        state = self._pool.submit(self._episode, "state")
        state.add_done_callback(lambda done: self._guard(request, lambda: self._after_state(request, entry, state)))

    def _after_state(self, request: _Request, entry: dict[str, Any], state: Result) -> None:
        failure = state.exception()
        if failure is not None:
            self._write(request, _failure(str(failure)))
        else:
            self._write(request, entry | {"state": state.result()})

    def _write(self, request: _Request, entry: dict[str, Any]) -> None:
        if FAILED in entry and self._is_closed:
            # Closed under a call, as where a run ends early: the environment is not at fault, and goes on from before.
            self._answer(request, entry)
            self._go_on()
            return
        self._journal.put_all([(request.position, entry)])
        # Read back, so that this run sees the result in the same form as a resumed one.
        written = self._journal.find(request.position)
        assert written is not None
        self._answer(request, written)
        self._go_on()

    def _answer(self, request: _Request, entry: dict[str, Any]) -> None:
        if FAILED in entry:
            request.future.set_exception(EnvironmentFailed(entry[FAILED]))
        else:
            request.future.set_result(request.read(entry))

    def _guard(self, request: _Request, act: Callable[[], None]) -> None:
        """Run a part of a request; whatever it raises, a full disk for example, is the request's result."""
        try:
            act()
        except BaseException as error:
            if request.future.done():
                raise
            request.future.set_exception(error)
            self._go_on()

    def _history(self) -> tuple[list[Action], Any]:
        """Return the actions that a new instance must repeat, and the state from which it begins, or None."""
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
    """Return the entry of a failure. Its text is a user's or a server's, and must be fit to be encoded."""
    return {FAILED: clean(text)}
