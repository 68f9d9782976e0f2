"""Settings of the validation of a score before a stage learns from it. Torch-free."""

from __future__ import annotations

from pydantic import Field

from align.config.base import Config


class ScoreValidation(Config):
    """Validation of the score on a sample of rows before a model is loaded (docs/rewards.md).

    It changes no result, so it is in no key. Reward models are not validated; ``reward_floor`` checks them.
    """

    floor: float = Field(0.9, ge=0, le=1)
    """Share of rows that must pass a check. 0 only shows the table, and never refuses."""
    rows: int = Field(32, ge=0, le=10_000)
    """Rows to validate on, spread over the data, plus up to 6 for each form of answer (``1,080``, ``-4``, ``3/4``);
    0 for no validation."""
    judge_rows: int = Field(8, ge=0, le=10_000)
    """Rows to ask judges about, with four requests a row; 0 asks no judge."""
    reference: str | None = Field(None, min_length=1)
    """Column with the row's right answer, or ``checks.answer`` for an entry of one. By default the completion, else the
    column ``answer``, else ``checks.answer``, else the chosen answer of a pair."""
