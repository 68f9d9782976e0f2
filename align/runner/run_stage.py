"""Makes one stage: its locks, its process and what that reads, and its artifact. Never imports torch."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from align.errors import StageFailed, UserError
from align.pipeline.pipeline import Node, Pipeline
from align.pipeline.provenance import command_line, git_commit, source_digest
from align.pipeline.stop_signal import Stopped, StopRequest, clear_request
from align.runner.listener import Listener
from align.runner.stage_result import RESULT, read_result, write_work
from align.runner.subprocess import run_attempt, seconds_of_attempts
from align.runner.sync import among_machines, fetched_meanwhile, offer
from align.store.artifacts import Artifact
from align.store.fingerprint import digest
from align.store.json_files import DamagedFile
from align.store.locks import Hold, LockLost
from align.store.marker import require_mark
from align.store.partial import CHECKPOINTS, EVENTS, LOG, OUTPUT
from align.store.record import DamagedArtifact
from align.store.retry import UNREACHABLE_STORE
from align.store.store import Store
from align.store.version import VERSION

TRIES = 3
"""How often a stage is begun whose lock was lost, or whose process lost the store, before the run gives up."""


def make_stage(
    pipeline: Pipeline,
    node: Node,
    store: Store,
    inputs: dict[str, Artifact],
    anew: bool,
    listener: Listener,
    stop: StopRequest,
) -> tuple[bool, Artifact]:
    """Run one stage under its lock; another run that finishes it meanwhile counts as cached.

    A run that was silent for so long that another took its lock (its machine slept, or could not reach the store)
    leaves the stage to that one, and waits for it as any other would.
    """
    for tries_left in reversed(range(TRIES)):
        try:
            return _among_machines(pipeline, node, store, inputs, anew, listener, stop)
        except LockLost as lost:
            if tries_left == 0:
                raise LockLost(f"stage '{node.name}': {lost}. Nothing of it was published here; run again.") from None
            listener.warning(f"stage '{node.name}': {lost}; what was made here since is left out")
    raise AssertionError


def _among_machines(
    pipeline: Pipeline, node: Node, store: Store, inputs: dict[str, Artifact], anew: bool, listener: Listener,
    stop: StopRequest,
) -> tuple[bool, Artifact]:  # fmt: skip
    """Run one stage while no other machine that shares the store's remote does; what one has published is fetched."""
    kind, key = node.stage.kind, node.key
    with among_machines(store, kind, key, lambda who: listener.waiting(node, who), listener.warning) as far:
        found = None if anew else fetched_meanwhile(store, kind, key, node.name, listener.warning)
        if found is not None:
            listener.stage_cached(node, found)
            return False, found
        ran, artifact = _under_lock(pipeline, node, store, inputs, anew, listener, stop, far)
        offer(store, artifact, listener.transfer, replace=anew and ran)
    return ran, artifact


def _under_lock(
    pipeline: Pipeline, node: Node, store: Store, inputs: dict[str, Artifact], anew: bool, listener: Listener,
    stop: StopRequest, far: Hold | None,
) -> tuple[bool, Artifact]:  # fmt: skip
    kind = node.stage.kind
    look = store.find_intact if anew else store.find  # what is damaged is replaced where that is asked for, else named
    before = look(kind, node.key, node.name)
    with store.lock(kind, node.key, lambda holder: listener.waiting(node, holder)) as hold:
        partial = store.partial(kind, node.key)
        found = look(kind, node.key, node.name)
        fresh = found is not None and (before is None or found.record["created"] != before.record["created"])
        if found is not None and (not anew or fresh):
            listener.stage_cached(node, found)
            return False, found
        for artifact in inputs.values():
            problems = store.problems(artifact, thorough=True)
            if problems:
                raise DamagedArtifact(
                    f"stage '{node.name}' would read {problems[0].path}, which {problems[0].what}. "
                    f"The artifact is corrupted; `--rebuild {artifact.stage}` makes it again.",
                    artifact.stage,
                )
        result = store.patience.keep_trying(lambda: _finished_result(partial, listener.warning))
        if result is None:
            result = _attempts(pipeline, node, store, partial, inputs, (hold, far), listener, stop)
        if far is not None:
            _confirm(far, listener)
        artifact = _publish(pipeline, node, store, partial, inputs, result, hold, found)
    listener.stage_done(node, artifact)
    return True, artifact


def _attempts(
    pipeline: Pipeline, node: Node, store: Store, partial: Path, inputs: dict[str, Artifact],
    holds: tuple[Hold | None, ...], listener: Listener, stop: StopRequest,
) -> dict[str, Any]:  # fmt: skip
    """Run the stage's process; again from its checkpoints where the store was away, once it answers."""

    def check() -> None:
        for hold in holds:
            if hold is not None:
                hold.check()

    for tries_left in reversed(range(TRIES)):
        store.patience.keep_trying(lambda: _prepare(pipeline, node, store, partial, inputs))
        listener.stage_started(node, partial, any((partial / CHECKPOINTS).glob("*")))
        result = run_attempt(
            node.name, partial, lambda event: listener.stage_event(node, event), stop, check, store.patience
        )
        if result["status"] == "done":
            return result
        if holds[0] is not None:  # a stage that another run has taken over ends without a result, which is no failure
            store.patience.keep_trying(holds[0].confirm)
        if result["status"] == "stopped":
            raise Stopped(f"stage '{node.name}' {result['message']}")
        if result["status"] != UNREACHABLE_STORE or tries_left == 0:
            break
        listener.warning(f"stage '{node.name}': {result['message']} It is tried again.")
    raise _failed(node, partial, result, listener)


def _confirm(far: Hold, listener: Listener) -> None:
    """Whether the lock in the remote is still held; where that cannot be asked, the work is not thrown away."""
    try:
        far.confirm()
    except (OSError, UserError) as error:
        listener.warning(f"the lock in the remote cannot be confirmed ({error}); the stage is kept here")


def _finished_result(partial: Path, say: Callable[[str], None]) -> dict[str, Any] | None:
    """The result of an attempt that ended well and whose runner died before publishing it."""
    try:
        result = read_result(partial / RESULT)
    except FileNotFoundError:
        return None
    except DamagedFile as error:
        say(f"{partial / RESULT}: damaged: it {error}. The stage goes on from its checkpoints instead.")
        return None
    return result.model_dump() if result.status == "done" and (partial / OUTPUT).is_dir() else None


def _prepare(pipeline: Pipeline, node: Node, store: Store, partial: Path, inputs: dict[str, Artifact]) -> None:
    """Lay out the partial folder; checkpoints of an earlier attempt stay, its half-written output goes."""
    require_mark(store.root)
    (partial / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(partial / OUTPUT)
    (partial / RESULT).unlink(missing_ok=True)
    clear_request(partial)

    def pointer(name: str) -> dict[str, str]:
        return {"stage": name, "path": str(inputs[name].path.resolve())}

    work = {
        "name": node.name,
        "stage": node.stage.path or node.stage.kind,
        "config": node.config.model_dump(mode="json"),
        "seed": node.seed,
        "runtime": pipeline.runtimes[node.name].model_dump(mode="json"),
        "inputs": {
            field_name: [pointer(name) for name in value] if isinstance(value, list) else value and pointer(value)
            for field_name, value in node.inputs.items()
        },
        "cache": str(store.cache.resolve()),
        "pipeline": pipeline.name,
        "group": digest({other.name: other.key for other in pipeline})[:8],
        "runner_pid": os.getpid(),
    }
    write_work(partial, work)


def _failed(node: Node, partial: Path, result: dict[str, Any], listener: Listener) -> UserError | StageFailed:
    """The error that says why the stage's process is not done."""
    log = partial / LOG
    listener.stage_failed(node, result["message"], log)
    if result["status"] == "refused":
        return UserError(f"stage '{node.name}': {result['message']}")
    return StageFailed(f"stage '{node.name}' failed: {result['message']}\nLog: {log}")


def _publish(
    pipeline: Pipeline, node: Node, store: Store, partial: Path, inputs: dict[str, Artifact], result: dict[str, Any],
    hold: Hold, replaces: Artifact | None,
) -> Artifact:  # fmt: skip
    """Give the output folder its log, events and record, move it to its final name, and drop the partial.

    The record's ``seconds`` are the sum of its ``attempts`` (``attempt.seconds_of_attempts``), a stage that was never
    killed having one; ``peak_memory_bytes`` is the last one's.
    """
    output = partial / OUTPUT
    attempts = store.patience.keep_trying(lambda: [*seconds_of_attempts(partial)[:-1], result["seconds"]])
    store.patience.keep_trying(lambda: _add_logs(partial, output))
    record = {
        "key": node.key,
        "kind": node.stage.kind,
        "stage": node.name,
        "pipeline": pipeline.name,
        "makes": str(node.makes),
        "version": node.stage.version,
        "config": node.config.model_dump(mode="json"),
        "seed": node.seed,
        "parts": node.parts,
        "inputs": {
            field_name: [inputs[name].record["key"] for name in value]
            if isinstance(value, list)
            else value and inputs[value].record["key"]
            for field_name, value in node.inputs.items()
        },
        "input_stages": [
            {
                "stage": artifact.stage,
                "kind": artifact.record["kind"],
                "key": artifact.record["key"],
                "weights": artifact.weights,
            }
            for artifact in inputs.values()
        ],
        "identities": node.identities,
        "metrics": result["metrics"],
        "tokens": result["metrics"].get("tokens"),
        "seconds": round(sum(attempts), 2),
        "attempts": [round(seconds, 2) for seconds in attempts],
        "peak_memory_bytes": result["peak_memory_bytes"],
        "created": datetime.now(UTC).isoformat(),
        "align": VERSION,
        "packages": result["versions"],
        "source": source_digest(node.stage),
        "git": git_commit(),
        "platform": f"{sys.platform} {os.uname().machine}, {os.cpu_count()} cores",
        "command": command_line(),
    }
    artifact = store.publish(output, record, hold, replaces)
    store.drop_partials(node.stage.kind, node.key)
    return artifact


def _add_logs(partial: Path, output: Path) -> None:
    for name in (LOG, EVENTS):
        if (partial / name).exists():
            shutil.copyfile(partial / name, output / name)


__all__ = ["make_stage"]
