"""Worker processes for the shards of a build; they serve all passes. A single worker is this process itself."""

from __future__ import annotations

import itertools
import multiprocessing
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType

from align.config.executor import Executor, LocalExecutor
from align.data.cluster_jobs import ClusterWorkers
from align.data.shards import Pass, Task, Worker, is_complete
from align.data.steps.base import ModelLoaders


@dataclass(frozen=True)
class BuildResources:
    """Resources that a build runs on; they change no result."""

    workers: int = 1
    device: str = "auto"
    start_worker: Callable[[], None] | None = None
    """Called at the start of each worker process; must be picklable."""
    models: ModelLoaders | None = None
    """Access to models, for recipes with steps that need one."""
    executor: Executor = field(default_factory=LocalExecutor)
    """Runs the shards of each pass as jobs if it has ``tasks``."""


class Workers:
    """Does tasks, a pass at a time. A context manager, which ends the processes."""

    def __init__(self, resources: BuildResources) -> None:
        self.resources = resources
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._pool is not None:
            # After an error nobody waits for shards whose results nobody will read.
            self._pool.shutdown(wait=kind is None, cancel_futures=True)

    def run(self, spec: Pass, tasks: Iterator[Task], in_this_process: bool) -> Iterator[None]:
        """Yield once for each shard, in order, when it is done; complete shards are not done again.

        ``in_this_process`` keeps a pass that runs a model here. A single shard runs here too, since it is not worth the
        start of a process. With ``tasks`` of a cluster every pass is a set of jobs.
        """
        # Two tasks show whether there is more than one shard; ``tasks`` may be an endless stream.
        first = list(itertools.islice(tasks, 2))
        tasks = itertools.chain(first, tasks)
        executor = self.resources.executor
        if not isinstance(executor, LocalExecutor) and executor.tasks is not None:
            yield from ClusterWorkers(executor, executor.tasks).run(spec, tasks)
        elif in_this_process or self.resources.workers == 1 or len(first) < 2:
            yield from _run_here(spec, tasks)
        else:
            yield from self._run_in_pool(spec, tasks)

    def _run_in_pool(self, spec: Pass, tasks: Iterator[Task]) -> Iterator[None]:
        if self._pool is None:
            # Not fork: the parent may have threads of torch, Arrow or a Hub client.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(
                self.resources.workers, context, self.resources.start_worker or _do_nothing
            )
        waiting: deque[Future[int] | None] = deque()
        for task in tasks:
            # A shard of an earlier attempt takes a place in the queue, so that it is reported in its turn.
            if is_complete(spec.folder, task.shard):
                waiting.append(None)
            else:
                waiting.append(self._pool.submit(_run_task, spec, task))
            # Bounds the records that wait in memory; shards are reported in order.
            if len(waiting) > 2 * self.resources.workers:
                _wait(waiting.popleft())
                yield
        while waiting:
            _wait(waiting.popleft())
            yield


def _run_here(spec: Pass, tasks: Iterator[Task]) -> Iterator[None]:
    worker: Worker | None = None
    for task in tasks:
        if not is_complete(spec.folder, task.shard):
            # Late, so that a resumed pass with nothing left starts no step.
            worker = worker or Worker(spec)
            worker.run(task)
        yield


def _do_nothing() -> None:
    pass


_worker: Worker | None = None


def _run_task(spec: Pass, task: Task) -> int:
    """Do one task in a worker process; the first task of a pass starts the steps."""
    # The pool outlives a pass, so the worker is replaced when the folder of the pass changes.
    global _worker
    if _worker is None or _worker.spec.folder != spec.folder:
        _worker = Worker(spec)
    return _worker.run(task)


def _wait(future: Future[int] | None) -> None:
    if future is not None:
        future.result()
