"""Opens the environment that a config names: a class, functions, a package of verifiers, or an OpenEnv server."""

from __future__ import annotations

from align.config.environment import EnvironmentConfig
from align.environments.class_environment import open_class
from align.environments.environment import EnvironmentSource
from align.environments.function_environment import open_functions
from align.environments.openenv_adapter import open_openenv
from align.environments.verifiers_adapter import open_verifiers


def open_environment(config: EnvironmentConfig, place: str = "environment") -> EnvironmentSource:
    """Import what a config names, and check all that can be checked before an episode.

    Raises ``UserError``, which begins with ``place``.
    """
    if config.class_name is not None:
        return open_class(config, place)
    if config.openenv is not None:
        return open_openenv(config, place)
    if config.verifiers is not None:
        return open_verifiers(config, place)
    # Beside a simulated user there may be no tools, but a function that scores.
    return open_functions(config, place)
