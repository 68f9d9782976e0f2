"""The process a stage runs in: ``python -m align.runner.worker FOLDER``.

It reads ``FOLDER/work.json``, runs the stage, and writes ``FOLDER/result.json`` last. It publishes no artifact: the
runner does, once this process has ended well. A cluster starts the same command line, once on each node.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import logging
import os
import platform
import resource
import shutil
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from align.capacity.plan import fit_to_memory
from align.config.base import Config
from align.config.runtime import Runtime
from align.config.runtime.launch import BY_SRUN, PARENT, RANKS, is_head, local_size, rank, symptom, world_size
from align.config.validation import validate_plain
from align.errors import StageFailed, UserError, explain_os_error, is_no_space, is_out_of_memory, no_space
from align.pipeline.context import StageContext
from align.pipeline.process_limits import relax_collections, set_waiting, usable_cores
from align.pipeline.registry import find_stage, load_object
from align.pipeline.stop_signal import Stopped, die_with_parent
from align.registry import Stage
from align.runner.stage_result import RESULT, read_work, write_result
from align.runner.stage_speed import choose_precision, emulation_warning, measured_speed, watch
from align.store.artifacts import CHECKPOINTS, EVENTS, OUTPUT, Artifact
from align.store.fingerprint import file_state, watch_digests
from align.store.json_files import write_text_atomically
from align.store.record import read_artifact
from align.store.retry import UNREACHABLE_STORE, is_unreachable

UNREACHABLE_CODE = 74
"""Exit code of a stage that lost the store (EX_IOERR of sysexits.h); it stands for a result that was not written."""
HANDOVER = "align.checks.stage"
PROCESSES = "align.models.compute.processes"
LAUNCHER = "align.runner.ranks"
"""Modules that are loaded only once the process of a stage needs them."""

OUT_OF_MEMORY = (
    "out of memory; set `micro_batch_size: auto`, which is the default, or lower max_length (for stages that sample, "
    "max_tokens)."
)
"""Remedy for a lack of memory outside a step; ``align.training.micro_batches`` repeats steps."""

ENVIRONMENT = {
    "PYTHONUNBUFFERED": "1",
    "PYTHONFAULTHANDLER": "1",
}
"""Variables of a stage's process, unless the user's environment sets them; read when a process starts."""

_exit_codes: list[int] = []
"""Exit code of the stage of this process, once it is known."""


def main(folder: Path, parent: int | None = None) -> int:
    """Run the stage described in ``folder``; exit code 0 done, 1 failed, 2 wrong input, 75 stopped as asked.

    This process ends when the process ``parent`` ends, by default the runner.

    A stage that trains in several processes is run by ranks of this process (``align.runner.ranks``).
    """
    try:
        work = read_work(folder).model_dump()
    except UserError as error:
        return _finish(folder, RESULT, {"status": "refused", "message": str(error)})
    # Under srun the parent is Slurm's daemon, and other nodes have no runner at all.
    runner = work.get("runner_pid") if is_head() and not os.environ.get(BY_SRUN) else None
    die_with_parent(parent or runner)
    _log_to_output()
    started = time.time()
    if runs_in_several_processes(work):
        set_waiting()  # for all of them: each has separate cores
        # None: the settings come down to a single process, which is then this process.
        result: dict[str, Any] | None = load_object(f"{LAUNCHER}:run_ranks")(folder, _runtime(work))
        if result is not None:
            result["seconds"] = max(0.0, time.time() - started)  # the clock may have been set back
            # The first node writes the stage's result. The others only have an exit code, which srun looks at.
            return _finish(folder, RESULT, result) if is_head() else int(result["status"] != "done")
    set_threads(work["runtime"].get("threads"))
    return _finish(folder, RESULT, _outcome(folder, work, started, RESULT))


def _log_to_output() -> None:
    """Write align's log messages, from INFO on, to standard output, which is the stage's log."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("align")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)


def _runtime(work: dict[str, Any]) -> Runtime:
    return validate_plain(Runtime, work["runtime"])


def runs_in_several_processes(work: dict[str, Any]) -> bool:
    """Return whether several processes run the stage, as far as only the settings tell."""
    try:
        distributed = find_stage(work["stage"]).distributed
    except UserError:
        return False  # refused below
    return distributed and _runtime(work).launch.known != 1


def run_rank(folder: Path) -> int:
    """Run this process's part of the stage in ``folder``, as a rank; leave its result for the launcher."""
    work = read_work(folder).model_dump()
    die_with_parent(int(os.environ[PARENT]))
    set_threads(work["runtime"].get("threads"))
    ranks = folder / RANKS
    number = rank()
    write_text_atomically(ranks / f"{number}.pid", str(os.getpid()))
    if number:
        log = os.open(ranks / f"{number}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        for stream in (1, 2):
            # At the level of file descriptors, so output of native libraries is also redirected.
            os.dup2(log, stream)
    _log_to_output()
    name = f"{RANKS}/{number}.json"
    code = _finish(folder, name, _outcome(folder, work, time.time(), name))
    if code:
        os._exit(code)  # the group is broken: its threads would have to be waited for
    load_object(f"{PROCESSES}:leave")()
    return code


def end_without_teardown() -> None:
    """Have this process end right after its exit handlers; call it before torch is imported.

    What is registered first runs last, so torch and whatever is imported later have done by then what they want done at
    an end. Taking the interpreter down after that costs a second, for memory that the system frees anyway. In a rank it
    may even abort: Gloo's threads can still hold tensors of a group that was destroyed (pytorch/pytorch#179291).
    """
    atexit.register(_end_at_once)


def _end_at_once() -> None:
    if _exit_codes:
        logging.shutdown()  # it was registered before this function, when logging was imported
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(_exit_codes[-1])


def _outcome(folder: Path, work: dict[str, Any], started: float, result_file: str) -> dict[str, Any]:
    """Run the stage; return its result, or the reason that it has none."""
    try:
        if _runtime(work).deterministic:
            load_object(f"{PROCESSES}:use_deterministic_kernels")()
        if world_size() > 1:
            # Before the stage imports transformers and accelerate, which use a group that is there.
            load_object(f"{PROCESSES}:join")(_runtime(work))
        context = _context(folder, work, started, result_file)
        stage = find_stage(work["stage"])
        with planned_inputs(folder, stage, context, work["identities"]), _speed_watched(context):
            metrics = _run(context, stage)
        result: dict[str, Any] = {"status": "done", "metrics": metrics}
        if hasattr(context.config, "precision"):
            result["precision"] = context.precision
    except UserError as error:
        result = {"status": "refused", "message": str(error)}
    except Stopped as error:
        result = {"status": "stopped", "message": str(error)}
    except Exception as error:
        _print_trace()
        result = _explain(error, folder)
        if world_size() > 1 and not isinstance(error, OSError):
            # The error may only tell that another rank is gone. The launcher then looks for that rank's reason.
            result["symptom"] = symptom(error)
    result.update(seconds=max(0.0, time.time() - started), peak_memory_bytes=_peak_memory(), versions=_versions())
    return result


def _finish(folder: Path, name: str, result: dict[str, Any]) -> int:
    """Write a result; return its exit code."""
    codes = {"done": 0, "refused": 2, "stopped": Stopped.exit_code, UNREACHABLE_STORE: UNREACHABLE_CODE}
    code = codes.get(result["status"], 1)
    try:
        write_result(folder / name, result)
    except OSError as error:
        # Not even the result can be written, so the exit code has to say it.
        with contextlib.suppress(OSError):
            logging.getLogger("align").error(explain_os_error(error, folder))
        return UNREACHABLE_CODE if is_unreachable(error) else code or 1
    return code


def _explain(error: Exception, folder: Path) -> dict[str, Any]:
    """Return the result of a stage that failed."""
    if is_unreachable(error):
        return {"status": UNREACHABLE_STORE, "message": f"the store could not be reached ({error})."}
    if isinstance(error, StageFailed):  # its message is written for the user
        return {"status": "failed", "message": str(error)}
    if isinstance(error, OSError):
        return {"status": "failed", "message": explain_os_error(error, folder)}
    if is_out_of_memory(error):
        return {"status": "failed", "message": OUT_OF_MEMORY}
    message = no_space(folder) if is_no_space(error) else f"{type(error).__name__}: {error}"
    return {"status": "failed", "message": message}


def _print_trace() -> None:
    with contextlib.suppress(OSError):  # the log's disk may be full or away
        traceback.print_exc()


def _run(context: StageContext, stage: Stage) -> dict[str, Any]:
    """Check the input checkpoints, run the stage, check the output checkpoint."""
    makes = stage.makes_with(context.config)
    if rank():  # of several processes the first process looks
        return stage.runner()(context) or {}
    load_object(f"{HANDOVER}:check_inputs")(context, makes)
    metrics = stage.runner()(context) or {}
    load_object(f"{HANDOVER}:check_output")(context, stage.kind, makes, metrics)
    return metrics


def fail_at_once(folder: Path, result_file: str, message: str) -> None:
    """End this process with exit code 1 and ``message`` as its result, from any thread and whatever the others do."""
    with contextlib.suppress(OSError):
        write_result(folder / result_file, {"status": "failed", "message": message})
    os._exit(1)


def _context(folder: Path, work: dict[str, Any], started: float, result_file: str) -> StageContext:
    stage = find_stage(work["stage"])
    inputs: dict[str, Any] = {}
    # ``value and …`` keeps None for an optional input that names no stage.
    for name, value in work["inputs"].items():
        inputs[name] = [_artifact(item) for item in value] if isinstance(value, list) else value and _artifact(value)
    (folder / OUTPUT).mkdir(exist_ok=True)
    (folder / CHECKPOINTS).mkdir(exist_ok=True)
    config = validate_plain(stage.config_class(), work["config"])
    runtime = _runtime(work)
    guess = None
    if stage.estimator is not None:
        gpu = None if runtime.device == "cpu" else load_object(f"{PROCESSES}:memory_of_gpu")(runtime)
        runtime, guess = fit_to_memory(stage, config, inputs, runtime, gpu)
    return StageContext(
        name=work["name"],
        config=config,
        inputs=inputs,
        seed=work["seed"],
        runtime=runtime,
        output=folder / OUTPUT,
        checkpoints=folder / CHECKPOINTS,
        events=Path(os.devnull) if rank() else folder / EVENTS,  # of several processes the first one speaks
        cache=Path(work["cache"]) if work.get("cache") else None,
        pipeline=work.get("pipeline", ""),
        kind=work["stage"],
        group=work.get("group", ""),
        started=started,
        guess=guess,
        auto_precision=choose_precision(folder, config, inputs, runtime),
        fail_at_once=functools.partial(fail_at_once, folder, result_file),
    )


@contextlib.contextmanager
def _speed_watched(context: StageContext) -> Iterator[None]:
    """Inside, the stage warns if it is slow for a reason that its user can remove."""
    if rank():  # of several processes the first one speaks
        yield
        return
    speed = None
    if hasattr(context.config, "precision"):
        speed = measured_speed(context.runtime)
        if context.precision == "bfloat16" and speed.emulates_bfloat16:
            context.warn(f"{context.name}: {emulation_warning(speed)}.")
    with watch(context, speed, _available_cores()):
        yield


def _artifact(item: dict[str, str]) -> Artifact:
    return read_artifact(Path(item["path"]), item["stage"])


def _available_cores() -> int:
    """Return this process's share of the cores there are."""
    return max(1, usable_cores() // local_size())


def set_threads(threads: int | None) -> None:
    """Set this process's threads, by default its share of the cores there are; before torch is imported."""
    os.environ["OMP_NUM_THREADS"] = str(threads or _available_cores())
    set_waiting()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


def _peak_memory() -> int:
    """Return the peak resident bytes of this process, or the peak bytes on the GPU if it was used."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.max_memory_allocated() > 0:
        return int(torch.cuda.max_memory_allocated())
    # ``ru_maxrss`` counts bytes on macOS and kilobytes elsewhere.
    kilobyte = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilobyte


def _versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that the stage has imported."""
    names = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "vllm", "numpy")
    versions = {name: str(getattr(sys.modules[name], "__version__", "?")) for name in names if name in sys.modules}
    return {"python": platform.python_version(), **versions}


def start(arguments: list[str], parent: int | None = None) -> int:
    """``main`` or ``run_rank``; a store that is away before or after what they look after has an exit code as well."""
    try:
        folder = Path(arguments[0])
        code = run_rank(folder) if "--rank" in arguments[1:] else main(folder, parent)
    except OSError as error:
        if not is_unreachable(error):
            raise
        code = UNREACHABLE_CODE
    # For ``_end_at_once``, which ends the process with this code.
    _exit_codes.append(code)
    return code


INPUT_STATES = "input_states.json"
"""File of a partial with the states of the files that its checkpoints were made from."""


@contextlib.contextmanager
def planned_inputs(folder: Path, stage: Stage, context: StageContext, planned: Mapping[str, str]) -> Iterator[None]:
    """Inside, the stage reads what its key names; ``UserError`` before or after if any of it has changed.

    ``planned`` are the identities in the stage's key. They are compared before the stage reads, and again when it is
    done. A file that changed and changed back in between has equal contents, but another state, and is refused as well.
    """
    with watch_digests() as states:
        require_planned(stage, context.config, planned, context.name)
    if states and not rank():  # of several processes the first one keeps the checkpoints
        _drop_other_checkpoints(folder / INPUT_STATES, states, context)
    yield
    require_planned(stage, context.config, planned, context.name)
    for path, state in states.items():
        if file_state(os.stat(path)) != state:
            raise UserError(
                f"{context.name}: {path} changed while the stage read it, so the result may not be what the stage's "
                "key says. Nothing was stored. Run the command again while the file stays as it is."
            )


def _drop_other_checkpoints(file: Path, states: dict[str, list[int]], context: StageContext) -> None:
    """Delete the checkpoints of an earlier attempt if a file was changed since; note the states in ``file``."""
    text = json.dumps(states, sort_keys=True)
    if file.exists() and file.read_text(encoding="utf-8") != text:
        context.warn(f"{context.name}: its files were changed since the last attempt, so it starts from the beginning")
        shutil.rmtree(context.checkpoints)
        context.checkpoints.mkdir()
    write_text_atomically(file, text)


CODE_DIGEST = " sha256:"
"""Part of every identity of a function that has code of the user's."""


def require_planned(stage: Stage, config: Config, planned: Mapping[str, str], name: str) -> None:
    """Raise ``UserError`` if a file, a folder or code that the stage reads has changed since the stage was planned.

    ``planned`` are the identities in the stage's key, ``name`` is the stage's.
    """
    if not planned:
        return
    current = stage.identities(config, Path.cwd())
    changed = [place for place in sorted({*planned, *current}) if current.get(place) != planned.get(place)]
    if changed:
        is_code = "environment" in changed[0] or CODE_DIGEST in planned.get(changed[0], "")
        part = "code" if is_code else "content"
        raise UserError(
            f"{name}.{changed[0]}: its {part} has changed since this run was started, so the result would be stored "
            f"under the key of the old {part}. Nothing was stored, and all episodes on disk are kept. Run the command "
            f"again to use the new {part}, or restore the old {part} to continue."
        )


if __name__ == "__main__":
    end_without_teardown()
    relax_collections()
    sys.exit(start(sys.argv[1:]))
