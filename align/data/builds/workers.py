"""Worker processes for the shards of a build; they serve all passes. A single worker is this process itself."""

from __future__ import annotations

import base64
import contextlib
import datetime
import decimal
import functools
import importlib
import itertools
import json
import multiprocessing
import os
import shlex
import shutil
import subprocess
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from align.config.runtime.executor import Executor, LocalExecutor, RayExecutor, SlurmExecutor
from align.data.builds.shards import Pass, Task, Worker, discard_summary, is_complete, read_summary
from align.data.formats import SourceFormat
from align.data.rows import BadRecord
from align.data.steps.step import ModelLoaders
from align.errors import UserError
from align.store.json_files import write_atomically, write_text_atomically


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
            # After an error the results of the other shards are not needed.
            self._pool.shutdown(wait=kind is None, cancel_futures=True)

    def run(self, spec: Pass, tasks: Iterator[Task], in_this_process: bool) -> Iterator[None]:
        """Yield once for each shard, in order, when it is done; complete shards are not done again.

        ``in_this_process`` keeps a pass that runs a model here. A single shard also runs here, since it is not worth
        the start of a process. With ``tasks`` of a cluster every pass is a set of jobs.
        """
        # Two tasks show whether there is more than one shard; ``tasks`` may be an endless stream.
        first = list(itertools.islice(tasks, 2))
        tasks = itertools.chain(first, tasks)
        executor = self.resources.executor
        if not isinstance(executor, LocalExecutor) and executor.tasks is not None:
            yield from _run_in_jobs(executor, spec, tasks)
        elif in_this_process or self.resources.workers == 1 or len(first) < 2:
            yield from _run_here(spec, tasks)
        else:
            yield from self._run_in_pool(spec, tasks)

    def _run_in_pool(self, spec: Pass, tasks: Iterator[Task]) -> Iterator[None]:
        if self._pool is None:
            # Not fork: the parent may have threads of torch, Arrow or a Hub client.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self.resources.workers, context, self.resources.start_worker)
        waiting: deque[Future[int] | None] = deque()
        for task in tasks:
            # A shard of an earlier attempt takes a place in the queue, so it is reported in its turn.
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
            # A resumed pass whose shards are all complete starts no step.
            worker = worker or Worker(spec)
            worker.run(task)
        yield


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


ClusterExecutor = SlurmExecutor | RayExecutor

DEFAULT_TIME = "04:00:00"
"""Time limit of a job of Slurm if the executor sets none: datatrove needs one."""
DEFAULT_GB_PER_CPU = 4
"""GiB per core of a job if the executor sets no ``memory_gb``: datatrove needs a number."""
POLL_SECONDS = 5.0
GRACE_SECONDS = 60.0
"""Time that a shared file system may take to show the files of jobs that have ended."""


def _run_in_jobs(config: ClusterExecutor, spec: Pass, tasks: Iterator[Task]) -> Iterator[None]:
    """Yield once for each shard, in order, when it is done by a job; complete shards are not done again.

    Raises ``UserError`` for errors in the data, in a recipe's function or in the cluster's settings, and
    ``RuntimeError`` for jobs that ended without their shards.
    """
    folder = spec.folder / "jobs"
    # Leftovers of an earlier attempt would be read as tasks or errors of this attempt.
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "tasks").mkdir(parents=True)
    shards = 0
    waiting: list[int] = []
    formats: dict[int, SourceFormat] = {}
    for task in tasks:
        shards += 1
        formats[task.source] = task.format
        if not is_complete(spec.folder, task.shard):
            write_text_atomically(folder / "tasks" / f"{len(waiting):05d}.json", _to_json(task))
            # The summary of a damaged shard would say that its job is done.
            discard_summary(spec.folder, task.shard)
            waiting.append(task.shard)
    # Ranks take every n-th task, so large neighboring shards are spread over the jobs.
    if waiting:
        ranks = min(config.tasks or 1, len(waiting))
        work = functools.partial(run_rank, spec=spec, folder=folder, formats=formats)
        _launch(config, work, ranks, folder)
        _wait_for_jobs(config, spec, folder, waiting)
    # All jobs run at once, so every shard is reported at the end.
    yield from itertools.repeat(None, shards)


def _wait_for_jobs(config: ClusterExecutor, spec: Pass, folder: Path, shards: list[int]) -> None:
    grace = GRACE_SECONDS if config.name == "slurm" else 0
    gone_since: float | None = None
    while missing := [shard for shard in shards if read_summary(spec.folder, shard) is None]:
        _raise_error(folder)
        if _is_queued(config, folder):
            gone_since = None  # a squeue that failed once said that they were gone
        else:
            # Files of a finished job may reach this node late (NFS), so wait before the jobs count as failed.
            gone_since = gone_since or time.monotonic()
            if time.monotonic() - gone_since > grace:
                raise RuntimeError(
                    f"{config.name}: the jobs are gone, and {len(missing)} of {len(shards)} shards are not "
                    f"done (time limit, memory, a node that died). Their logs are in {folder / 'logs'}. The same "
                    "command continues with these shards."
                )
        time.sleep(min(POLL_SECONDS, 0.2 if config.name == "ray" else POLL_SECONDS))
    # An error may have been written after the last shard was finished by another rank.
    _raise_error(folder)


def run_rank(data: Any, rank: int, world_size: int, spec: Pass, folder: Path, formats: dict[int, SourceFormat]) -> None:
    """Do the shards of one rank in a job. An error is written for the build, and raised for the job's own log.

    ``formats`` has the format of each source, by number.
    """
    worker: Worker | None = None
    try:
        # All ranks sort the same names, so each task belongs to exactly one rank.
        for path in sorted((folder / "tasks").glob("*.json"))[rank::world_size]:
            task = _from_json(path.read_text(encoding="utf-8"), formats)
            if not is_complete(spec.folder, task.shard):
                worker = worker or Worker(spec)
                worker.run(task)
    except Exception as error:
        report = {"user": isinstance(error, UserError), "message": str(error), "trace": traceback.format_exc()}
        write_atomically(folder / f"error-{rank:05d}.json", report)
        raise


def _raise_error(folder: Path) -> None:
    for path in sorted(folder.glob("error-*.json")):
        report = json.loads(path.read_text(encoding="utf-8"))
        if report["user"]:
            raise UserError(report["message"])
        raise RuntimeError(f"a job failed: {report['message']}\n{report['trace']}")


def _to_json(task: Task) -> str:
    # In JSON, a list is a record and an object is an unreadable record. The job drops or refuses the unreadable one.
    records = [
        {"where": item.where, "problem": item.problem} if isinstance(item, BadRecord) else list(item)
        for item in task.records
    ]
    head = {"shard": task.shard, "start": task.start, "source": task.source}
    return json.dumps({**head, "records": records}, default=_typed)


_TYPE = "\0type"
"""Key of a value that JSON has no type for, such as a date of a Parquet file: a job must get what was read here."""


def _typed(value: Any) -> Any:
    if isinstance(value, bytes | bytearray):
        return {_TYPE: "bytes", "value": base64.b64encode(value).decode()}
    if isinstance(value, datetime.datetime | datetime.date | datetime.time):
        return {_TYPE: type(value).__name__, "value": value.isoformat()}
    if isinstance(value, decimal.Decimal):
        return {_TYPE: "Decimal", "value": str(value)}
    return str(value)


def _untyped(fields: dict[str, Any]) -> Any:
    if _TYPE not in fields:
        return fields
    kind = fields[_TYPE]
    value = fields["value"]
    if kind == "bytes":
        return base64.b64decode(value)
    if kind == "Decimal":
        return decimal.Decimal(value)
    return getattr(datetime, kind).fromisoformat(value)


def _from_json(text: str, formats: dict[int, SourceFormat]) -> Task:
    fields = json.loads(text, object_hook=_untyped)
    records = tuple(
        BadRecord(item["where"], item["problem"]) if isinstance(item, dict) else (item[0], item[1])
        for item in fields.pop("records")
    )
    return Task(**fields, format=formats[fields["source"]], records=records)


def _launch(config: ClusterExecutor, work: Callable[..., None], ranks: int, folder: Path) -> None:
    """Start the jobs. Jobs of Slurm continue after this returns; jobs of Ray have ended by then."""
    try:
        from datatrove.executor import RayPipelineExecutor, SlurmPipelineExecutor
    except ImportError:
        raise UserError(
            "runtime.executor.tasks makes jobs of data builds, which needs datatrove: "
            "pip install 'align-pipeline[cluster]', or leave tasks out."
        ) from None
    common: dict[str, Any] = {"pipeline": [work], "tasks": ranks, "logging_dir": str(folder / "logs")}
    if isinstance(config, RayExecutor):
        _connect_to_ray(config.address)
        try:
            RayPipelineExecutor(**common, ray_remote_kwargs=_ray_options(config)).run()
        except Exception:
            # A rank's own report says more than Ray's error.
            _raise_error(folder)
            raise
        return
    executor = SlurmPipelineExecutor(**common, **_slurm_options(config))
    try:
        with _outside_of_a_job():
            executor.run()
    except FileNotFoundError:
        raise UserError(
            "runtime.executor.tasks makes jobs of data builds, and there is no sbatch here; run this on a login node."
        ) from None
    except subprocess.CalledProcessError as error:
        raise UserError(f"sbatch refused the jobs (exit code {error.returncode}); its message is above.") from None
    write_text_atomically(folder / "job", str(executor.job_id))


def _slurm_options(config: SlurmExecutor) -> dict[str, Any]:
    """Return datatrove's arguments for jobs of one node each."""
    cpus = config.cpus or 1
    memory_mb = 1024 * (config.memory_gb or DEFAULT_GB_PER_CPU * cpus)
    # datatrove asks for memory per core in full GiB; an option of sbatch replaces that, rounded up by at most 1 MiB.
    sbatch = {"account": config.account, "constraint": config.constraint, "mem-per-cpu": f"{-(-memory_mb // cpus)}M"}
    path = f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH"
    return {
        "cpus_per_task": cpus,
        "gpus_per_task": config.gpus,
        "time": config.time or DEFAULT_TIME,
        "partition": config.partition,
        "qos": config.qos,
        "job_name": "align-data",
        "env_command": "\n".join([path, config.setup or ""]),
        "sbatch_args": {name: value for name, value in sbatch.items() if value is not None} | config.sbatch,
        "requeue": False,  # a failed shard would fail again; the next run repeats an interrupted shard
    }


@contextlib.contextmanager
def _outside_of_a_job() -> Iterator[None]:
    """Hide the variables of the Slurm job that this process may run in, a stage's or a sweep's.

    datatrove would take them for its own, and the jobs would inherit them: srun refuses SLURM_MEM_PER_NODE
    with their own SLURM_MEM_PER_CPU.
    """
    hidden = {name: os.environ.pop(name) for name in list(os.environ) if _is_of_a_job(name)}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _is_of_a_job(variable: str) -> bool:
    return variable.startswith(("SLURM_", "SLURMD_")) and variable != "SLURM_CONF"


def _connect_to_ray(address: str) -> None:
    """Connect to the cluster, which datatrove expects. Raises ``UserError`` if none answers."""
    try:
        ray: Any = importlib.import_module("ray")
    except ImportError:
        raise UserError(
            "runtime.executor is ray, and ray is not installed: pip install 'align-pipeline[ray]'."
        ) from None
    if ray.is_initialized():
        return
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", configure_logging=False)
    except (ConnectionError, TimeoutError, RuntimeError, ValueError, OSError) as error:
        raise UserError(
            f"runtime.executor: no Ray cluster answers at '{address}' ({type(error).__name__}). Start one with `ray "
            "start --head`, or name a running one as runtime.executor.address."
        ) from None


def _ray_options(config: RayExecutor) -> dict[str, Any]:
    """Return Ray's options of a task; datatrove's placement groups take no ``resources``."""
    memory_gb = config.memory_gb or DEFAULT_GB_PER_CPU * config.cpus
    return {"num_cpus": config.cpus, "num_gpus": config.gpus, "memory": int(memory_gb * 2**30)}


def _is_queued(config: ClusterExecutor, folder: Path) -> bool:
    """Return True while a job waits or runs."""
    # Jobs of Ray have ended by the time that ``_launch`` returns.
    if config.name == "ray":
        return False
    job = (folder / "job").read_text(encoding="utf-8")
    queue = subprocess.run(["squeue", "--noheader", "--jobs", job], capture_output=True, text=True)
    return queue.returncode == 0 and bool(queue.stdout.strip())
