"""Settings of the stage ``data``: the recipe and its files. Torch-free."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from align.config.base import Config, stage_input
from align.store.artifacts import DATASETS, Kind


class DataConfig(Config):
    """The recipe and its files."""

    recipe: str
    """Path of a recipe (data_recipes/*.yaml), relative to the current directory; its content enters the key."""
    files: list[str] | None = Field(None, min_length=1)
    """Local files (paths or globs) in the recipe's format, to read instead of its sources."""

    inputs: list[stage_input(*DATASETS, Kind.POLICY, Kind.REWARD)] = Field([])  # type: ignore[valid-type]
    """Earlier stages with data for the recipe's sources of type ``input``, or with models for its steps."""
    max_rows: int | None = Field(None, ge=2)
    """Most rows, both splits together; overrides the recipe's."""

    identified: ClassVar[frozenset[str]] = frozenset({"recipe", "files", "max_rows"})
