"""Calls of many episodes' environments at once, each with a time limit. Torch-free.

Calls of one episode run in order. A call that takes too long is given up: its episode gets ``ToolTimeout``, and its
instance is gone. A process is killed then. A thread cannot be: it is left alone, counted, and replaced. Leaves out how
an episode gets a new instance (``replay.py``).
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from align.environments.environment import Environment, EnvironmentSource
from align.environments.errors import EnvironmentFailed, ToolError, ToolTimeout
from align.environments.methods import describe_failure
from align.environments.processes import ProcessServer

BEGINNINGS = frozenset({"reset", "restore"})
"""Methods with which an instance begins."""
log = logging.getLogger(__name__)


class Instance(Protocol):
    """An episode's environment, wherever it runs."""

    is_ended: bool
    """Whether no method can be called any more."""

    def perform(self, method: str, inputs: tuple[Any, ...]) -> Any:
        """Return the result of a method."""
        ...

    def end(self) -> object:
        """Give up the call that runs, and the instance."""
        ...


class LocalInstance:
    """An environment in this process."""

    def __init__(self, source: EnvironmentSource) -> None:
        self._environment: Environment = source.make()
        self.is_ended = False

    def perform(self, method: str, inputs: tuple[Any, ...]) -> Any:
        """Return the result of a method."""
        return getattr(self._environment, method)(*inputs)

    def end(self) -> None:
        """Cancel the call that runs, where it is async."""
        self.is_ended = True
        self._environment.cancel()


class Result(Future[Any]):
    """The result of a call."""

    seconds: float = 0.0
    """How long the call ran, without the wait for a worker."""


@dataclass
class _Call:
    episode: int
    method: str
    inputs: tuple[Any, ...]
    limit: float
    """Seconds that it may run."""
    result: Result = field(default_factory=Result)
    started: float = 0.0
    is_over: bool = False
    """Whether it has a result, or was given up; whoever sets this sets the result."""

    @property
    def deadline(self) -> float:
        return self.started + self.limit


class EnvironmentPool:
    """Instances by the number of their episode, and the threads that call them."""

    def __init__(
        self,
        source: EnvironmentSource,
        workers: int = 64,
        tool_seconds: float = 30.0,
        isolation: Literal["thread", "process"] = "thread",
    ) -> None:
        """Start the process from which those of episodes are forked, where they have processes of their own.

        ``workers`` is the number of calls at once, ``tool_seconds`` the limit of each. Raises ``EnvironmentFailed`` for
        a process that does not start.
        """
        self.source = source
        self.tool_seconds = tool_seconds
        """Limit of the calls that are submitted from now on."""
        self.timeouts = 0
        """Calls that were given up."""
        self.abandoned = 0
        """Threads that still run a call that was given up."""
        self._workers = workers
        self._server = ProcessServer(source) if isolation == "process" else None
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._alarm = threading.Condition(self._lock)
        self._waiting: dict[int, deque[_Call]] = {}
        """Calls of each episode that have not begun, in order."""
        self._ready: deque[int] = deque()
        """Episodes with a call that may begin."""
        self._running: dict[int, _Call] = {}
        self._instances: dict[int, Instance] = {}
        self._threads = self._idle = 0
        """Threads that may take a call, and those among them that wait for one."""
        self._is_closed = False
        self._watch: threading.Thread | None = None

    def submit(self, episode: int, method: str, *inputs: Any) -> Result:
        """Call a method of an episode's environment after the calls that were submitted before.

        ``reset`` and ``restore`` make an instance where there is none. The result raises ``ToolError`` with a text for
        the model, or ``EnvironmentFailed``.
        """
        limit = self.tool_seconds
        if method == "restore":  # it repeats earlier calls
            limit *= 1 + len(inputs[1])
        call = _Call(episode, method, inputs, limit)
        with self._lock:
            if self._is_closed:
                raise RuntimeError("the pool of environments is closed")
            self._put(call)
        return call.result

    def is_open(self, episode: int) -> bool:
        """Return whether an episode has an instance that can be called."""
        with self._lock:
            return episode in self._instances

    def close_episode(self, episode: int) -> Result:
        """Have an episode's instance closed after its calls. The result never raises."""
        call = _Call(episode, "close", (), self.tool_seconds)
        with self._lock:
            # A call that runs may be making the instance.
            is_known = episode in self._instances or episode in self._waiting or episode in self._running
            if self._is_closed or not is_known:
                call.result.set_result(None)
            else:
                self._put(call)
        return call.result

    def close(self) -> None:
        """Close all instances, in at most ``tool_seconds``, and end their processes. Calls that wait are cancelled."""
        with self._lock:
            # 1. Take no more calls, drop those that wait, and have idle instances closed.
            self._is_closed = True
            waiting = [call for calls in self._waiting.values() for call in calls]
            self._waiting.clear()
            self._ready.clear()
            closing = []
            for episode in self._instances:
                if episode not in self._running:
                    closing.append(_Call(episode, "close", (), self.tool_seconds))
                    self._put(closing[-1])
        for call in waiting:
            call.result.cancel()
        # 2. Wait as long as one call may take.
        wait([call.result for call in closing], self.tool_seconds)
        with self._lock:
            # 3. End the idle threads, and give up what still runs.
            self._ready.clear()
            self._work.notify_all()
            self._alarm.notify_all()
            for call in list(self._running.values()):
                call.limit = 0.0  # whoever still runs is given up
        if self._watch is not None:
            self._watch.join()
        if self._server is not None:
            self._server.close()

    # ---- threads ----

    def _put(self, call: _Call) -> None:
        calls = self._waiting.setdefault(call.episode, deque())
        calls.append(call)
        # Only the first call of an idle episode is offered. The others follow as each call ends (_release).
        if call.episode not in self._running and len(calls) == 1:
            self._offer(call.episode)

    def _offer(self, episode: int) -> None:
        """Have a thread take an episode's next call."""
        self._ready.append(episode)
        # An idle thread takes the call, or a new thread starts, up to `workers`.
        if self._idle >= len(self._ready):
            self._work.notify()
        elif self._threads < self._workers:
            self._threads += 1
            # A daemon: a call that never returns must not keep the process.
            threading.Thread(target=self._take_calls, name="environment", daemon=True).start()

    def _take_calls(self) -> None:
        while True:
            with self._lock:
                self._idle += 1
                while not self._ready and not self._is_closed:
                    self._work.wait()
                self._idle -= 1
                if not self._ready:
                    self._threads -= 1
                    return
                call = self._begin(self._ready.popleft())
            if call is not None and not self._finish(call):
                return

    def _begin(self, episode: int) -> _Call | None:
        calls = self._waiting[episode]
        call = calls.popleft()
        if not calls:
            del self._waiting[episode]
        # Nobody waits for this call any more, so the episode's next one begins.
        if not call.result.set_running_or_notify_cancel():
            self._release(episode)
            return None
        call.started = time.monotonic()
        self._running[episode] = call
        if self._watch is None:
            self._watch = threading.Thread(target=self._give_up_late_calls, name="environment limits", daemon=True)
            self._watch.start()
        self._alarm.notify()
        return call

    def _finish(self, call: _Call) -> bool:
        """Run a call and set its result; returns False where it was given up in the meantime, with its thread."""
        value: Any = None
        failure: Exception | None = None
        try:
            value = self._perform(call)
        except (ToolError, EnvironmentFailed) as error:
            failure = error
        except BaseException as error:
            failure = EnvironmentFailed(f"{call.method} raised {describe_failure(error)}")
            failure.__cause__ = error
        with self._lock:
            # The call was given up. Whoever did that sets its result, and another thread counts in this one's place.
            if call.is_over:
                self.abandoned -= 1
                return False
            call.is_over = True
        call.result.seconds = time.monotonic() - call.started
        if failure is None:
            call.result.set_result(value)
        else:
            call.result.set_exception(failure)
        with self._lock:
            # The episode counts as running until here, so a next call that a callback submits has to wait.
            del self._running[call.episode]
            self._release(call.episode)
        return True

    def _release(self, episode: int) -> None:
        """Let the next call of an episode begin."""
        if episode in self._waiting:
            self._offer(episode)

    def _perform(self, call: _Call) -> Any:
        with self._lock:
            instance = self._instances.get(call.episode)
        if call.method == "close":
            return self._close(call, instance)
        if instance is None:
            if call.method not in BEGINNINGS:
                raise EnvironmentFailed(f"{call.method} was called on an environment that did not begin, or is gone.")
            instance = LocalInstance(self.source) if self._server is None else self._server.start_episode()
            with self._lock:
                # Making the instance may have exceeded the limit, and the episode may have a new one by now.
                is_over = call.is_over
                if not is_over:
                    self._instances[call.episode] = instance
            if is_over:
                instance.end()
                return None
        try:
            return instance.perform(call.method, call.inputs)
        finally:
            if instance.is_ended:  # its process died
                self._forget(call)

    def _forget(self, call: _Call) -> None:
        """Take the instance out of the pool, unless the call was given up: there may be another one by now."""
        with self._lock:
            if not call.is_over:
                self._instances.pop(call.episode, None)

    def _close(self, call: _Call, instance: Instance | None) -> None:
        if instance is None:
            return
        try:
            instance.perform("close", ())
        except Exception as error:
            log.warning("closing the environment of episode %d failed: %s", call.episode, error)
        self._forget(call)
        if self._server is not None:
            instance.end()

    # ---- limits ----

    def _give_up_late_calls(self) -> None:
        while True:
            with self._lock:
                if self._is_closed and not self._running:
                    return
                now = time.monotonic()
                running = [call for call in self._running.values() if not call.is_over]
                late = [call for call in running if call.deadline <= now]
                if not late:
                    nearest = min((call.deadline for call in running), default=None)
                    self._alarm.wait(_pause(nearest, now, self._is_closed))
                    continue
                given_up = [(call, self._abandon(call)) for call in late]
            for call, instance in given_up:
                self._report_late(call, instance)

    def _abandon(self, call: _Call) -> Instance | None:
        """Take an episode from the thread that is stuck in its call, and the thread out of the count."""
        call.is_over = True
        self.timeouts += 1
        # A thread cannot be killed. It ends by itself when its call returns (_finish).
        self.abandoned += 1
        self._threads -= 1
        return self._instances.pop(call.episode, None)

    def _report_late(self, call: _Call, instance: Instance | None) -> None:
        if instance is not None:
            try:
                instance.end()
            except Exception as error:
                log.warning("ending the environment of episode %d failed: %s", call.episode, error)
        call.result.seconds = time.monotonic() - call.started
        # The model hears of a tool that timed out. Any other method fails the episode, except closing.
        if call.method == "call":
            call.result.set_exception(ToolTimeout(f"{call.inputs[0]} did not answer within {call.limit:g} seconds."))
        elif call.method == "close":
            log.warning("closing the environment of episode %d took too long", call.episode)
            call.result.set_result(None)
        else:
            call.result.set_exception(EnvironmentFailed(f"{call.method} did not return within {call.limit:g} seconds."))
        with self._lock:
            del self._running[call.episode]
            # The thread that is stuck may have been the last one.
            self._release(call.episode)
            if self._ready and not self._idle and self._threads < self._workers:
                self._threads += 1
                threading.Thread(target=self._take_calls, name="environment", daemon=True).start()


def _pause(nearest: float | None, now: float, is_closed: bool) -> float | None:
    """Return the seconds until the next limit; None to wait until there is one."""
    if is_closed:
        return 0.05
    return None if nearest is None else max(0.0, nearest - now)
