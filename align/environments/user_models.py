"""Opens the model that plays the user of an environment: a checkpoint, or a server."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from align.config.base import Precision
from align.config.runtime import Runtime
from align.config.simulated_user import SimulatedUserConfig
from align.environments.simulated_user import SimulatedUser
from align.inference.watchdog import OnHang

FOLDER = "user"
"""Folder of a server's answers."""


@dataclass(frozen=True)
class UserResources:
    """What a stage gives to the model that plays the user."""

    runtime: Runtime
    precision: Precision
    folder: Path
    """Folder that survives a kill of the stage, for a server's answers."""
    shared: Path | None
    """Folder that runs share, where there is one."""
    warn: Callable[[str], object]
    on_hang: OnHang | None = None
    processes: int = 1
    """Processes of the stage, which share a server's budget."""


def open_user(
    config: SimulatedUserConfig, model_dir: Path | None, resources: UserResources, where: str
) -> SimulatedUser:
    """Open a user, and check it; ``model_dir`` is the folder of its checkpoint, where it is one.

    A server is asked for a word. Raises ``UserError``, which begins with ``where``, for a model that cannot be used.
    """
    if config.endpoint is None:
        from align.environments.checkpoint_user import CheckpointUser

        assert model_dir is not None
        return CheckpointUser(
            config,
            model_dir,
            resources.runtime,
            resources.precision,
            where=f"{where}.model",
            on_hang=resources.on_hang,
        )
    from align.environments.endpoint_user import EndpointUser

    shared = None if resources.shared is None else resources.shared / FOLDER
    user = EndpointUser(
        config,
        resources.folder / FOLDER,
        shared,
        where=where,
        warn=resources.warn,
        processes=resources.processes,
    )
    user.check()
    return user
