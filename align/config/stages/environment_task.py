"""Settings of the evaluation task ``environment``: episodes in an environment, from rows of files or of a stage.

Torch-free.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from align.config.environment import EnvironmentConfig
from align.config.stages.evaluation_fields import HUB_FIELDS, RecordFields, TaskConfig, TemperatureFields

PART_NAME = r"^[A-Za-z][A-Za-z0-9_.-]{0,63}$"
"""Names that an environment may give the parts of its score."""


class EnvironmentTaskConfig(RecordFields, TemperatureFields, TaskConfig):
    """Episodes in an environment, one or more for each row. Rows: as ``reset`` of the environment reads them.

    ``prompt`` (text or messages) begins an episode whose ``reset`` returns None; ``id`` names a row.
    """

    task: Literal["environment"] = "environment"

    column_names: ClassVar[Sequence[str]] = ("id", "source", "prompt", "answer", "checks")
    environment: EnvironmentConfig
    """Environment that the systems act in, as in the stages that learn from rollouts."""
    rows: str | None = None
    """Stage of prompts from the evaluation's ``rows``, whose ``test`` split is played instead of files."""
    success: float | Annotated[str, Field(pattern=PART_NAME)] = 1.0
    """Score from which on an episode counts as a success; or the name of a part of the score, which then has to be 1
    or more."""
    samples: int = Field(1, ge=1)
    """Episodes of each row; more than one needs a temperature above 0. The powers of two up to it give pass@k."""

    identified: ClassVar[frozenset[str]] = RecordFields.identified | {"environment"}

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        places = [
            name
            for name in ("files", *HUB_FIELDS, "header", "records", "delimiter", "encoding")
            if getattr(self, name) is not None
        ]
        if self.rows is None and not places:
            raise ValueError(
                "there are no rows to play; name `rows`, a stage of prompts, or `files`, or a dataset and revision on "
                "the Hub"
            )
        if self.rows is None:
            return super()._one_place()  # type: ignore[operator,no-any-return]
        if places:
            raise ValueError(f"it has rows, so '{places[0]}' means nothing; drop one of them")
        if self.columns:
            raise ValueError("columns map the columns of files, and the rows of a stage have align's own; drop columns")
        return self
