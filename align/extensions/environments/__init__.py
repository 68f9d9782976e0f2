"""Environments of other projects, played as if they were a user's class: OpenEnv and verifiers."""

from align.registry import Adapter, Extension

EXTENSION = Extension(
    "environments of OpenEnv and of verifiers",
    (
        Adapter("openenv", "align.extensions.environments.openenv:open_openenv"),
        Adapter("verifiers", "align.extensions.environments.verifiers:open_verifiers"),
    ),
)
