"""Comparisons in worker processes, each with a wall-clock limit after which its process is killed.

The module run as a program is such a process (``serve``). Messages are JSON.

A comparison may hang inside C code, where no exception and no signal handler reaches it, and math-verify's own limit is
an alarm that works only in the main thread.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import queue
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

from align.errors import StageFailed
from align.verifiers.verdict import CRASHED, TIMED_OUT, UNPARSABLE, BadReference, Verdict

START_SECONDS = 300.0
"""Time to start a worker and import its packages; sympy needs seconds, or a minute on a busy machine."""
MOST_WORKERS = 8
MOST_WAITS = 4
"""Times the limit of a comparison that pass before its worker ends even without processor time."""
SHORTEST_WAIT = 0.05
MAX_REQUESTS = 2000
"""Requests after which a worker is replaced, since sympy keeps what it has computed."""
LARGEST_REPLY = 1 << 20
MEMORY = 2**31
"""Address space in bytes that comparisons may use in addition to the imported packages."""
ORPHAN_SECONDS = 10.0
"""Pause between two looks for the parent, and time after which an overdue request ends the worker without it."""
Verify = Callable[[Any, str], Verdict]


@dataclass(frozen=True)
class Comparison:
    """An answer to verify."""

    kind: str
    reference: Any
    text: str
    seconds: float


class WorkerDied(Exception):
    """The worker's process ended."""


class Worker:
    """One process, which is started for its first request and again after it was killed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._kinds: set[str] = set()
        self._answered = 0

    def verify(self, comparison: Comparison) -> Verdict:
        """Return the verdict on an answer. Raises ``BadReference`` for a reference that cannot be used."""
        if self._answered >= MAX_REQUESTS:
            self.close()
        was_used = self._answered > 0
        try:
            return self._verify(comparison)
        except WorkerDied:
            # Memory of earlier comparisons must not decide about this one: a new process gets it once more.
            if was_used:
                with contextlib.suppress(WorkerDied):
                    return self._verify(comparison)
            return Verdict(0.0, CRASHED)

    def _verify(self, comparison: Comparison) -> Verdict:
        kind = comparison.kind
        if kind not in self._kinds:
            self._load(kind)
        request = {"kind": kind, "reference": comparison.reference, "text": comparison.text}
        reply = self._ask(request | {"seconds": comparison.seconds}, comparison.seconds)
        if reply is None:
            return Verdict(0.0, TIMED_OUT)
        self._answered += 1
        if "error" in reply:
            raise BadReference(reply["error"])
        return Verdict(float(reply["score"]), str(reply["reason"]))

    def _load(self, kind: str) -> None:
        """Import the packages of a verifier. Raises ``StageFailed``: no answer is at fault."""
        try:
            reply = self._ask({"kind": kind}, START_SECONDS)
        except WorkerDied:
            reply = {"error": "its process died"}
        if reply is None or "error" in reply:
            problem = reply["error"] if reply is not None else f"no import in {START_SECONDS:.0f} s"
            raise StageFailed(f"the verifier {kind} did not start: {problem}.")
        self._kinds.add(kind)

    def _ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any] | None:
        """Return the reply; None if it took too long. Raises ``WorkerDied``. Both end the process."""
        if self._connection is None:
            self._start()
        assert self._connection is not None
        try:
            start, before = time.monotonic(), self._processor_time()
            self._connection.send_bytes(json.dumps(request).encode())
            is_answered = self._connection.poll(seconds)
            # On a busy machine the time was another process's: wait until the worker has had its time, but not forever.
            while not is_answered and time.monotonic() - start < MOST_WAITS * seconds:
                remaining = seconds - (self._processor_time() - before)
                if remaining <= 0:
                    break
                is_answered = self._connection.poll(max(remaining, SHORTEST_WAIT))
            if is_answered:
                reply: dict[str, Any] = json.loads(self._connection.recv_bytes(LARGEST_REPLY))
                return reply
        except (EOFError, OSError, ValueError, psutil.Error) as error:
            self.close()
            raise WorkerDied from error
        self.close()
        return None

    def _processor_time(self) -> float:
        """Return the seconds that the process has computed."""
        assert self._process is not None
        times = psutil.Process(self._process.pid).cpu_times()
        return float(times.user + times.system)

    def _start(self) -> None:
        ours, theirs = Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "align.verifiers.workers", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # warnings about the text of an answer
                env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
                start_new_session=True,
            )
        self._connection = ours
        self._kinds = set()
        self._answered = 0

    def close(self) -> None:
        """Kill the process."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


class WorkerPool:
    """Workers that compare at the same time."""

    def __init__(self, count: int) -> None:
        self._workers = [Worker() for _ in range(count)]
        # Last in, first out: few answers need few workers, and those have their packages imported.
        self._idle: queue.LifoQueue[Worker] = queue.LifoQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(count, "verifiers")

    def verify(self, comparisons: Sequence[Comparison]) -> list[Verdict | BadReference]:
        """Return the verdicts in order; ``BadReference`` for an answer whose reference cannot be used."""
        return list(self._threads.map(self._verify, comparisons))

    def _verify(self, comparison: Comparison) -> Verdict | BadReference:
        worker = self._idle.get()
        try:
            return worker.verify(comparison)
        except BadReference as error:
            return error
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """Kill all processes."""
        for worker in self._workers:
            worker.close()
        self._threads.shutdown(wait=False, cancel_futures=True)


def cores() -> int:
    """Return the number of processors that this process may use."""
    return len(os.sched_getaffinity(0))


_START = threading.Lock()


@functools.cache
def _shared_pool(process: int) -> WorkerPool:
    pool = WorkerPool(min(MOST_WORKERS, cores()))
    atexit.register(pool.close)
    return pool


def shared_pool() -> WorkerPool:
    """Return the pool of this process, whose workers live until it ends."""
    with _START:
        return _shared_pool(os.getpid())  # a fork has no threads


# ---- in the worker process ----


def find_verifier(kind: str) -> Verify:
    """Return the function of a verifier, after the import of its packages."""
    if kind == "math":
        import math_verify  # noqa: F401 - part of the start, not of the first comparison

        from align.verifiers import mathematics

        return mathematics.verify
    if kind == "ifeval":
        import if_verifiable.ifeval.instructions_registry  # noqa: F401

        from align.verifiers import instructions

        return instructions.verify
    from align.verifiers import answers

    if kind == "json_schema":
        import jsonschema  # noqa: F401
    function: Verify = getattr(answers, kind)
    return function


def load_verifier(kind: str) -> Verify:
    """Return the function of a verifier, and limit the memory that its comparisons may use."""
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))  # a CUDA build of torch maps many GiB when it is imported
    function = find_verifier(kind)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    return function


def serve() -> None:
    """Answer requests on the descriptor that is the first argument, until it closes or the parent is gone."""
    connection = Connection(int(sys.argv[1]))
    parent = os.getppid()
    load = functools.cache(load_verifier)
    while True:
        # Another process may have inherited the other end, so its closing does not prove that the parent ended.
        while not select.select([connection], [], [], ORPHAN_SECONDS)[0]:
            if os.getppid() != parent:
                return
        try:
            request = json.loads(connection.recv_bytes())
        except EOFError:
            return
        connection.send_bytes(json.dumps(_answer(load, request)).encode())


def _answer(load: Callable[[str], Verify], request: dict[str, Any]) -> dict[str, Any]:
    """Return the verdict on a request, or its ``error`` for a package or a reference that cannot be used."""
    try:
        function = load(request["kind"])
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    if "text" not in request:
        return {}
    # If the parent dies during a comparison that hangs, the kernel ends this process: the default action of the alarm.
    signal.setitimer(signal.ITIMER_REAL, 4 * request["seconds"] + ORPHAN_SECONDS)
    try:
        verdict = function(request["reference"], request["text"])
    except BadReference as error:
        return {"error": str(error)}
    except RecursionError:  # thousands of brackets
        return {"score": 0.0, "reason": UNPARSABLE}
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return {"score": verdict.score, "reason": verdict.reason}


if __name__ == "__main__":
    serve()
