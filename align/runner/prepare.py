"""Prepare a run: check its trackers, open the store, fetch what is finished, choose the stages. Never imports torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from align.errors import UserError
from align.pipeline.pipeline import Node, Pipeline
from align.runner.continuations import refuse_without_state
from align.runner.listener import Listener
from align.runner.open_store import open_store
from align.runner.plan import History, check_sources, choose_stages, stages_to_make
from align.runner.sync import fetch_missing
from align.store.record import DamagedArtifact
from align.store.store import Store


@dataclass(frozen=True)
class RunOptions:
    """Choice of a pipeline's stages and of the store; the same for a run here and one on a cluster."""

    store: str | Path | Store | None = None
    """As of ``open_store``."""
    only: str | None = None
    """Make this one stage, whose inputs must be finished."""
    from_: str | None = None
    """Run this stage and all that depend on it, although they are finished."""
    rebuild: tuple[str, ...] | str = ()
    """Run these stages although they are finished."""
    strict: bool = False
    """Refuse artifacts made by other source code under the same stage version."""


@dataclass(frozen=True)
class Prepared:
    """A run that may begin."""

    store: Store
    force: set[str]
    """Stages that are made although an artifact is there."""
    wanted: list[Node]
    """Stages that are to be made, in order."""
    warnings: list[str]


def prepare_run(pipeline: Pipeline, options: RunOptions, listener: Listener | None = None) -> Prepared:
    """Open the store, fetch what is finished in its remote, and choose what is made.

    Raises ``UserError`` for what must stop a run before it starts.
    """
    listener = listener or Listener()
    require_trackers(pipeline.config.runtime.report_to)  # before there is a store
    store = open_store(pipeline, options.store)
    store.require_writable()
    store.retry.log = listener.warning
    from_ = options.from_
    # A script may name a single stage as a text, which is no tuple of letters.
    rebuild = (options.rebuild,) if isinstance(options.rebuild, str) else options.rebuild
    # Twice: what is rebuilt need not be fetched, but ``--only`` checks its inputs, which may have to be fetched first.
    rebuilt = choose_stages(pipeline, store, None, from_, rebuild)
    fetch_missing(pipeline, store, options.only, rebuilt, listener.transfer)
    force = choose_stages(pipeline, store, options.only, from_, rebuild)
    # All that can stop the run is checked before its first stage, not hours later when a stage reads it.
    used = pipeline.touched_by(options.only) - force
    _refuse_damage(pipeline, store, used)
    warnings = check_sources(pipeline, store, used, options.strict)
    wanted = stages_to_make(pipeline, store, options.only, force)
    refuse_without_state(pipeline, store, wanted, force)
    # Forced stages get no suggestion: the user asked for all of their steps.
    history = History(pipeline, store)
    suggestions = [history.suggest(node) for node in wanted if node.name not in force]
    return Prepared(store, force, wanted, [*warnings, *(text for text in suggestions if text)])


def _refuse_damage(pipeline: Pipeline, store: Store, used: set[str]) -> None:
    """Damaged finished stages among those that are used stop the run before anything starts; all are named."""
    damaged = []
    for node in pipeline:
        if node.name in used:
            try:
                _require_intact(node, store)
            except DamagedArtifact as error:
                damaged.append(error)
    if damaged:
        raise DamagedArtifact("\n".join(map(str, damaged)), damaged[0].stage)


def _require_intact(node: Node, store: Store) -> None:
    artifact = store.find(node.stage.kind, node.key, node.name)
    problems = store.problems(artifact, thorough=False) if artifact is not None else []
    if problems:
        raise DamagedArtifact(
            f"stage '{node.name}': {problems[0].path} {problems[0].description}. "
            f"The artifact is corrupted; `--rebuild {node.name}` makes it again.",
            node.name,
        )


def is_installed(package: str) -> bool:
    """Return whether ``package`` can be imported; a plain folder of that name, as wandb creates, does not count."""
    spec = importlib.util.find_spec(package)
    # A folder of that name in the current directory is found too, as a namespace without an origin.
    return spec is not None and spec.origin is not None


def require_trackers(names: Iterable[str]) -> None:
    """Raise ``UserError`` for the trackers among ``names`` whose package, called as the tracker is, is missing."""
    missing = [name for name in names if not is_installed(name)]
    if missing:
        verb, pronoun = ("is", "it") if len(missing) == 1 else ("are", "them")
        raise UserError(
            f"runtime.report_to: {', '.join(missing)} {verb} not installed. "
            f"`pip install {' '.join(missing)}`, or leave {pronoun} out."
        )
