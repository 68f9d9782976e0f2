"""Listeners, which are told what happens during a run. Never imports torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from align.pipeline.pipeline import Node
from align.store.artifacts import Artifact


class Listener:
    """Receives what happens during a run; the console is one. This one is silent."""

    def stage_cached(self, node: Node, artifact: Artifact) -> None:
        """A finished stage was found."""

    def stage_started(self, node: Node, folder: Path, resumed: bool) -> None:
        """A stage's process starts; ``resumed`` when an earlier attempt left checkpoints."""

    def stage_event(self, node: Node, event: dict[str, Any]) -> None:
        """One line of the stage's event file."""

    def stage_done(self, node: Node, artifact: Artifact) -> None:
        """The stage's artifact is published."""

    def stage_failed(self, node: Node, message: str, log: Path) -> None:
        """The stage ended without an artifact."""

    def stage_stopping(self, node: Node, how: str) -> None:
        """The stage was asked to stop, or is ended now; ``how`` says it in words."""

    def stage_queued(self, node: Node, how: str) -> None:
        """The stage has its place in a cluster's queue, or another one than before; ``how`` says it in words."""

    def waiting(self, node: Node, holder: str) -> None:
        """Another run holds the stage's lock."""

    def transfer(self, message: str) -> None:
        """A finished stage is fetched from the store's remote or uploaded to it."""

    def warning(self, message: str) -> None:
        """Something the user should know."""
