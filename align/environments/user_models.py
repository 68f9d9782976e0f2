"""Opens the model that plays the user of an environment: a checkpoint, or a server."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.config.base import Precision
from align.config.environment import EnvironmentConfig
from align.config.launch import world_size
from align.config.runtime import Runtime
from align.config.simulated_user import USER_INPUT, SimulatedUserConfig
from align.environments.simulated_user import SimulatedUser
from align.inference.watchdog import OnHang
from align.pipeline.context import StageContext

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
    outage_fails_episodes: bool = False
    """Whether a server that is lost fails the episodes that it did not answer. Else ``EndpointLost`` ends the stage:
    what is stored for good should hold no outage."""


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
        outage_fails_episodes=resources.outage_fails_episodes,
    )
    user.check()
    return user


def open_stage_user(context: StageContext, *, outage_fails_episodes: bool = False) -> SimulatedUser | None:
    """Open the model that plays the user of a stage's episodes; None where its environment has none.

    For ``outage_fails_episodes`` see ``UserResources``.
    """
    config = context.config.environment.user
    if config is None:
        return None
    artifact = context.inputs.get(USER_INPUT)
    resources = UserResources(
        runtime=context.runtime,
        precision=context.precision,
        folder=context.checkpoints,
        shared=context.shared_answers(),
        warn=context.warn,
        on_hang=context.fail_at_once,
        processes=playing_processes(context.runtime),
        outage_fails_episodes=outage_fails_episodes,
    )
    model_dir = None if artifact is None else artifact.model
    return open_user(config, model_dir, resources, f"{context.name}.environment.user")


def playing_processes(runtime: Runtime) -> int:
    """Return how many processes of this stage play episodes: with a pool of servers the first one plays all."""
    return 1 if runtime.rollouts.pooled else world_size()


def check_user_rows(config: EnvironmentConfig, rows: Iterable[Mapping[str, Any]], where: str) -> None:
    """Raise ``UserError`` for a row without a column that the user's prompt quotes; ``where`` is the stage's name.

    It needs no model, so stages call it with all their rows before they load one.
    """
    if config.user is None:
        return
    for row in rows:
        user_prompt(config, where, row)


def user_prompt(config: EnvironmentConfig, where: str, row: Mapping[str, Any]) -> str:
    """Return the system message of the user's model for a row. Raises ``UserError`` for a column it lacks."""
    assert config.user is not None
    return config.user.system_message(row, f"{where}.environment.user")


def user_usage(user: SimulatedUser | None) -> dict[str, Any]:
    """Return ``user``: requests, tokens and cost of the server that plays the user; nothing without one."""
    usage = {} if user is None else user.usage()
    return {"user": usage} if usage else {}
