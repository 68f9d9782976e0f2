"""Run one stage: its locks, its process and what that reads, and its artifact. Never imports torch.

The steps, each inside the step before:

1. the lock in the store's remote, if there is one: no other machine that shares the remote runs the stage;
2. the lock in the store: no other run that shares the folder does;
3. the artifact, once more: another run may have published it while this run waited;
4. the result of an attempt that ended well and whose runner died before publishing it;
5. the stage's process, again from its checkpoints if the store was away;
6. the record, published by one rename under the lock that is still held.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from align.config.stages.continue_from import END, steps_per_length
from align.errors import StageFailed, UserError
from align.pipeline.inheritance import CHECKPOINT, COMPLETE, with_end
from align.pipeline.pipeline import Node, Pipeline
from align.pipeline.provenance import command_line, git_commit, source_digest
from align.pipeline.stop_signal import StopRequest, clear_request
from align.runner.listener import Listener
from align.runner.open_store import fetch_if_published, remote_lock, upload
from align.runner.stage_process import run_attempt
from align.runner.stage_result import ATTEMPTS, RESULT, read_attempts, read_result, write_work
from align.runner.stage_speed import PRECISION_FILE
from align.store.artifacts import CHECKPOINTS, EVENTS, LOG, OUTPUT, VERSION, Artifact
from align.store.fingerprint import digest
from align.store.json_files import DamagedFile
from align.store.locks import Hold, LockLost
from align.store.record import DamagedArtifact, require_marker
from align.store.retry import UNREACHABLE_STORE
from align.store.store import Store

TRIES = 3
"""Times that a stage is started whose lock was lost, or whose process lost the store, before the run gives up."""


@dataclass
class StageRun:
    """One stage of a run. ``force`` runs it although its artifact exists; ``inputs`` are artifacts by stage name."""

    pipeline: Pipeline
    node: Node
    store: Store
    inputs: dict[str, Artifact]
    force: bool
    listener: Listener
    stop: StopRequest
    _holds: list[Hold] = field(default_factory=list)
    """Locks that are held: in the remote, and in the store."""

    @property
    def kind(self) -> str:
        """The kind of the stage."""
        return self.node.stage.kind

    @property
    def partial(self) -> Path:
        """The folder in which the stage works until its artifact is published."""
        return self.store.partial(self.kind, self.node.key)

    def run(self) -> tuple[bool, Artifact]:
        """Run the stage under its locks; return whether it really ran, and its artifact.

        A run that was silent for so long that another took its lock (its machine slept, or could not reach the store)
        leaves the stage to that one, and waits for it as any other would.
        """
        for tries_left in reversed(range(TRIES)):
            # Each try waits for the locks again. By then the run that took one may have published the artifact.
            self._holds = []
            try:
                return self._run_under_remote_lock()
            except LockLost as lost:
                message = f"stage '{self.node.name}': {lost}"
                if tries_left == 0:
                    raise LockLost(f"{message}. Nothing of it was published here; run again.") from None
                self.listener.warning(f"{message}; what was made here since is not used")
        raise AssertionError

    def _run_under_remote_lock(self) -> tuple[bool, Artifact]:
        """Run the stage while no other machine that shares the store's remote does; fetch what it has published."""
        key = self.node.key
        listener = self.listener
        lock = remote_lock(
            self.store, self.kind, key, lambda holder: listener.waiting(self.node, holder), listener.warning
        )
        # The remote's lock is always acquired before the store's, so two machines cannot wait for each other.
        with lock as remote_hold:
            if not self.force:
                # Another machine may have published the stage while this machine waited for the lock.
                artifact = fetch_if_published(self.store, self.kind, key, self.node.name, listener.warning)
                if artifact is not None:
                    listener.stage_cached(self.node, artifact)
                    return False, artifact
            # The remote's lock is held until the upload is done: a machine that waits for it then finds the artifact.
            has_run, artifact = self._run_under_lock(remote_hold)
            upload(self.store, artifact, listener.transfer, replace=self.force and has_run)
        return has_run, artifact

    def _run_under_lock(self, remote_hold: Hold | None) -> tuple[bool, Artifact]:
        # With force a damaged artifact is replaced, without it is named.
        find = self.store.find_intact if self.force else self.store.find
        # Remember what was there before the wait, to distinguish a new artifact from the artifact to replace.
        before = find(self.kind, self.node.key, self.node.name)
        with self.store.lock(self.kind, self.node.key, lambda holder: self.listener.waiting(self.node, holder)) as hold:
            self._holds = [hold, *([remote_hold] if remote_hold is not None else [])]
            existing = find(self.kind, self.node.key, self.node.name)
            # An artifact that appeared while this run waited for the lock is new, so force is satisfied by it.
            is_new = existing is not None and (before is None or existing.record["created"] != before.record["created"])
            if existing is not None and (not self.force or is_new):
                self.listener.stage_cached(self.node, existing)
                return False, existing
            self._require_intact_inputs()
            # An attempt may have ended well although its runner died before it could publish.
            result = self.store.retry.call(self._finished_result)
            if result is None:
                result = self._run_attempts(hold)
            if remote_hold is not None:
                # Last question before the artifact becomes visible: does the lock still belong to this run?
                self._confirm_remote(remote_hold)
            artifact = self._publish(result, hold, existing)
        self.listener.stage_done(self.node, artifact)
        return True, artifact

    def _require_intact_inputs(self) -> None:
        """Compare the inputs' files with their digests; a stage must not learn from a damaged checkpoint."""
        for artifact in self.inputs.values():
            problems = self.store.problems(artifact, thorough=True)
            if problems:
                raise DamagedArtifact(
                    f"stage '{self.node.name}' would read {problems[0].path}, which {problems[0].description}. "
                    f"The artifact is corrupted; `--rebuild {artifact.stage}` makes it again.",
                    artifact.stage,
                )

    def _finished_result(self) -> dict[str, Any] | None:
        """Return the result of an attempt that ended well and whose runner died before publishing it."""
        path = self.partial / RESULT
        try:
            result = read_result(path)
        except FileNotFoundError:
            return None
        except DamagedFile as error:
            self.listener.warning(f"{path}: damaged: it {error}. The stage goes on from its checkpoints instead.")
            return None
        # Without output it was published already, by a runner that died before it dropped the partial.
        return result.model_dump() if result.status == "done" and (self.partial / OUTPUT).is_dir() else None

    def _run_attempts(self, hold: Hold) -> dict[str, Any]:
        """Run the stage's process; if the store was away, again from its checkpoints once it answers."""
        retry = self.store.retry
        partial = self.partial
        for tries_left in reversed(range(TRIES)):
            retry.call(self._prepare_partial)
            self.listener.stage_started(self.node, partial, any((partial / CHECKPOINTS).glob("*")))
            result = run_attempt(
                self.node.name,
                partial,
                lambda event: self.listener.stage_event(self.node, event),
                self.stop,
                check=self._check_locks,
                tell=lambda how: self.listener.stage_stopping(self.node, how),
                retry=retry,
            )
            if result["status"] == "done":
                return result
            # A stage that another run continues ends without a result, which is no failure: this raises LockLost.
            retry.call(hold.confirm)
            if result["status"] == "stopped":
                raise self.stop.error(f"stage '{self.node.name}' {result['message']}")
            if result["status"] != UNREACHABLE_STORE or tries_left == 0:
                break
            self.listener.warning(f"stage '{self.node.name}': {result['message']} It is tried again.")
        raise self._error_of(result)

    def _check_locks(self) -> None:
        """Raise ``LockLost`` if another run has acquired any of the locks; called while the process runs."""
        for hold in self._holds:
            hold.check()

    def _confirm_remote(self, hold: Hold) -> None:
        """Confirm the lock in the remote; where that cannot be asked, the work is not thrown away."""
        try:
            hold.confirm()
        except (OSError, UserError) as error:
            self.listener.warning(f"the lock in the remote cannot be confirmed ({error}); the stage is kept here")

    def _prepare_partial(self) -> None:
        """Lay out the partial folder: checkpoints of an earlier attempt stay, its half-written output goes."""
        require_marker(self.store.root)
        (self.partial / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        self._adopt_checkpoint()
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self.partial / OUTPUT)
        # A partial without an output would count as left over from publishing (``Store.leftovers``).
        (self.partial / OUTPUT).mkdir()
        # An old result would look like this attempt's if the process died without one.
        (self.partial / RESULT).unlink(missing_ok=True)
        clear_request(self.partial)
        node = self.node
        work = {
            "name": node.name,
            "stage": node.stage.path or node.stage.kind,
            "config": node.config.model_dump(mode="json"),
            "seed": node.seed,
            "runtime": self.pipeline.runtimes[node.name].model_dump(mode="json"),
            "inputs": self._map_inputs(lambda name: {"stage": name, "path": str(self.inputs[name].path.resolve())}),
            "identities": node.identities,
            "cache": str(self.store.cache.resolve()),
            "pipeline": self.pipeline.name,
            # All stages' keys, so trackers show every attempt at one run together and another run apart.
            "group": digest({stage.name: stage.key for stage in self.pipeline})[:8],
            "runner_pid": os.getpid(),
        }
        write_work(self.partial, work)

    def _adopt_checkpoint(self) -> None:
        """Begin a stage that ends early with the checkpoint of the stopped stage that has its full length.

        The checkpoint and what was written next to it are copied, so that stage can still resume.
        """
        node = self.node
        end = getattr(node.config, END, None)
        checkpoints = self.partial / CHECKPOINTS
        if end is None or any(checkpoints.iterdir()):
            return
        whole = self.store.partial(self.kind, digest(with_end(node.parts, None)))
        name = f"{CHECKPOINT}{end * steps_per_length(node.config)}"
        if not (whole / CHECKPOINTS / name / COMPLETE).is_file():
            return
        others = {folder.name for folder in (whole / CHECKPOINTS).glob(f"{CHECKPOINT}*")} - {name}
        # The checkpoint is renamed into its place last: a kill before that begins the copy anew.
        draft = checkpoints.with_name("adopted")
        shutil.rmtree(draft, ignore_errors=True)
        shutil.copytree(
            whole / CHECKPOINTS, draft, ignore=lambda folder, names: {"engine", "damaged", *others}, symlinks=True
        )
        for file in (EVENTS, ATTEMPTS, PRECISION_FILE):
            if (whole / file).is_file():
                shutil.copyfile(whole / file, self.partial / file)
        checkpoints.rmdir()
        draft.rename(checkpoints)

    def _map_inputs(self, describe: Any) -> dict[str, Any]:
        """Return input field -> ``describe`` of each stage that it names; None for a field that names none."""
        described: dict[str, Any] = {}
        # An input field names one stage, a list of stages, or none.
        for field_name, value in self.node.inputs.items():
            if isinstance(value, list):
                described[field_name] = [describe(name) for name in value]
            else:
                described[field_name] = value and describe(value)
        return described

    def _error_of(self, result: dict[str, Any]) -> UserError | StageFailed:
        """Tell the listener, and return the error that says why the stage's process is not done."""
        log = self.partial / LOG
        self.listener.stage_failed(self.node, result["message"], log)
        if result["status"] == "refused":
            return UserError(f"stage '{self.node.name}': {result['message']}")
        return StageFailed(f"stage '{self.node.name}' failed: {result['message']}\nLog: {log}")

    def _publish(self, result: dict[str, Any], hold: Hold, replaces: Artifact | None) -> Artifact:
        """Give the output folder its log, events and record, move it to its final name, and drop the partial."""
        retry = self.store.retry
        output = self.partial / OUTPUT
        # The runner noted the last attempt's seconds from outside; the stage's own count replaces them.
        seconds = retry.call(lambda: [*read_attempts(self.partial)[:-1], result["seconds"]])
        retry.call(self._copy_logs)
        # One rename makes the artifact visible. The partial goes last: a crash in between leaves only clutter.
        artifact = self.store.publish(output, self._record(result, seconds), hold, replaces)
        self.store.drop_partials(self.kind, self.node.key)
        return artifact

    def _record(self, result: dict[str, Any], seconds: list[float]) -> dict[str, Any]:
        """Return the artifact's record.

        ``seconds`` of each attempt: the record's ``seconds`` are their sum. ``peak_memory_bytes`` is the last
        attempt's.
        """
        node = self.node
        return {
            "key": node.key,
            "kind": self.kind,
            "card_verb": node.stage.card_verb,
            "stage": node.name,
            "pipeline": self.pipeline.name,
            "makes": str(node.makes),
            "version": node.stage.version,
            "config": node.config.model_dump(mode="json"),
            "seed": node.seed,
            "parts": node.parts,
            "inputs": self._map_inputs(lambda name: str(self.inputs[name].record["key"])),
            "input_stages": [
                {
                    "stage": artifact.stage,
                    "kind": artifact.record["kind"],
                    "key": artifact.record["key"],
                    "weights": artifact.weights,
                }
                for artifact in self.inputs.values()
            ],
            "identities": node.identities,
            "metrics": result["metrics"],
            "tokens": result["metrics"].get("tokens"),
            "seconds": round(sum(seconds), 2),
            "attempts": [round(attempt, 2) for attempt in seconds],
            "peak_memory_bytes": result["peak_memory_bytes"],
            "created": datetime.now(UTC).isoformat(),
            "align": VERSION,
            "precision": result["precision"],
            "packages": result["versions"],
            "source": source_digest(node.stage),
            "git": git_commit(),
            "platform": f"{sys.platform} {os.uname().machine}, {os.cpu_count()} cores",
            "command": command_line(),
        }

    def _copy_logs(self) -> None:
        for name in (LOG, EVENTS):
            if (self.partial / name).exists():
                shutil.copyfile(self.partial / name, self.partial / OUTPUT / name)
