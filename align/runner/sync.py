"""What a run fetches from its store's remote and what it puts there, and when. Never imports torch.

Before a run nothing is begun unless the remote has said what is finished: making a stage again that lies there could
cost days. Once a run is under way a remote that is away costs it nothing but a warning; the next run uploads.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from align.errors import UserError
from align.pipeline.pipeline import Pipeline
from align.store.artifacts import Artifact
from align.store.locks import Hold
from align.store.record import DamagedRecord
from align.store.retry import StoreUnreachable
from align.store.store import Store

Say = Callable[[str], None]


def bring(pipeline: Pipeline, store: Store, only: str | None, anew: set[str], say: Say) -> None:
    """Fetch the stages that are finished in the remote and not here: all, or ``only`` one and what it reads.

    Raises ``StoreUnreachable`` and ``UserError`` before anything is begun.
    """
    remote = store.remote
    if remote is None:
        return
    wanted = pipeline.touched_by(only) - anew
    try:
        for node in pipeline:
            if node.name not in wanted or store.find(node.stage.kind, node.key, node.name) is not None:
                continue
            record = remote.find(node.stage.kind, node.key)
            if record is not None:
                say(f"stage '{node.name}' is finished in {remote.address}; fetching {_size(record)}")
                remote.fetch(node.stage.kind, node.key, node.name)
    except StoreUnreachable as error:
        raise StoreUnreachable(
            f"{error} Nothing was begun, since what is finished there is not known; "
            "a folder alone (`--set runtime.store=FOLDER`, or --store FOLDER for an address there) runs without it."
        ) from None
    except DamagedRecord:  # names its file itself
        raise
    except UserError as error:
        raise UserError(f"runtime.store.remote: {error}") from None


@contextlib.contextmanager
def among_machines(store: Store, kind: str, key: str, on_wait: Say, say: Say) -> Iterator[Hold | None]:
    """Hold the stage's lock in the remote; None where there is no remote, or it is away or takes no claims."""
    if store.remote is None:
        yield None
        return
    with contextlib.ExitStack() as stack:
        hold = None
        try:
            hold = stack.enter_context(store.remote.lock(kind, key, on_wait))
        except (StoreUnreachable, UserError) as error:
            say(f"{error} The stage is made without a lock there: another machine may make it, too.")
        yield hold


def fetched_meanwhile(store: Store, kind: str, key: str, stage: str, say: Say) -> Artifact | None:
    """What another machine has published since the run began; None where the remote is away, too."""
    if store.remote is None:
        return None
    try:
        return store.remote.fetch(kind, key, stage)
    except StoreUnreachable as error:
        say(str(error))
        return None


def offer(store: Store, artifact: Artifact, say: Say, replace: bool = False) -> None:
    """Put a finished stage into the remote if it is not there; a failure is said, and made good by the next run."""
    if store.remote is None:
        return
    kind, key = artifact.record["kind"], artifact.record["key"]
    try:
        if not replace and store.remote.find(kind, key) is not None:
            return
        say(f"uploading stage '{artifact.stage}' to {store.remote.address}, {_size(artifact.record)}")
        if not store.remote.push(artifact, replace):
            say(f"another machine published stage '{artifact.stage}' first; that one stays in {store.remote.address}")
    except (StoreUnreachable, UserError) as error:
        say(f"stage '{artifact.stage}' is only in {store.root} so far: {error} The next run uploads it.")


def _size(record: dict[str, object]) -> str:
    outputs = record["outputs"]
    assert isinstance(outputs, dict)
    return f"{len(outputs)} files, {sum(entry['bytes'] for entry in outputs.values()) / 2**20:.1f} MiB"
