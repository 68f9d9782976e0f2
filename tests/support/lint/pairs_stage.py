"""A stage that makes preferences, for pipelines that are only planned."""

from align.config.base import Config
from align.pipeline.context import StageContext
from align.registry import Stage
from align.store.artifacts import Kind


class PairsConfig(Config):
    """Nothing to say."""


def run(context: StageContext) -> dict[str, int]:
    """Never called."""
    raise AssertionError(context.name)


PAIRS = Stage("pairs", 1, Kind.PREFERENCES, f"{__name__}:PairsConfig", f"{__name__}:run", "pairs", f"{__name__}:PAIRS")
