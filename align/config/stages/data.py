"""Settings of the stage ``data``: which recipe, and where its files are. Torch-free."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from align.config.base import Config, stage_input
from align.store.artifacts import DATASETS, Kind


class DataConfig(Config):
    """Which recipe, and where its files are."""

    recipe: str
    """Path of a recipe (data_recipes/*.yaml), relative to the current directory; its content is what counts."""
    files: list[str] | None = Field(None, min_length=1)
    """Local files (paths or globs) to read instead of the recipe's sources, in the recipe's format."""

    inputs: list[stage_input(*DATASETS, Kind.POLICY, Kind.REWARD)] = Field([])  # type: ignore[valid-type]
    """Earlier stages whose data the recipe's sources of type ``input`` read, or whose model its steps use."""
    max_rows: int | None = Field(None, ge=2)
    """Keep this many rows at most, both splits together; comes before the recipe's own."""

    identified: ClassVar[frozenset[str]] = frozenset({"recipe", "files", "max_rows"})
