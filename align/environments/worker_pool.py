"""Calls of many episodes' environments at the same time, each with a time limit. Torch-free.

Calls of one episode run in order. A call that exceeds its limit is abandoned: its episode gets ``ToolTimeout``, and its
instance is dropped. Its process is killed. A thread cannot be killed: it is counted as abandoned until its call
returns, and another thread may run in its place. ``journal.py`` makes new instances for such episodes.
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
from align.environments.processes import ProcessServer
from align.environments.results import EnvironmentFailed, ToolError, ToolTimeout, describe_failure

BEGINNINGS = frozenset({"reset", "restore"})
"""Methods that make an instance if the episode has none."""
log = logging.getLogger(__name__)


class Instance(Protocol):
    """An episode's environment, in this process or another."""

    is_ended: bool
    """True if no method can be called any more."""

    def perform(self, method: str, inputs: tuple[Any, ...]) -> Any:
        """Return the result of a method."""
        ...

    def end(self) -> object:
        """Stop the running call and drop the instance."""
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
        """Cancel the running call if it is async."""
        self.is_ended = True
        self._environment.cancel()


class Result(Future[Any]):
    """The result of a call."""

    seconds: float = 0.0
    """Duration of the call, without the wait for a worker."""


@dataclass
class _Call:
    episode: int
    method: str
    inputs: tuple[Any, ...]
    limit: float
    """Maximum duration in seconds."""
    result: Result = field(default_factory=Result)
    started: float = 0.0
    is_over: bool = False
    """True once a thread has claimed the right to set the result."""

    @property
    def deadline(self) -> float:
        return self.started + self.limit


class EnvironmentPool:
    """Instances by the number of their episode, and a thread for each running call."""

    def __init__(
        self,
        source: EnvironmentSource,
        workers: int = 64,
        tool_seconds: float = 30.0,
        isolation: Literal["thread", "process"] = "thread",
    ) -> None:
        """Start the server process with ``isolation: process``.

        Args:
            source: Makes the instances.
            workers: Maximum number of simultaneous calls.
            tool_seconds: Time limit of each call.
            isolation: Run the instances in threads of this process, or in separate processes.

        Raises:
            EnvironmentFailed: The server process does not start.
        """
        self.source = source
        self.tool_seconds = tool_seconds
        """Limit of the calls that are submitted from now on."""
        self.timeouts = 0
        """Number of calls that exceeded their limit."""
        self.abandoned = 0
        """Number of threads that still run such a call."""
        self._workers = workers
        self._server = ProcessServer(source) if isolation == "process" else None
        self._lock = threading.Lock()
        self._alarm = threading.Condition(self._lock)
        """Wakes the watch when a call starts or the pool closes."""
        self._waiting: dict[int, deque[_Call]] = {}
        """Calls of each episode that have not started, in order."""
        self._ready: deque[int] = deque()
        """Episodes with a call that may start."""
        self._running: dict[int, _Call] = {}
        self._instances: dict[int, Instance] = {}
        self._busy = 0
        """Number of threads with a call that is not abandoned."""
        self._is_closed = False
        self._watch: threading.Thread | None = None

    def submit(self, episode: int, method: str, *inputs: Any) -> Result:
        """Call a method of an episode's environment after the calls that were submitted before.

        ``reset`` and ``restore`` make an instance if the episode has none. The result raises ``ToolError`` with a text
        for the model, or ``EnvironmentFailed``.
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
        """Close an episode's instance after its calls. The result never raises."""
        call = _Call(episode, "close", (), self.tool_seconds)
        with self._lock:
            # A running call may be making the instance.
            is_active = episode in self._instances or episode in self._waiting or episode in self._running
            if self._is_closed or not is_active:
                call.result.set_result(None)
            else:
                self._put(call)
        return call.result

    def close(self) -> None:
        """Close all instances, in at most ``tool_seconds``, and end their processes. Waiting calls are cancelled."""
        with self._lock:
            # 1. Accept no more calls, cancel waiting calls, and close idle instances.
            self._is_closed = True
            waiting = [call for calls in self._waiting.values() for call in calls]
            self._waiting.clear()
            self._ready.clear()
            idle = [episode for episode in self._instances if episode not in self._running]
            closing = [_Call(episode, "close", (), self.tool_seconds) for episode in idle]
            for call in closing:
                self._put(call)
        for call in waiting:
            call.result.cancel()
        # 2. Wait as long as one call may run.
        wait([call.result for call in closing], self.tool_seconds)
        with self._lock:
            # 3. Abandon the calls that are still running.
            self._ready.clear()
            for call in self._running.values():
                call.limit = 0.0
            self._alarm.notify_all()
        if self._watch is not None:
            self._watch.join()
        if self._server is not None:
            self._server.close()

    # ---- the methods below this line, up to "threads", expect the lock ----

    def _put(self, call: _Call) -> None:
        calls = self._waiting.setdefault(call.episode, deque())
        calls.append(call)
        # Only the first call of an idle episode is ready. The others follow as each call ends (_release).
        if call.episode not in self._running and len(calls) == 1:
            self._ready.append(call.episode)
            self._start_calls()

    def _start_calls(self) -> None:
        """Start the calls of ready episodes, up to ``workers`` at the same time."""
        while self._ready and self._busy < self._workers:
            episode = self._ready.popleft()
            calls = self._waiting[episode]
            call = calls.popleft()
            if not calls:
                del self._waiting[episode]
            # If the caller has cancelled the result, the episode's next call starts.
            if not call.result.set_running_or_notify_cancel():
                if episode in self._waiting:
                    self._ready.append(episode)
                continue
            call.started = time.monotonic()
            self._running[episode] = call
            self._busy += 1
            # A daemon thread, so a call that never returns cannot keep the process alive.
            threading.Thread(target=self._run, args=(call,), name="environment", daemon=True).start()
            if self._watch is None:
                self._watch = threading.Thread(target=self._watch_limits, name="environment limits", daemon=True)
                self._watch.start()
            self._alarm.notify_all()

    def _release(self, episode: int) -> None:
        """End the running call of an episode, and start the next calls."""
        del self._running[episode]
        if episode in self._waiting:
            self._ready.append(episode)
        self._start_calls()

    # ---- threads ----

    def _run(self, call: _Call) -> None:
        """Run a call and set its result, unless it was abandoned meanwhile."""
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
            if call.is_over:  # the watch sets the result, and does not count this thread as busy
                self.abandoned -= 1
                return
            call.is_over = True
            self._busy -= 1
        call.result.seconds = time.monotonic() - call.started
        if failure is None:
            call.result.set_result(value)
        else:
            call.result.set_exception(failure)
        with self._lock:
            # The episode counts as running until here, so a next call that a callback submits has to wait.
            self._release(call.episode)

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
                # Making the instance may have exceeded the limit, and the episode may have a new instance by now.
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
        """Remove the instance of a call from the pool. After an abandoned call the pool may have a newer instance."""
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

    def _watch_limits(self) -> None:
        while True:
            with self._lock:
                if self._is_closed and not self._running:
                    return
                now = time.monotonic()
                running = [call for call in self._running.values() if not call.is_over]
                late = [call for call in running if call.deadline <= now]
                if not late:
                    pause = min((call.deadline - now for call in running), default=None)
                    # Sleep until the next deadline. A call that starts meanwhile notifies the alarm.
                    self._alarm.wait(0.05 if self._is_closed else pause)
                    continue
                instances = [self._abandon(call) for call in late]
            # Without the lock: ending an instance may take long, and a result's callbacks may submit further calls.
            for call, instance in zip(late, instances, strict=True):
                self._report_late(call, instance)

    def _abandon(self, call: _Call) -> Instance | None:
        """Separate an episode from the thread that is stuck in its call."""
        call.is_over = True
        self.timeouts += 1
        # The thread ends by itself when its call returns (_run). Another thread may run in its place.
        self.abandoned += 1
        self._busy -= 1
        return self._instances.pop(call.episode, None)

    def _report_late(self, call: _Call, instance: Instance | None) -> None:
        if instance is not None:
            try:
                instance.end()
            except Exception as error:
                log.warning("ending the environment of episode %d failed: %s", call.episode, error)
        call.result.seconds = time.monotonic() - call.started
        # Tell the model that the tool timed out. Any other method fails the episode, except closing.
        if call.method == "call":
            call.result.set_exception(ToolTimeout(f"{call.inputs[0]} did not answer within {call.limit:g} seconds."))
        elif call.method == "close":
            log.warning("closing the environment of episode %d took too long", call.episode)
            call.result.set_result(None)
        else:
            call.result.set_exception(EnvironmentFailed(f"{call.method} did not return within {call.limit:g} seconds."))
        with self._lock:
            self._release(call.episode)
