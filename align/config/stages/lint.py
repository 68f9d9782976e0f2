"""Settings of the linter in a training stage. Torch-free."""

from __future__ import annotations

from pydantic import Field, field_validator

from align.config.base import Config
from align.config.stages.lint_rules import RULES
from align.config.validation import suggest

MAX_ROWS = 10_000


class LintSettings(Config):
    """Checks of the rows' tokens before the first step (docs/lint.md). They change no result, so they are in no key."""

    waive: list[str] = Field(default_factory=list)
    """Names of intended findings: their errors do not stop the stage, their warnings are recorded but not shown."""
    rows: int | None = Field(MAX_ROWS, ge=1)
    """Most rows per split to look at, drawn by the seed; null looks at all of them."""

    @field_validator("waive")
    @classmethod
    def _known_names(cls, names: list[str]) -> list[str]:
        for name in names:
            if name not in RULES:
                raise ValueError(f"there is no finding '{name}'.{suggest(name, RULES)}")
        return names
