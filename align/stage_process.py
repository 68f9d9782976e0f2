"""The process a stage runs in: ``python -m align.stage_process FOLDER``.

Reads ``FOLDER/work.json``, runs the stage, and writes ``FOLDER/result.json`` last. It publishes nothing: the
runner does, once this process has ended well. The same command line is what a cluster launches.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import json
import os
import platform
import resource
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from align.artifacts import Artifact, Kind
from align.errors import UserError, explain_os_error, no_space
from align.runtime import Runtime
from align.shared_folder import is_unreachable
from align.stage import Stage, StageContext, find_stage, load_object

WORK, RESULT, EVENTS, LOG = "work.json", "result.json", "events.jsonl", "log.txt"
OUTPUT, CHECKPOINTS = "output", "checkpoints"
UNREACHABLE_STORE = "unreachable"
"""Status of a stage that failed because the store did not answer: once it does, the stage can go on."""
UNREACHABLE_CODE = 75
"""Exit code of such a stage; "temporary failure" in sysexits.h. It stands for a result that could not be written."""
HANDOVER = "align.handover.stage"
"""Loaded as the stage itself is: not before the process of a stage needs it."""


ENVIRONMENT = {
    "PYTHONUNBUFFERED": "1",
    "PYTHONFAULTHANDLER": "1",
    # glibc gives large blocks back to the kernel at once, and a training step asks for the same ones over and over: in
    # pages of 2 MiB rather than 4 KiB that costs little (PPO's learning on SmolLM2-135M: 7.8 s without, 6.8 s with).
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
"""What a stage's process is started with, unless the user's environment says otherwise; read when a process starts."""


def main(folder: Path) -> int:
    """Run the stage described in ``folder``; exit code 0 done, 1 failed, 2 the user's input was at fault."""
    work = json.loads((folder / WORK).read_text(encoding="utf-8"))
    die_with_parent(work.get("runner_pid"))
    _set_threads(work["runtime"])
    started = time.time()
    try:
        metrics = _run(_context(folder, work, started), find_stage(work["stage"]))
        result: dict[str, Any] = {"status": "done", "metrics": metrics}
        code = 0
    except UserError as error:
        result, code = {"status": "refused", "message": str(error)}, 2
    except MemoryError:
        _print_trace()
        result, code = {"status": "failed", "message": "out of memory; lower micro_batch_size or max_length."}, 1
    except Exception as error:
        _print_trace()
        result, code = _explain(error, folder)
    result.update(seconds=time.time() - started, peak_memory_bytes=_peak_memory(), versions=_versions())
    try:
        _write_result(folder, result)
    except OSError as error:
        with contextlib.suppress(OSError):
            print(explain_os_error(error, folder), file=sys.stderr)
        return UNREACHABLE_CODE if is_unreachable(error) else code or 1
    return code


def _explain(error: Exception, folder: Path) -> tuple[dict[str, Any], int]:
    """The result and the exit code of a stage that failed."""
    if is_unreachable(error):
        message = f"the store could not be reached ({error})."
        return {"status": UNREACHABLE_STORE, "message": message}, UNREACHABLE_CODE
    if isinstance(error, OSError):
        return {"status": "failed", "message": explain_os_error(error, folder)}, 1
    full = os.strerror(errno.ENOSPC) in str(error)  # safetensors and tokenizers wrap it in errors of their own
    return {"status": "failed", "message": no_space(folder) if full else f"{type(error).__name__}: {error}"}, 1


def _print_trace() -> None:
    with contextlib.suppress(OSError):  # the log lies where nothing can be written perhaps
        traceback.print_exc()


def _run(context: StageContext, stage: Stage) -> dict[str, Any]:
    """Look at the checkpoints that come in, run the stage, look at the one that goes out."""
    makes = stage.makes or context.config.makes()
    load_object(f"{HANDOVER}:check_inputs")(context, makes)
    metrics = stage.runner()(context) or {}
    load_object(f"{HANDOVER}:check_made")(context, stage.kind, makes, metrics)
    return metrics


def _write_result(folder: Path, result: dict[str, Any]) -> None:
    temporary = folder / f"{RESULT}.tmp"
    temporary.write_text(json.dumps(result, default=float), encoding="utf-8")
    temporary.replace(folder / RESULT)


def fail_at_once(folder: Path, message: str) -> None:
    """End this process with exit code 1 and ``message`` as its result, from any thread and whatever the others do."""
    with contextlib.suppress(OSError):
        _write_result(folder, {"status": "failed", "message": message})
    os._exit(1)


def _context(folder: Path, work: dict[str, Any], started: float) -> StageContext:
    stage = find_stage(work["stage"])
    inputs: dict[str, Any] = {}
    for name, value in work["inputs"].items():
        inputs[name] = [_artifact(item) for item in value] if isinstance(value, list) else value and _artifact(value)
    (folder / OUTPUT).mkdir(exist_ok=True)
    (folder / CHECKPOINTS).mkdir(exist_ok=True)
    return StageContext(
        name=work["name"],
        config=stage.config_class().model_validate(work["config"]),
        inputs=inputs,
        seed=work["seed"],
        runtime=Runtime.model_validate(work["runtime"]),
        output=folder / OUTPUT,
        checkpoints=folder / CHECKPOINTS,
        events=folder / EVENTS,
        cache=Path(work["cache"]) if work.get("cache") else None,
        pipeline=work.get("pipeline", ""),
        group=work.get("group", ""),
        started=started,
        fail_at_once=functools.partial(fail_at_once, folder),
    )


def _artifact(item: dict[str, str]) -> Artifact:
    path = Path(item["path"])
    record = json.loads((path / "record.json").read_text(encoding="utf-8"))
    return Artifact(item["stage"], Kind(record["makes"]), path, record)


def die_with_parent(parent: int | None) -> None:
    """Have Linux end this process when the runner dies, so that no orphan works on under a released lock."""
    if not sys.platform.startswith("linux"):
        return
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:  # it died before the line above
        os._exit(1)


def _set_threads(runtime: dict[str, Any]) -> None:
    """One thread per core unless the user says otherwise; must be set before torch is imported."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ["OMP_NUM_THREADS"] = str(runtime.get("threads") or cores)
    # Threads that spin while they wait make a trainer and anything else on the same cores ten times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


def _peak_memory() -> int:
    """Peak resident bytes of this process, or peak bytes on the GPU where one was used."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.max_memory_allocated() > 0:
        return int(torch.cuda.max_memory_allocated())
    kilobyte = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilobyte


def _versions() -> dict[str, str]:
    """Versions of what the stage really imported, and the machine."""
    names = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "vllm", "numpy")
    found = {name: str(getattr(sys.modules[name], "__version__", "?")) for name in names if name in sys.modules}
    return {"python": platform.python_version(), **found}


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
