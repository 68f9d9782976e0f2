"""align: from a base model to an aligned, scored checkpoint, in one cached and resumable pipeline."""

from typing import TYPE_CHECKING, Any

from align.store.artifacts import VERSION as __version__

if TYPE_CHECKING:
    from align.api import Pipeline, Run, Scorecard
    from align.environments.results import EnvironmentFailed
    from align.store.rollouts import open_rollouts, rollout_rows

__all__ = ["EnvironmentFailed", "Pipeline", "Run", "Scorecard", "__version__", "open_rollouts", "rollout_rows"]


def __getattr__(name: str) -> Any:
    """Load names of other modules on first use, so that ``import align`` stays instant."""
    if name in ("Pipeline", "Run", "Scorecard"):
        from align import api

        return getattr(api, name)
    if name == "EnvironmentFailed":
        from align.environments import results

        return results.EnvironmentFailed
    if name in ("open_rollouts", "rollout_rows"):
        from align.store import rollouts

        return getattr(rollouts, name)
    raise AttributeError(f"module 'align' has no attribute {name!r}")
