"""What a training stage lets the user say about linting. Torch-free."""

from __future__ import annotations

from pydantic import Field, field_validator

from align.config.base import Config
from align.config.stages.lint_rules import RULES
from align.config.validation import suggest

MOST_ROWS = 10_000


class LintSettings(Config):
    """The look at the rows' tokens before the first step (docs/lint.md). Changes no result, so it is in no key."""

    waive: list[str] = Field(default_factory=list)
    """Findings, by name, that are meant: errors do not stop this stage, warnings are kept but not shown."""
    rows: int | None = Field(MOST_ROWS, ge=1)
    """Rows looked at per split at most, drawn by the seed; null looks at all of them."""

    @field_validator("waive")
    @classmethod
    def _known_names(cls, names: list[str]) -> list[str]:
        for name in names:
            if name not in RULES:
                raise ValueError(f"there is no finding '{name}'.{suggest(name, RULES)}")
        return names
