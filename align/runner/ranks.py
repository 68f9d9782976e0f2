"""A stage's process as the launcher of several: starts its ranks by torch's agent and says how they ended.

Each rank runs ``python -m align.runner.worker FOLDER --rank`` and leaves ``FOLDER/ranks/<rank>.json``. The first rank's
output goes to the stage's log, the others' to ``ranks/<rank>.log``. When one ends badly the agent ends the others. It
does not start again with the remaining ranks; the next run resumes from the last checkpoint instead.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from align.config.runtime import Runtime
from align.config.runtime.launch import LATE, PARENT, RANKS, LaunchConfig, is_head
from align.runner.stage_result import read_result
from align.store.json_files import DamagedFile
from align.store.retry import UNREACHABLE_STORE

GRACE_SECONDS = 5
"""Seconds that a rank has to end after a signal; fewer than the runner gives the launcher."""
TAIL_LINES = 6
TAIL_WIDTH = 200


def run_ranks(folder: Path, runtime: Runtime) -> dict[str, Any] | None:
    """Run the stage laid out in ``folder`` in ranks; the stage's result, None if one process is all there is to be.

    A signal that ends this process ends the ranks first.
    """
    launch = runtime.launch
    gpus = _gpus(runtime)
    processes = max(1, gpus) if launch.processes == "auto" else launch.processes
    if processes * launch.nodes == 1:
        return None
    if 0 < gpus < processes:
        message = (
            f"runtime.launch asks for {processes} processes on a machine with {gpus} GPUs; each process takes one. Set "
            "processes to auto, or runtime.device to cpu."
        )
        return {"status": "refused", "message": message, "peak_memory_bytes": 0, "versions": {}}
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    ranks = folder / RANKS
    ranks.mkdir(exist_ok=True)
    if is_head():
        # Results and logs of an earlier attempt would look like this attempt's. One node cleans up for all.
        for file in ranks.iterdir():
            if file.is_file():
                file.unlink()
    # The ranks inherit it and die with this process.
    os.environ[PARENT] = str(os.getpid())
    if launch.nodes == 1 and sys.platform.startswith("linux"):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # no socket listens beyond this machine
    agent = _agent_settings(folder, launch, processes, one_gpu_each=gpus > 0)
    try:
        elastic_launch(agent, sys.executable)("-m", "align.runner.worker", str(folder.resolve()), "--rank")
        failures: Mapping[int, int] = {}
    except ChildFailedError as error:
        failures = {number: failure.exitcode for number, failure in error.failures.items()}
    except SignalException as error:
        return {
            "status": "failed",
            "message": f"its processes were ended by {error.sigval.name}. Run again to resume it.",
        }
    if not failures and not is_head():
        # The first node tells how the stage ended, and may have moved its folder to the store by now.
        return {"status": "done", "metrics": {}}
    return outcome(ranks, processes * launch.nodes, failures, launch.timeout)


def _agent_settings(folder: Path, launch: LaunchConfig, processes: int, *, one_gpu_each: bool) -> Any:
    """Return the settings of torch's elastic agent, which starts this node's ranks and watches them."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig as Agent

    alone = launch.nodes == 1
    return Agent(
        # A fixed number of nodes and no restarts: a stage resumes from its checkpoint in the next run instead.
        min_nodes=launch.nodes,
        max_nodes=launch.nodes,
        nproc_per_node=processes,
        run_id=folder.name,
        rdzv_backend="c10d",
        # With port 0 the system picks a free port, so stages on the same machine do not clash.
        rdzv_endpoint="127.0.0.1:0" if alone else str(launch.rendezvous),
        # Of several nodes the first node serves the meeting place to the others.
        rdzv_configs={"timeout": launch.timeout} if alone else {"timeout": launch.timeout, "is_host": is_head()},
        local_addr="127.0.0.1" if alone else None,
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=str(folder / RANKS / "agent")),
        shutdown_timeout=GRACE_SECONDS,
        virtual_local_rank=one_gpu_each,  # each sees only its own GPU, and so does an engine in the same process
    )


def _gpus(runtime: Runtime) -> int:
    """GPUs of this machine that the stage may use; 0 for a stage on the CPU."""
    if runtime.device == "cpu":
        return 0
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def outcome(ranks: Path, world: int, failures: Mapping[int, int], timeout: float) -> dict[str, Any]:
    """Return the stage's result from what its ranks left and the exit codes of failed ranks, in order of failure."""
    candidates = {number: _read(ranks / f"{number}.json") for number in range(world)}
    results = {number: result for number, result in candidates.items() if result is not None}
    peaks = [int(result.get("peak_memory_bytes", 0)) for result in results.values()]
    about = {"peak_memory_bytes": max(peaks, default=0), "versions": results.get(0, {}).get("versions", {})}
    if not failures and results.get(0, {}).get("status") == "done":
        return {**results[0], **about}
    return {**_why(ranks, world, failures, results, timeout), **about}


def _why(
    ranks: Path, world: int, failures: Mapping[int, int], results: Mapping[int, dict[str, Any]], timeout: float
) -> dict[str, Any]:
    # One rank's fault also makes the others fail. Look for the cause: first a rank that says why it failed, in this
    # order of usefulness, and only then for those whose error is a symptom of another rank's end.
    failed = {number: result for number, result in results.items() if result["status"] != "done"}
    for status in ("refused", UNREACHABLE_STORE, "failed"):
        for number, result in failed.items():
            if result["status"] == status and not result.get("symptom"):
                place = "" if status == "refused" else f"rank {number} of {world}: "
                return {"status": status, "message": f"{place}{result['message']}"}
    stopped = next((result for result in failed.values() if result["status"] == "stopped"), None)
    if stopped is not None:  # a rank that the agent ended before it could say so has stopped with the others
        return {"status": "stopped", "message": stopped["message"]}
    # Ranks that waited in vain: the rank that they waited for is among the ranks without a failure.
    late = [number for number, result in failed.items() if result.get("symptom") == LATE]
    silent = [number for number in range(world) if number not in failed]
    if late:
        awaited = ", ".join(f"rank {number}" for number in silent) or "another rank"
        return _failed(
            f"rank {late[0]} of {world} waited {timeout:g} seconds in vain for {awaited} (runtime.launch.timeout). Run "
            "again to resume from the last checkpoint; raise the timeout if a step can take longer.",
            ranks,
            silent[:1],
        )
    # A killed rank leaves no result. SIGTERM does not count: with it the agent ends the ranks that are left.
    signals = {number: -code for number, code in failures.items() if code < 0}
    without_result = [number for number in signals if number not in results]
    died = [number for number in without_result if signals[number] != signal.SIGTERM]
    if died:
        name = signal.Signals(-failures[died[0]]).name
        often = " (often the system running out of memory)" if name == "SIGKILL" else ""
        return _failed(
            f"rank {died[0]} of {world} was killed by {name}{often}, so the others were ended. Run again to resume it.",
            ranks,
            died[:1],
        )
    # No rank says why. Name the first rank that failed without a result, else the first that failed.
    first = next((number for number in failures if number not in results), next(iter(failures), None))
    if first is None:
        return _failed(f"its {world} processes ended without a result.", ranks, [0])
    return _failed(
        f"rank {first} of {world} ended with exit code {failures[first]} and left no result. Run again to resume it.",
        ranks,
        [first],
    )


def _failed(message: str, ranks: Path, about: Sequence[int]) -> dict[str, Any]:
    """Return a failure, with the end of the log of each rank in ``about``; rank 0's log is the stage's own log."""
    for number in about:
        with contextlib.suppress(OSError):
            lines = (ranks / f"{number}.log").read_text(encoding="utf-8", errors="replace").splitlines()
            tail = [line[:TAIL_WIDTH] for line in lines if line.strip()][-TAIL_LINES:]
            if tail:
                message += f"\nThe end of {ranks / f'{number}.log'}:\n  " + "\n  ".join(tail)
    return {"status": "failed", "message": message}


def _read(file: Path) -> dict[str, Any] | None:
    try:
        return read_result(file).model_dump(exclude_unset=True)
    except (OSError, DamagedFile):
        return None
