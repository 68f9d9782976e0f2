"""Open the store that a run uses, transfer artifacts, and find the states of stopped stages. Never imports torch.

A run only begins if the remote has said what is finished, because running a finished stage again could cost days. Later
an unreachable remote only causes a warning; the next run uploads.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from align.config.runtime import StoreConfig
from align.config.stages.continue_from import CONTINUE, END, awaits_store, steps_per_length
from align.config.user_paths import user_path
from align.errors import UserError
from align.pipeline.inheritance import CHECKPOINT, COMPLETE, Settings, refuse_no_more, with_end
from align.pipeline.pipeline import Node, Pipeline
from align.store.artifacts import CHECKPOINTS, Artifact
from align.store.fingerprint import digest
from align.store.locks import Hold, Lease
from align.store.object_store import AccessRefused, check_address
from align.store.record import DamagedRecord
from align.store.retry import SECONDS, StoreUnreachable
from align.store.store import Store


@dataclass(frozen=True)
class Opening:
    """All that decides which store is opened, in plain values that another machine can be given, without secrets."""

    folder: str
    lease: float = Lease.seconds
    """Seconds."""
    patience: float = SECONDS
    """Seconds."""
    remote: str | None = None
    """Address of a bucket."""

    @classmethod
    def of(cls, store: Store) -> Opening:
        """Return the settings that open the same store from any working folder, on every machine that sees it."""
        remote = None if store.remote is None else store.remote.address
        return cls(str(store.root.resolve()), store.lease.seconds, store.retry.seconds, remote)

    def open(self) -> Store:
        """Return the store, which is created if it is missing. Raises ``UserError`` if it cannot be used."""
        store = Store.open(user_path(self.folder), lease=self.lease, retry_seconds=self.patience)
        if self.remote is not None:
            store.connect(self.remote)
        return store


def open_store(pipeline: Pipeline | None = None, store: str | Path | Store | None = None) -> Store:
    """The store: the argument, else ``$ALIGN_STORE``, else ``runtime.store``, else ``./store``.

    Each may be a folder or the address of a bucket, and leaves the other to those that come after it.
    """
    if isinstance(store, Store):
        return store
    settings = pipeline.config.runtime.store if pipeline is not None else StoreConfig()
    choices = [("--store", str(store or "")), ("$ALIGN_STORE", os.environ.get("ALIGN_STORE", ""))]
    folders = [word for _, word in choices if word and "://" not in word]
    remote = settings.remote
    for name, word in choices:
        if "://" in word:
            try:
                remote = check_address(word)
            except ValueError as error:
                raise UserError(f"{name}: {error}") from None
            break
    return Opening([*folders, settings.folder or "store"][0], settings.lease, settings.patience, remote).open()


Log = Callable[[str], None]


def fetch_missing(pipeline: Pipeline, store: Store, only: str | None, force: set[str], log: Log) -> None:
    """Fetch the stages that are finished only in the remote: all, or ``only`` one and its inputs; not ``force``.

    Raises ``StoreUnreachable`` and ``UserError`` before anything is begun.
    """
    remote = store.remote
    if remote is None:
        return
    stages = pipeline.touched_by(only) - force
    try:
        for node in pipeline:
            if node.name not in stages or store.find(node.stage.kind, node.key, node.name) is not None:
                continue
            record = remote.find(node.stage.kind, node.key)
            if record is not None:
                log(f"stage '{node.name}' is finished in {remote.address}; fetching {_size(record)}")
                store.fetch(node.stage.kind, node.key, node.name)
    except StoreUnreachable as error:
        # No stage has begun yet, so stopping is free. Running finished stages again could cost days.
        raise StoreUnreachable(
            f"{error} Nothing was begun, since what is finished there is not known; "
            "a folder alone (`--set runtime.store=FOLDER`, or --store FOLDER for an address there) runs without it."
        ) from None
    except DamagedRecord:  # names its file itself
        raise
    except UserError as error:
        raise UserError(f"runtime.store.remote: {error}") from None


@contextlib.contextmanager
def remote_lock(store: Store, kind: str, key: str, log_holder: Log, log: Log) -> Iterator[Hold | None]:
    """Hold the stage's lock in the remote; None if there is no remote, or it is away or accepts no claims.

    ``log_holder`` gets the holder that is waited for.
    """
    if store.remote is None:
        yield None
        return
    with contextlib.ExitStack() as stack:
        hold = None
        # Only the entry is guarded. An error of the stage itself must pass through untouched.
        try:
            hold = stack.enter_context(store.remote.lock(kind, key, log_holder))
        except (StoreUnreachable, UserError) as error:
            log(f"{error} The stage runs without a lock there: another machine may run it too.")
        yield hold


def fetch_if_published(store: Store, kind: str, key: str, stage: str, log: Log) -> Artifact | None:
    """Fetch an artifact that another machine has published since the run began.

    None if the remote is away, or refuses what it allowed before. Raises ``UserError`` for a damaged artifact.
    """
    try:
        return store.fetch(kind, key, stage)
    except (StoreUnreachable, AccessRefused) as error:
        log(str(error))
        return None


def upload(store: Store, artifact: Artifact, log: Log, replace: bool = False) -> None:
    """Upload a finished stage unless it is in the remote. A failure is logged; the next run uploads it."""
    remote = store.remote
    if remote is None:
        return
    kind = artifact.record["kind"]
    key = artifact.record["key"]
    try:
        if not replace and remote.find(kind, key) is not None:
            return
        log(f"uploading stage '{artifact.stage}' to {remote.address}, {_size(artifact.record)}")
        if not remote.push(artifact, replace):
            log(f"another machine published stage '{artifact.stage}' first; its artifact stays in {remote.address}")
    except (StoreUnreachable, UserError) as error:
        log(f"stage '{artifact.stage}' is only in {store.root} for now: {error} The next run uploads it.")


def _size(record: dict[str, object]) -> str:
    outputs = record["outputs"]
    assert isinstance(outputs, dict)
    return f"{len(outputs)} files, {sum(entry['bytes'] for entry in outputs.values()) / 2**20:.1f} MiB"


def settle_states(pipeline: Pipeline, store: str | Path | Store | None) -> Pipeline:
    """Return the pipeline with a number in place of ``at: last`` of stages that continue a stopped stage.

    It is the number of steps, or updates, of the stopped stage's last checkpoint in ``store`` (as of ``open_store``). A
    finished stage is continued at its end. Raises ``UserError`` for a stage that has nothing left to train.
    """
    waiting = [node.name for node in pipeline if awaits_store(node.config) and node.name in pipeline.config.stages]
    if not waiting:
        return pipeline
    opened = open_store(pipeline, store)
    for name in waiting:
        node = pipeline.nodes[name]
        source = pipeline.nodes[str(node.inputs[CONTINUE])]
        end = _last_state(source, opened)
        if end is not None:
            pipeline = pipeline.changed({f"stages.{name}.{CONTINUE}.at": end})
            continue
        place = f"{pipeline.where}: {pipeline.expanded.places[name]}"
        try:
            refuse_no_more(place, node.config, Settings(source.name, source.config, source.seed))
        except UserError as error:
            is_finished = opened.find_intact(source.stage.kind, source.key) is not None
            reason = "is finished" if is_finished else "has no checkpoint yet"
            raise UserError(f"{error} '{source.name}' {reason}, so `at: last` means its end.") from None
    return pipeline


def _last_state(node: Node, store: Store) -> int | None:
    """Return the steps, or updates, of the last state of a stage that was stopped; None for any other stage.

    The state is a checkpoint in the stage's partial folder, or an artifact that ends there.
    """
    kind = node.stage.kind
    if store.find_intact(kind, node.key) is not None or (store.remote and store.remote.find(kind, node.key)):
        return None
    ends = stopped_ends(store.partial(kind, node.key), steps_per_length(node.config))
    for artifact in store.all():
        parts = artifact.record["parts"]
        end = (parts.get("config") or {}).get(END)
        if artifact.record["kind"] == kind and end is not None and digest(with_end(parts, None)) == node.key:
            ends.append(int(end))
    return max(ends, default=None)


def stopped_ends(partial: Path, unit: int) -> list[int]:
    """Return the steps, or updates of ``unit`` steps, of the checkpoints in the folder of a stage in progress."""
    folders = (partial / CHECKPOINTS).glob(f"{CHECKPOINT}*")
    steps = [int(folder.name.removeprefix(CHECKPOINT)) for folder in folders if (folder / COMPLETE).is_file()]
    return [step // unit for step in steps if step % unit == 0]
