"""The processes that do a build's shards: none for one, and then the same ones for every pass."""

from __future__ import annotations

import itertools
import multiprocessing
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType

from align.config.runtime import ExecutorConfig
from align.data.cluster import Cluster
from align.data.shards import Pass, Task, Worker, is_whole


@dataclass(frozen=True)
class Machine:
    """How a build is run; changes no result."""

    workers: int = 1
    device: str = "auto"
    start_worker: Callable[[], None] | None = None
    """Called at the start of each worker process; picklable."""
    executor: ExecutorConfig = field(default_factory=ExecutorConfig)


class Workers:
    """Does tasks, a pass at a time. A context manager, for its processes end with it."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=kind is None, cancel_futures=True)

    def run(self, spec: Pass, tasks: Iterator[Task], alone: bool) -> Iterator[None]:
        """Yields once for each shard, in order, when it is done; finished ones are not done again.

        ``alone`` keeps the pass in this process, for it runs a model. So does a single shard, which is not worth
        starting others for. On a cluster every pass is jobs.
        """
        first = list(itertools.islice(tasks, 2))
        tasks = itertools.chain(first, tasks)
        if self.machine.executor.name != "local":
            yield from Cluster(self.machine.executor).run(spec, tasks)
        elif alone or self.machine.workers == 1 or len(first) < 2:
            yield from _here(spec, tasks)
        else:
            yield from self._there(spec, tasks)

    def _there(self, spec: Pass, tasks: Iterator[Task]) -> Iterator[None]:
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self.machine.workers, context, self.machine.start_worker or _nothing)
        waiting: deque[Future[int] | None] = deque()
        for task in tasks:
            done = is_whole(spec.folder, task.shard)
            waiting.append(None if done else self._pool.submit(_work, spec, task))
            if len(waiting) > 2 * self.machine.workers:  # no more records than these wait in memory
                _wait(waiting.popleft())
                yield
        while waiting:
            _wait(waiting.popleft())
            yield


def _here(spec: Pass, tasks: Iterator[Task]) -> Iterator[None]:
    worker: Worker | None = None
    for task in tasks:
        if not is_whole(spec.folder, task.shard):
            worker = worker or Worker(spec)
            worker.run(task)
        yield


def _nothing() -> None:
    pass


_worker: Worker | None = None


def _work(spec: Pass, task: Task) -> int:
    """In a worker process: one task, by the pass's steps, which are started with its first task."""
    global _worker
    if _worker is None or _worker.spec.folder != spec.folder:
        _worker = Worker(spec)
    return _worker.run(task)


def _wait(future: Future[int] | None) -> None:
    if future is not None:
        future.result()
